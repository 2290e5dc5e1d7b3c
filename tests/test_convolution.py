"""Convolutions and their gradients, compared with those of XLA and with loops in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import drawn

from maknet_jax.models import convolution


def xla(x, kernel, strides):
    """The convolution whose gradients are XLA's too."""
    padding = [(edge // 2, edge // 2) for edge in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def kernel_gradient_loop(x, cotangent, shape, strides):
    """Each weight's pixels times their cotangents, in float64, pixel by pixel."""
    rows, columns = shape[:2]
    padded = np.pad(np.float64(x), ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    gradient = np.zeros(shape)
    for row, column in itertools.product(range(rows), range(columns)):
        for i, j in itertools.product(*map(range, cotangent.shape[1:3])):
            pixel = padded[:, i * strides + row, j * strides + column]
            gradient[row, column] += np.einsum("bx,by->xy", pixel, np.float64(cotangent[:, i, j]))
    return gradient


# On CPU the kernel's gradient is XLA's below 16 channels, and matrix products from there on.
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (5, 1), (7, 7)])
@pytest.mark.parametrize("channels, strides", [(3, 1), (3, 2), (16, 1), (17, 2), (16, 3)])
def test_value_and_gradients_are_those_of_xla(size, channels, strides):
    x, kernel = drawn(2, 9, 8, channels), drawn(*size, channels, 5, seed=1)
    ours, pull = jax.vjp(functools.partial(convolution.convolve, strides=strides), x, kernel)
    expected, expected_pull = jax.vjp(lambda *both: xla(*both, strides), x, kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    cotangent = drawn(*ours.shape, seed=2)
    for a, b in zip(pull(cotangent), expected_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    by_hand = kernel_gradient_loop(x, cotangent, kernel.shape, strides)
    np.testing.assert_allclose(pull(cotangent)[1], by_hand, rtol=1e-4, atol=1e-4)


# Up to outputs of 2 x 2 the CPU program is im2col; 4 x 3 with a stride of 2 is the largest here.
@pytest.mark.parametrize("size", [(3, 3), (1, 3), (7, 7)])
@pytest.mark.parametrize(
    "shape, strides", [((2, 2, 2, 16), 1), ((2, 4, 3, 17), 2), ((2, 1, 5, 3), 2)]
)
def test_small_images(shape, strides, size):
    x, kernel = drawn(*shape), drawn(*size, shape[-1], 5, seed=1)
    ours, pull = jax.vjp(functools.partial(convolution.convolve, strides=strides), x, kernel)
    expected, expected_pull = jax.vjp(lambda *both: xla(*both, strides), x, kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    cotangent = drawn(*ours.shape, seed=2)
    for a, b in zip(pull(cotangent), expected_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    compiled = jax.jit(convolution.convolve, static_argnums=2).lower(x, kernel, strides).compile()
    assert " convolution(" not in compiled.as_text()


@pytest.mark.parametrize("shape", [(2, 1, 2, 16), (1, 3, 2, 3), (0, 4, 4, 16)])
def test_kernels_may_be_larger_than_images_and_batches_empty(shape):
    x, kernel = drawn(*shape), drawn(7, 7, shape[-1], 4, seed=1)
    for convolve in (convolution.convolve, lambda x, k: convolution.convolve_by_matmul(x, [k])):
        ours, pull = jax.vjp(convolve, x, kernel)
        expected, expected_pull = jax.vjp(lambda *both: xla(*both, 1), x, kernel)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(pull(ours), expected_pull(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "size, strides, channels",
    [((3, 3), 1, 16), ((3, 3), 1, 64), ((3, 3), 2, 16), ((1, 1), 1, 16), ((1, 1), 2, 16)],
)
def test_second_order_and_batched_gradients(size, strides, channels):
    x, kernels = drawn(3, 8, 6, 6, channels), drawn(3, *size, channels, channels, seed=1)

    def penalty(convolve, kernel, x):
        gradient = jax.grad(lambda x: (convolve(x, kernel, strides) ** 2).sum())(x)
        return (gradient**2).sum()

    for axes, kernel in ((None, kernels[0]), (0, kernels)):
        gradients = [
            jax.jit(jax.vmap(jax.grad(functools.partial(penalty, convolve)), (axes, 0)))(kernel, x)
            for convolve in (convolution.convolve, xla)
        ]
        np.testing.assert_allclose(
            *gradients, rtol=1e-3, atol=1e-3 * float(jnp.abs(gradients[1]).max())
        )


@pytest.mark.parametrize("shape", [(4, 9, 8, 64), (8, 3, 7, 48)])
def test_winograd(shape):
    """With many channels; sums of 96 features are as far from float64 as those of XLA."""
    x, kernel = drawn(*shape), drawn(3, 3, shape[-1], 96, seed=1)
    cotangent = drawn(*shape[:-1], 96, seed=2)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(convolve, x, kernel, cotangent):
        value, pull = jax.vjp(lambda *both: convolve(*both, 1), x, kernel)
        return value, *pull(cotangent)

    ours = value_and_gradients(convolution.convolve, x, kernel, cotangent)
    for a, b in zip(ours, value_and_gradients(xla, x, kernel, cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    by_hand = kernel_gradient_loop(x, cotangent, kernel.shape, 1)
    np.testing.assert_allclose(ours[2], by_hand, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, strides", [(jnp.bfloat16, 1), (jnp.float32, 2)])
def test_winograd_is_for_float32_without_strides(dtype, strides):
    x, kernel = (jnp.zeros(shape, dtype) for shape in ((4, 8, 8, 64), (3, 3, 64, 64)))
    text = jax.jit(convolution.convolve, static_argnums=2).lower(x, kernel, strides).as_text()
    assert "stablehlo.convolution" in text and "stablehlo.dot_general" not in text


# Products on CPU: of the value (not of 3 x 3 kernels with few channels), of the image's gradient,
# of the kernel's.
@pytest.mark.parametrize(
    "size, features, products",
    [((3, 3), 8, 0 + 0 + 9), ((3, 3), 64, 16 + 16 + 16), ((1, 1), 8, 1 + 1 + 1)],
)
def test_the_target_platform_decides_the_program(size, features, products):
    """A host without accelerator lowers for TPU as a TPU would (`benchmarks/speed/aot.py`)."""
    x, kernel = drawn(4, 8, 8, 64), drawn(*size, 64, features, seed=1)

    def program(x, kernel):
        return jax.value_and_grad(lambda *both: (convolution.convolve(*both) ** 2).sum(), (0, 1))(
            x, kernel
        )

    traced = jax.jit(program).trace(x, kernel)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    count = {platform: text.count("stablehlo.dot_general") for platform, text in texts.items()}
    assert count == {"cpu": products, "tpu": 0, "cuda": 0}
    assert all(texts[each].count("stablehlo.convolution") == 3 for each in ("tpu", "cuda"))


@pytest.mark.parametrize("size", [(3, 3), (1, 1)])
@pytest.mark.parametrize("convolve", ["convolve", "convolve_by_matmul"])
def test_the_backward_pass_has_the_precision_of_the_call(size, convolve):
    """Attributions ask for full float32 products in a `with` around the forward call."""
    x, kernel = drawn(2, 8, 8, 16), drawn(*size, 16, 8, seed=1)

    def value(x, kernel):
        with jax.default_matmul_precision("highest"):
            if convolve == "convolve":
                return (convolution.convolve(x, kernel) ** 2).sum()
            return (convolution.convolve_by_matmul(x, [kernel]) ** 2).sum()

    traced = jax.jit(jax.grad(value, (0, 1))).trace(x, kernel)
    for platform in ("cpu", "tpu"):
        lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        kinds = ("stablehlo.dot_general", "stablehlo.convolution")
        products = [line for line in lines if any(kind in line for kind in kinds)]
        assert len(products) >= 3
        assert all("HIGHEST" in line and "DEFAULT" not in line for line in products)


def test_convolve_by_matmul_concatenates_the_convolutions():
    x = drawn(2, 7, 6, 5)
    shapes = [((3, 3), 4), ((1, 5), 2), ((1, 1), 3), ((7, 1), 1)]
    kernels = [drawn(*size, 5, count, seed=n) for n, (size, count) in enumerate(shapes)]
    ours, pull = jax.vjp(convolution.convolve_by_matmul, x, kernels)
    apart, pull_apart = jax.vjp(
        lambda x, kernels: jnp.concatenate([xla(x, k, 1) for k in kernels], axis=-1), x, kernels
    )
    np.testing.assert_allclose(ours, apart, rtol=1e-4, atol=1e-4)
    cotangent = drawn(*ours.shape, seed=9)
    for a, b in zip(
        jax.tree.leaves(pull(cotangent)), jax.tree.leaves(pull_apart(cotangent)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
