"""Convolutions, written so that each platform computes them fast: the same sums, other programs.

Images are `[B, H, W, C]`, kernels HWIO with odd edges, padded as torch pads: by half the edge on
every side ("SAME" would shift the grid of strided ones). Accelerators get XLA's own convolution.
XLA's for CPU is slow where matrix products would do: a 1 x 1 kernel's gradient takes up to ten
times as long, a 3 x 3 kernel's two to three times (`benchmarks/makconv.py`).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

FEW_CHANNELS = 16  # below, a product for each place in the kernel is too thin to pay


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x, kernel, strides=1):
    """A convolution.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[rows, columns, C, F]`.
      strides: in both directions.

    Returns:
      `[B, ceil(H / strides), ceil(W / strides), F]`.
    """
    by_xla = functools.partial(_convolve, strides=strides)
    if kernel.shape[:2] != (1, 1):
        return by_xla(x, kernel)

    def on_cpu(x, kernel):
        return x[:, ::strides, ::strides] @ kernel[0, 0]

    # Chosen where the program is compiled for, not by the platform that traces it.
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_xla)


def _convolve(x, kernel, strides):
    padding = [(edge // 2, edge // 2) for edge in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_forward(x, kernel, strides):
    return convolve(x, kernel, strides), (x, kernel)


def _convolve_backward(strides, saved, slope):
    x, kernel = saved
    convolution = functools.partial(_convolve, strides=strides)
    rows, columns, channels, _ = kernel.shape

    def input_by_xla(kernel, slope):
        return jax.linear_transpose(lambda x: convolution(x, kernel), x)(slope)[0]

    def kernel_by_xla(x, slope):
        return jax.linear_transpose(lambda kernel: convolution(x, kernel), kernel)(slope)[0]

    def kernel_on_cpu(x, slope):
        """What each place of the kernel saw of the image, times the slopes of what it gave."""
        height, width = (strides * (edge - 1) + 1 for edge in slope.shape[1:3])
        x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
        products = [
            _sum_of_products(
                x[:, row : row + height : strides, column : column + width : strides], slope
            )
            for row, column in itertools.product(range(rows), range(columns))
        ]
        return jnp.stack(products).reshape(kernel.shape)

    to_input = input_by_xla(kernel, slope)
    if channels < FEW_CHANNELS:
        return to_input, kernel_by_xla(x, slope)
    to_kernel = jax.lax.platform_dependent(x, slope, cpu=kernel_on_cpu, default=kernel_by_xla)
    return to_input, to_kernel


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.custom_vjp
def _multiply(x, matrix):
    """`[B, H, W, C]`, `[C, F]` -> `[B, H, W, F]`, with its gradients in the order XLA likes."""
    return x @ matrix


def _multiply_backward(saved, slope):
    x, matrix = saved
    return slope @ matrix.T, _sum_of_products(x, slope)


_multiply.defvjp(lambda x, matrix: (_multiply(x, matrix), (x, matrix)), _multiply_backward)


def _sum_of_products(a, b):
    """`[B, H, W, X]`, `[B, H, W, Y]` -> `[X, Y]`; the other way round XLA would transpose both."""
    a, b = (array.reshape(-1, array.shape[-1]) for array in (a, b))
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def convolve_by_matmul(x, kernels):
    """Convolutions of one input as one matrix product, whose columns are then shifted and added.

    Known as kn2row (Vasudevan et al., arXiv:1704.04428), here for kernels of several shapes at
    once: the input is read once, and asymmetric kernels cost no more than their own FLOPs. The
    gradients are two matrix products of the same size.

    Args:
      x: `[B, H, W, C]`.
      kernels: `[rows, columns, C, F]` each, with any rows, columns and F.

    Returns:
      `[B, H, W, sum of F]`, in the order of the kernels.
    """
    taps = [
        (kernel[row, column], kernel.shape[0] // 2 - row, kernel.shape[1] // 2 - column)
        for kernel in kernels
        for row, column in itertools.product(*map(range, kernel.shape[:2]))
    ]
    matrix = jnp.concatenate([matrix for matrix, _, _ in taps], axis=-1)
    ends = itertools.accumulate(matrix.shape[1] for matrix, _, _ in taps)
    products = jnp.split(_multiply(x, matrix), list(ends)[:-1], axis=-1)
    shifted = (
        _shift(product, down, right)
        for product, (_, down, right) in zip(products, taps, strict=True)
    )
    counts = (math.prod(kernel.shape[:2]) for kernel in kernels)
    outputs = [functools.reduce(jnp.add, itertools.islice(shifted, count)) for count in counts]
    return jnp.concatenate(outputs, axis=-1)


def _shift(x, down, right):
    """`[B, H, W, C]` moved over the image, with zeros where nothing comes from."""
    edges = ((0, 0, 0), (down, -down, 0), (right, -right, 0), (0, 0, 0))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def fuse(kernels, size):
    """Kernels of several shapes as one of `size` x `size` over all their outputs, padded with 0."""
    margins = [tuple((size - edge) // 2 for edge in kernel.shape[:2]) for kernel in kernels]
    padded = [
        jnp.pad(kernel, ((rows, rows), (columns, columns), (0, 0), (0, 0)))
        for kernel, (rows, columns) in zip(kernels, margins, strict=True)
    ]
    return jnp.concatenate(padded, axis=-1)
