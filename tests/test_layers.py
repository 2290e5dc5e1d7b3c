"""The layers: identities, then float64 loops in NumPy and SciPy that share no code with Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import drawn, redrawn
from flax import linen as nn
from scipy import signal, special

from maknet_jax.errors import InputError
from maknet_jax.models import layers

NAMES = ("conv_kxk", "conv_1xk", "conv_kx1", "conv_1x1")


def torch_convolution(x, kernel, stride):
    """Cross-correlation with padding k // 2 on every side, output by output, as torch has it."""
    rows, columns = kernel.shape[:2]
    top, left = rows // 2, columns // 2
    x = np.pad(np.float64(x), ((0, 0), (top, top), (left, left), (0, 0)))
    height = (x.shape[1] - rows) // stride + 1
    width = (x.shape[2] - columns) // stride + 1
    out = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * stride : i * stride + rows, j * stride : j * stride + columns]
            out[:, i, j] = np.einsum("brcx,rcxy->by", patch, np.float64(kernel))
    return out


def scipy_convolution(x, kernel, stride):
    """The same by scipy.signal.correlate2d, channel by channel."""
    x, kernel = np.float64(x), np.float64(kernel)
    full = np.zeros((*x.shape[:3], kernel.shape[3]))
    for b, y, c in np.ndindex(x.shape[0], kernel.shape[3], x.shape[3]):
        full[b, :, :, y] += signal.correlate2d(x[b, :, :, c], kernel[:, :, c, y], mode="same")
    return full[:, ::stride, ::stride]


def test_two_references_agree():
    x, kernel = drawn(2, 7, 6, 3), drawn(3, 3, 3, 4, seed=1)
    for stride in (1, 2):
        theirs = scipy_convolution(x, kernel, stride)
        np.testing.assert_allclose(torch_convolution(x, kernel, stride), theirs, rtol=1e-9)


@pytest.mark.parametrize(
    "k, features, stride", [(3, 8, 1), (3, 7, 2), (3, 5, 1), (5, 8, 2), (5, 6, 1), (5, 3, 2)]
)
def test_makconv_is_four_convolutions_side_by_side(k, features, stride):
    x = drawn(2, 9, 8, 3)
    conv = layers.MAKConv(features, k, stride)
    params = redrawn(conv.init(jax.random.key(0), x))["params"]
    shapes = {name: params[name]["kernel"].shape for name in NAMES if name in params}
    quarters = [len(range(first, features, 4)) for first in range(4)]
    expected = zip(NAMES, [(k, k), (1, k), (k, 1), (1, 1)], quarters, strict=True)
    assert shapes == {name: (*size, 3, count) for name, size, count in expected if count}
    assert sum(quarters) == features
    parts = [scipy_convolution(x, params[name]["kernel"], stride) for name in shapes]
    theirs = np.concatenate(parts, axis=-1)
    np.testing.assert_allclose(conv.apply({"params": params}, x), theirs, rtol=2e-5, atol=2e-5)


def test_makconv_of_one_kernel_is_that_convolution():
    x = drawn(2, 8, 8, 4)
    conv = layers.MAKConv(8)
    params = conv.init(jax.random.key(0), x)["params"]
    sizes = [(3, 3), (1, 3), (3, 1), (1, 1)]
    for number, (name, size) in enumerate(zip(NAMES, sizes, strict=True)):
        others = {other: jax.tree.map(jnp.zeros_like, params[other]) for other in NAMES}
        ours = conv.apply({"params": others | {name: params[name]}}, x)
        single = nn.Conv(2, size, use_bias=False)  # SAME, which is the same grid at stride 1
        theirs = np.zeros((2, 8, 8, 8), np.float32)
        theirs[..., 2 * number : 2 * number + 2] = single.apply({"params": params[name]}, x)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def values_and_gradients(module, variables, x, *args):
    """The output in training, the new statistics, gradients of the parameters and of the input."""

    def value(params, x):
        y, updated = module.apply(variables | {"params": params}, x, *args, mutable=["batch_stats"])
        return (drawn(*y.shape) * y).sum(), (y, updated)

    gradients, (y, updated) = jax.jit(jax.grad(value, (0, 1), has_aux=True))(variables["params"], x)
    return y, updated, gradients


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("features, stride", [(8, 1), (7, 2), (3, 1)])
def test_all_forms_of_makconv_are_equal_in_value_and_gradient(k, features, stride):
    x = drawn(2, 9, 8, 3)
    split, *others = (layers.MAKConv(features, k, stride, form=form) for form in layers.FORMS)
    variables = redrawn(split.init(jax.random.key(0), x))
    expected = values_and_gradients(split, variables, x)
    for other in others:
        shapes = jax.eval_shape(other.init, jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
        np.testing.assert_allclose(
            split.apply(variables, x), other.apply(variables, x), rtol=1e-5, atol=1e-5
        )
        ours = values_and_gradients(other, variables, x)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k, growth", [(3, 8), (5, 6), (3, 3)])
def test_all_forms_of_a_dense_block_are_equal_in_value_and_gradient(k, growth):
    x = drawn(2, 9, 8, 5)
    split, *others = (layers.DenseBlock(3, growth, 7, k, form=form) for form in layers.FORMS)
    variables = split.init(jax.random.key(0), x, train=False)
    expected = values_and_gradients(split, variables, x, True)
    for other in others:
        shapes = jax.eval_shape(lambda key, m=other: m.init(key, x, train=False), jax.random.key(0))
        assert jax.tree.structure(shapes) == jax.tree.structure(variables)
        ours = values_and_gradients(other, variables, x, True)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, expected
        )


