"""Convolutions with a fast implementation per platform; the values are the same.

Images are `[B, H, W, C]`, kernels HWIO with odd edges, padded as in torch: by half the edge on
every side ("SAME" would shift the grid of strided ones). Accelerators run XLA's own convolution.
On CPU 3 x 3 convolutions of many channels use Winograd's method (`winograd.py`). The gradients of
the others are matrix products: those of XLA's convolutions are slower, especially of 1 x 1 kernels
(`benchmarks/speed/makconv.py` times both). XLA's convolutions of images of 2 x 2 are over a hundred
times slower than a product (ResNet18's last stage at 64 x 64).

The gradients are written by hand, so forward-mode differentiation (`jax.jvp`) raises a TypeError.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from maknet_jax.models import winograd

Array = TypeVar("Array", np.ndarray, jax.Array)

FEW_CHANNELS = 16  # with fewer, one matrix product per kernel position is slower than XLA
SMALL_EDGE = 2  # pixels; outputs up to this height or width are computed by im2col


def convolve(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
    """A convolution.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[rows, columns, C, F]`, of the same dtype, rows and columns odd.
      strides: in both directions.

    Returns:
      `[B, ceil(H / strides), ceil(W / strides), F]`.
    """
    # The backward pass is traced after a caller's `with jax.default_matmul_precision` has exited.
    return _convolve(x, kernel, strides, jax.config.jax_default_matmul_precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: int, precision: str | None) -> jax.Array:
    by_xla = functools.partial(_convolve_by_xla, strides=strides)
    small = kernel.shape[:2] == (1, 1) or _is_small(x.shape, strides)
    if not small and not winograd.is_faster(x, kernel, strides):
        return by_xla(x, kernel)

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if not small:
            return winograd.convolve(x, kernel)
        return _im2col(x, kernel.shape, strides) @ kernel.reshape(-1, kernel.shape[3])

    # Chosen by the platform for which the program is compiled, not by the one that traces it.
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_xla)


def _is_small(shape: Sequence[int], strides: int) -> bool:
    """True if the output for an input of `shape` is too small for XLA's convolution on CPU."""
    return min(-(-edge // strides) for edge in shape[1:3]) <= SMALL_EDGE


def _pixels_by_position(x: jax.Array, kernel_shape: Sequence[int], strides: int) -> list[jax.Array]:
    """The input of each position in the kernel: `[B, ceil(H / strides), ceil(W / strides), C]`."""
    rows, columns = kernel_shape[:2]
    height, width = ((edge - 1) // strides * strides + 1 for edge in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    return [
        x[:, row : row + height : strides, column : column + width : strides]
        for row, column in itertools.product(range(rows), range(columns))
    ]


def _im2col(x: jax.Array, kernel_shape: Sequence[int], strides: int) -> jax.Array:
    """`_pixels_by_position`, concatenated along the channels."""
    return jnp.concatenate(_pixels_by_position(x, kernel_shape, strides), axis=-1)


def _convolve_by_xla(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    padding = [(edge // 2, edge // 2) for edge in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(
    x: jax.Array, kernel: jax.Array, strides: int, precision: str | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, strides, precision), (x, kernel)


def _backward(
    strides: int,
    precision: str | None,
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    rows, columns, channels, _ = kernel.shape
    by_xla = functools.partial(_convolve_by_xla, strides=strides)
    by_winograd = not _is_small(x.shape, strides) and winograd.is_faster(x, kernel, strides)

    def input_by_xla(kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: by_xla(x, kernel), x)(cotangent)[0]

    def input_on_cpu(kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
        if (rows, columns, strides) == (1, 1, 1):
            return cotangent @ kernel[0, 0].T
        if by_winograd:
            return winograd.gradient_of_input(kernel, cotangent)
        if not _is_small(x.shape, strides):
            return input_by_xla(kernel, cotangent)
        pixels = cotangent @ kernel.reshape(-1, kernel.shape[3]).T
        im2col = functools.partial(_im2col, kernel_shape=kernel.shape, strides=strides)
        return jax.linear_transpose(im2col, x)(pixels)[0]

    def kernel_by_xla(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: by_xla(x, kernel), kernel)(cotangent)[0]

    def kernel_on_cpu(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        """For each position in the kernel, the product of the pixels there and the cotangent."""
        if by_winograd:
            return winograd.gradient_of_kernel(x, cotangent)
        if channels < FEW_CHANNELS:
            return kernel_by_xla(x, cotangent)
        cotangent = cotangent.reshape(-1, cotangent.shape[-1])
        products = []
        for pixels in _pixels_by_position(x, kernel.shape, strides):
            pixels = pixels.reshape(-1, channels)
            # In this order: for `[F, C]`, as in autodiff, XLA would transpose both factors.
            products.append(jax.lax.dot_general(pixels, cotangent, (((0,), (0,)), ((), ()))))
        return jnp.stack(products).reshape(kernel.shape)

    with jax.default_matmul_precision(precision):
        return (
            jax.lax.platform_dependent(kernel, cotangent, cpu=input_on_cpu, default=input_by_xla),
            jax.lax.platform_dependent(x, cotangent, cpu=kernel_on_cpu, default=kernel_by_xla),
        )


_convolve.defvjp(_forward, _backward)


def convolve_by_matmul(x: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
    """Convolutions of one input as one matrix product, whose columns are then shifted and added.

    Known as kn2row (Vasudevan et al., arXiv:1704.04428), here for kernels of several shapes at
    once: the input is read once, and asymmetric kernels need no more than their own FLOPs. The
    gradients are two matrix products of the same size. In bfloat16 the sum of k x k products is
    rounded more often than in a convolution.

    Args:
      x: `[B, H, W, C]`.
      kernels: `[rows, columns, C, F]` each, with any odd rows and columns and any F.

    Returns:
      `[B, H, W, sum of F]`, in the order of the kernels.
    """
    sizes, features = zip(*((kernel.shape[:2], kernel.shape[3]) for kernel in kernels), strict=True)
    return convolve_joined(x, jnp.concatenate(taps(kernels), axis=-1), sizes, features)


def taps(kernels: Sequence[Array]) -> list[Array]:
    """Kernels `[rows, columns, C, F]` each -> the matrices `[C, F]` of all their positions."""
    return [
        kernel[row, column]
        for kernel in kernels
        for row, column in itertools.product(*map(range, kernel.shape[:2]))
    ]


def convolve_joined(
    x: jax.Array,
    joined: jax.Array,
    sizes: Sequence[tuple[int, int]],
    features: Sequence[int],
) -> jax.Array:
    """`convolve_by_matmul` with kernels that are concatenated already.

    Args:
      x: `[B, H, W, C]`.
      joined: `[C, sum of rows * columns * F]`, the concatenated `taps` of the kernels.
      sizes: (rows, columns) of each kernel.
      features: F of each kernel.
    """
    return _add_shifted(convolve(x, joined[None, None]), tuple(sizes), tuple(features))


# Jitted on its own, so that layers of equal shapes share its trace.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _add_shifted(
    products: jax.Array, sizes: Sequence[tuple[int, ...]], features: Sequence[int]
) -> jax.Array:
    """`[B, H, W, sum of rows * columns * F]` -> `[B, H, W, sum of F]`, one sum per kernel."""
    widths = [
        count for size, count in zip(sizes, features, strict=True) for _ in range(math.prod(size))
    ]
    parts = iter(jnp.split(products, list(itertools.accumulate(widths))[:-1], axis=-1))
    outputs = []
    for rows, columns in sizes:
        positions = itertools.product(range(rows), range(columns))
        shifted = [
            _shift(next(parts), rows // 2 - row, columns // 2 - column) for row, column in positions
        ]
        outputs.append(functools.reduce(jnp.add, shifted))
    return jnp.concatenate(outputs, axis=-1)


def _shift(x: jax.Array, down: int, right: int) -> jax.Array:
    """`[B, H, W, C]` shifted within the image and filled with zeros."""
    edges = ((0, 0, 0), (down, -down, 0), (right, -right, 0), (0, 0, 0))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def fuse(kernels: Sequence[jax.Array], size: int) -> jax.Array:
    """Kernels `[rows, columns, C, F]`, odd and at most `size`, -> `[size, size, C, sum of F]`.

    Each is centred and padded with zeros.
    """
    margins = [tuple((size - edge) // 2 for edge in kernel.shape[:2]) for kernel in kernels]
    padded = [
        jnp.pad(kernel, ((rows, rows), (columns, columns), (0, 0), (0, 0)))
        for kernel, (rows, columns) in zip(kernels, margins, strict=True)
    ]
    return jnp.concatenate(padded, axis=-1)
