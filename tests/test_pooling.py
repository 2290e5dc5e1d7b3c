"""2 x 2 pooling and its gradients, compared with those of XLA and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import drawn
from flax import linen as nn

from maknet_jax.models import layers, pooling

SHAPES = [(2, 6, 8, 3), (1, 7, 5, 2), (3, 2, 3, 1), (0, 4, 4, 2)]


def tied(*shape):
    """Few values, so that many windows hold their maximum more than once."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), jnp.float32)


def windows(x):
    """`[B, H // 2, W // 2, 4, C]`: the four pixels of every 2 x 2 window."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return np.stack([x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)], axis=3)


def maximum_by_xla(x):
    step = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, step, step, "VALID")


def mixed_by_xla(x, share):
    return share * maximum_by_xla(x) + (1 - share) * nn.avg_pool(x, (2, 2), (2, 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [drawn, tied])
def test_max_pool_and_its_gradient_are_those_of_xla(values, shape):
    x = values(*shape)
    ours, pull_ours = jax.vjp(pooling.max_pool, x)
    expected, pull_theirs = jax.vjp(maximum_by_xla, x)
    np.testing.assert_array_equal(ours, windows(np.asarray(x)).max(axis=3))
    np.testing.assert_array_equal(ours, expected)
    cotangent = drawn(*ours.shape, seed=1)
    np.testing.assert_array_equal(pull_ours(cotangent)[0], pull_theirs(cotangent)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [drawn, tied])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mix_pool_and_its_gradients_are_those_of_xla(share, values, shape):
    x, share = values(*shape), jnp.float32(share)
    ours, pull_ours = jax.vjp(pooling.mix_pool, x, share)
    expected, pull_theirs = jax.vjp(mixed_by_xla, x, share)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    cotangent = drawn(*ours.shape, seed=1)
    for a, b in zip(pull_ours(cotangent), pull_theirs(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_mix_pool_in_bfloat16_is_rounded_once():
    x, share = drawn(2, 6, 8, 3).astype(jnp.bfloat16), jnp.bfloat16(0.3)
    ours, pull = jax.vjp(pooling.mix_pool, x, share)
    whole = pooling.mix_pool(x.astype(jnp.float32), share.astype(jnp.float32))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, whole.astype(jnp.bfloat16))
    cotangent = drawn(*ours.shape, seed=1).astype(jnp.bfloat16)
    gradients = pull(cotangent)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
    _, pull_whole = jax.vjp(pooling.mix_pool, x.astype(jnp.float32), share.astype(jnp.float32))
    of_x, of_share = pull_whole(cotangent.astype(jnp.float32))
    np.testing.assert_array_equal(gradients[0], of_x.astype(jnp.bfloat16))
    np.testing.assert_allclose(gradients[1], of_share, rtol=0.02)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass_through_as_in_xla(value, place):
    """Training stops at a loss that is not finite: pooling must not hide a NaN."""
    pixels = np.float32([1, 2, 3, 4])
    pixels[place] = value
    x = jnp.asarray(pixels.reshape(1, 2, 2, 1))
    np.testing.assert_array_equal(pooling.max_pool(x), maximum_by_xla(x))
    gradient = jax.grad(lambda x: pooling.max_pool(x).sum())(x)
    largest = place if np.isnan(value) else np.argmax(pixels)
    np.testing.assert_array_equal(gradient.ravel(), np.arange(4) == largest)
    share = jnp.float32(0.5)
    np.testing.assert_array_equal(pooling.mix_pool(x, share), mixed_by_xla(x, share))


def test_second_order_and_batched_gradients():
    """The backward pass is linear in its cotangent, so a penalty on gradients has gradients too."""
    x, weights = drawn(3, 2, 6, 6, 4), drawn(3, 2, 3, 3, 4, seed=1)
    shares = jnp.asarray([0.2, 0.5, 0.9])

    def penalty(pool, weights, share, x):
        gradient = jax.grad(lambda x: (weights * pool(x, share) ** 2).sum())(x)
        return (gradient**2).sum()

    for argument in (1, 2, 3):
        gradients = [
            jax.vmap(jax.grad(penalty, argument), (None, 0, 0, 0))(pool, weights, shares, x)
            for pool in (pooling.mix_pool, mixed_by_xla)
        ]
        np.testing.assert_allclose(*gradients, rtol=1e-3, atol=1e-3)


def test_the_backward_pass_has_no_scatter_and_small_residuals():
    """Deterministic GPU mode rejects a scatter; training stores the residuals of every layer."""
    x, share = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jnp.float32(0.5)
    window = (2, 4, 4, 4)
    for pool, expected in (
        (pooling.max_pool, [(window, "uint8")]),
        (
            lambda x: pooling.mix_pool(x, share),
            [((), "float32"), (window, "float32"), (window, "uint8")],
        ),
    ):
        text = jax.jit(jax.grad(lambda x, pool=pool: pool(x).sum())).lower(x).as_text()
        assert "scatter" not in text
        residuals = jax.tree.leaves(jax.eval_shape(lambda x, pool=pool: jax.vjp(pool, x)[1], x))
        assert sorted((leaf.shape, leaf.dtype.name) for leaf in residuals) == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixpool_mixes_maximum_and_mean(share):
    x = drawn(2, 6, 7, 3)
    pool = layers.MixPool()
    assert float(pool.init(jax.random.key(0), x)["params"]["share"]) == 0.5
    ours = pool.apply({"params": {"share": jnp.float32(share)}}, x)
    parts = windows(np.float64(x))
    theirs = share * parts.max(axis=3) + (1 - share) * parts.mean(axis=3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_mixpool_in_bfloat16_does_not_round_its_share():
    x, share = jnp.asarray(drawn(2, 6, 8, 3), jnp.bfloat16), 0.5005  # bfloat16 has 0.5 and 0.504
    ours = layers.MixPool().apply({"params": {"share": jnp.float32(share)}}, x)
    whole = pooling.mix_pool(x.astype(jnp.float32), jnp.float32(share))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, whole.astype(jnp.bfloat16))


def test_mixpool_that_is_not_learned_has_no_parameter():
    x = drawn(1, 4, 4, 2)
    pool = layers.MixPool(learned=False)
    assert not pool.init(jax.random.key(0), x)
    halves = layers.MixPool().apply({"params": {"share": jnp.float32(0.5)}}, x)
    np.testing.assert_array_equal(pool.apply({}, x), halves)


@pytest.mark.parametrize("axes", [(1, 2), (-1,)])
@pytest.mark.parametrize("values", [drawn, tied])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_maximum_and_its_gradient_are_those_of_jax(values, axes, dtype):
    x = values(2, 6, 5, 3).astype(dtype)
    ours, pull_ours = jax.vjp(lambda x: pooling.maximum(x, axes), x)
    expected, pull_theirs = jax.vjp(lambda x: x.max(axes), x)
    np.testing.assert_array_equal(ours, expected)
    cotangent = drawn(*ours.shape, seed=1).astype(dtype)
    np.testing.assert_array_equal(pull_ours(cotangent)[0], pull_theirs(cotangent)[0])


def test_many_equal_maxima_in_bfloat16_share_the_whole_cotangent():
    x = jnp.zeros((1, 64, 64, 2), jnp.bfloat16)
    gradient = jax.grad(lambda x: pooling.maximum(x, (1, 2)).sum())(x)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 1 / 64**2)


def test_the_maximum_saves_no_mask():
    """x itself is saved by its other readers too; a mask would be a second array of its size."""
    x = drawn(2, 6, 5, 3)
    saved = jax.tree.leaves(jax.vjp(lambda x: pooling.maximum(x, (1, 2)), x)[1])
    large, small = sorted(saved, key=jnp.size, reverse=True)
    assert small.shape == (2, 3)
    np.testing.assert_array_equal(large, x)