def test_the_form_decides_how_many_convolutions_makconv_runs():
    x = drawn(1, 8, 8, 3)
    count = {}
    for form in ("auto", "split", "fused"):
        init = layers.MAKConv(8, form=form).init_with_output
        text = str(jax.make_jaxpr(lambda x, init=init: init(jax.random.key(0), x)[0])(x))
        count[form] = text.count("conv_general_dilated[")
    # "auto" is the product on CPU, a 1 x 1 convolution where it is compiled for another platform.
    assert count == {"auto": 1, "split": 4, "fused": 1}


def test_an_unknown_form_is_an_error_that_names_the_known_ones():
    with pytest.raises(InputError, match="'quick'.* auto or one of split, matmul, fused"):
        layers.MAKConv(8, form="quick").init(jax.random.key(0), drawn(1, 8, 8, 3))


def test_makconv_rejects_an_even_kernel():
    with pytest.raises(InputError, match="kernel_size 4"):
        layers.MAKConv(8, 4).init(jax.random.key(0), drawn(1, 8, 8, 3))


@pytest.mark.parametrize("size", [(3, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("edge", [8, 9])
def test_strided_convolution_lies_on_the_grid_of_torch(size, edge):
    x = drawn(2, edge, edge, 3)
    conv = layers.ConvNorm(4, size, 2)
    variables = conv.init(jax.random.key(0), x, train=False)
    theirs = torch_convolution(x, variables["params"]["conv"]["kernel"], 2)
    theirs /= np.sqrt(1 + 1e-5)  # BatchNorm at its start
    ours = conv.apply(variables, x, train=False)
    assert ours.shape == (2, (edge + 1) // 2, (edge + 1) // 2, 4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_running_statistics_have_a_momentum_of_nine_tenths():
    x = 3 + 2 * drawn(4, 5, 5, 6)
    norm = layers.batch_norm(jnp.float32, True)
    variables = norm.init(jax.random.key(0), x)
    ours, updated = norm.apply(variables, x, mutable=["batch_stats"])
    mean, var = np.float64(x).mean((0, 1, 2)), np.float64(x).var((0, 1, 2))
    np.testing.assert_allclose(ours, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-4)


def mish_loop(x):
    """Mish and its derivative in float64, each branch where it does not overflow."""
    x = np.float64(x)
    softplus = np.where(x > 0, x, 0) + np.log1p(np.exp(-np.abs(x)))
    tanh = np.tanh(softplus)
    return x * tanh, tanh + x * (1 - tanh**2) * special.expit(x)


def test_mish_and_its_gradient():
    edges = [-1e30, -1e4, -90, 19.999, 20, 20.001, 90, 1e4, 1e30]
    x = np.concatenate([np.linspace(-30, 30, 1201), edges])
    x = np.float32(x)
    value, derivative = mish_loop(x)
    np.testing.assert_allclose(layers.mish(x), value, rtol=1e-5, atol=1e-9)
    ours = jax.vmap(jax.grad(layers.mish))(jnp.asarray(x))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, derivative, rtol=1e-4, atol=2e-6)
    middle = x[:1201]
    ours = jax.vmap(jax.grad(jax.grad(layers.mish)))(jnp.asarray(middle))
    second = (
        mish_loop(np.float64(middle) + 1e-4)[1] - mish_loop(np.float64(middle) - 1e-4)[1]
    ) / 2e-4
    np.testing.assert_allclose(ours, second, atol=1e-5)


def test_mish_is_finite_in_bfloat16():
    x = jnp.asarray([-1e4, -5, 0, 5, 50, 1e4], jnp.bfloat16)
    assert layers.mish(x).dtype == jnp.bfloat16
    ours = np.asarray(layers.mish(x), np.float64)
    np.testing.assert_allclose(ours, mish_loop(np.asarray(x, np.float32))[0], rtol=0.02, atol=1e-3)
    ours = np.asarray(jax.grad(lambda x: layers.mish(x).sum())(x), np.float64)
    np.testing.assert_allclose(ours, mish_loop(np.asarray(x, np.float32))[1], atol=0.02)


def test_global_concat_pool_is_maxima_then_means():
    x = drawn(3, 4, 5, 6)
    pixels = x.reshape(3, 20, 6)
    theirs = np.concatenate([pixels.max(axis=1), pixels.mean(axis=1)], axis=1)
    np.testing.assert_allclose(layers.global_concat_pool(jnp.asarray(x)), theirs, rtol=1e-5)


def test_global_concat_pool_of_bfloat16_is_float32():
    x = jnp.asarray(drawn(3, 4, 5, 6), jnp.bfloat16)
    whole = layers.global_concat_pool(x.astype(jnp.float32))
    np.testing.assert_allclose(layers.global_concat_pool(x), whole, rtol=1e-6)


def test_score_propagation_starts_as_identity_and_is_a_dense_layer():
    scores = drawn(4, 5)
    layer = layers.ScorePropagation()
    variables = layer.init(jax.random.key(0), scores)
    np.testing.assert_array_equal(layer.apply(variables, scores), scores)
    variables = redrawn(variables)
    dense = variables["params"]["dense"]
    theirs = np.float64(scores) @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    np.testing.assert_allclose(layer.apply(variables, scores), theirs, rtol=1e-5, atol=1e-5)


def cbam_loop(x, variables):
    """CBAM as Woo et al. publish it, one example at a time, BatchNorm with running statistics."""
    params = jax.tree.map(np.float64, variables["params"])
    stats = jax.tree.map(np.float64, variables["batch_stats"])

    def mlp(values):
        hidden = values @ params["mlp_hidden"]["kernel"] + params["mlp_hidden"]["bias"]
        output = params["mlp_output"]
        return np.maximum(hidden, 0) @ output["kernel"] + output["bias"]

    out = np.zeros(x.shape)
    for b, image in enumerate(np.float64(x)):
        attention = mlp(image.mean(axis=(0, 1))) + mlp(image.max(axis=(0, 1)))
        image = image * special.expit(attention)
        places = np.stack([image.max(axis=2), image.mean(axis=2)], axis=2)
        places = torch_convolution(places[None], params["places"]["kernel"], 1)[0]
        norm, running = params["places_norm"], stats["places_norm"]
        places = (places - running["mean"]) / np.sqrt(running["var"] + 1e-5)
        out[b] = image * special.expit(places * norm["scale"] + norm["bias"])
    return out


@pytest.mark.parametrize("channels, hidden", [(32, 2), (8, 1), (24, 1)])
def test_cbam_is_the_published_module(channels, hidden):
    x = drawn(2, 6, 5, channels)
    cbam = layers.CBAM()
    variables = redrawn(cbam.init(jax.random.key(0), x, train=False))
    assert variables["params"]["mlp_hidden"]["kernel"].shape == (channels, hidden)
    ours = cbam.apply(variables, x, train=False)
    np.testing.assert_allclose(ours, cbam_loop(x, variables), rtol=1e-4, atol=1e-5)


def test_the_statistics_of_cbam_have_the_momentum_of_all_others():
    x = drawn(2, 6, 5, 8)
    cbam = layers.CBAM()
    variables = cbam.init(jax.random.key(0), x, train=False)
    _, updated = cbam.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    (conv,) = updated["intermediates"]["places"]["__call__"]
    running = updated["batch_stats"]["places_norm"]
    np.testing.assert_allclose(running["mean"], [0.1 * conv.mean()], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(running["var"], [0.9 + 0.1 * conv.var()], rtol=1e-4)


def test_each_layer_of_a_dense_block_reads_all_earlier_features():
    x = drawn(2, 6, 6, 5)
    block = layers.DenseBlock(3, 4, 8)
    variables = redrawn(block.init(jax.random.key(0), x, train=False))
    params, stats = variables["params"], variables["batch_stats"]

    def normalised(y, name, params, stats):
        running, learned = stats[name], params[name]
        y = (y - running["mean"]) / np.sqrt(running["var"] + 1e-5)
        return mish_loop(y * learned["scale"] + learned["bias"])[0]

    features = x
    for number in range(3):
        kernels = params[f"makconv_{number}"]
        new = np.concatenate(
            [torch_convolution(features, kernels[n]["kernel"], 1) for n in NAMES], -1
        )
        features = np.concatenate(
            [features, normalised(new, f"norm_{number}", params, stats)], axis=-1
        )
    assert features.shape[-1] == 5 + 3 * 4
    transition = torch_convolution(features, params["transition"]["conv"]["kernel"], 1)
    y = normalised(transition, "norm", params["transition"], stats["transition"])
    theirs = cbam_loop(y, {"params": params["cbam"], "batch_stats": stats["cbam"]})
    ours = block.apply(variables, x, train=False)
    assert ours.shape == (2, 6, 6, 8)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
