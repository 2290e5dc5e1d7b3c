"""Convolutions, written so that each platform computes them fast: the same sums, other programs.

Images are `[B, H, W, C]`, kernels HWIO with odd edges, padded as torch pads: by half the edge on
every side ("SAME" would shift the grid of strided ones). Accelerators get XLA's own convolution.
On CPU the gradients of XLA's convolutions are slow where matrix products would do, most of all
those of 1 x 1 kernels (`benchmarks/speed/makconv.py` times both).

The gradients are written by hand, so forward-mode differentiation (`jax.jvp`) raises a TypeError.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

FEW_CHANNELS = 16  # below, a product for each place in the kernel is too thin to pay


def convolve(x, kernel, strides=1):
    """A convolution.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[rows, columns, C, F]`, of the same dtype, rows and columns odd.
      strides: in both directions.

    Returns:
      `[B, ceil(H / strides), ceil(W / strides), F]`.
    """
    # The way back is traced when a caller's `with jax.default_matmul_precision` has ended.
    return _convolve(x, kernel, strides, jax.config.jax_default_matmul_precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, strides, precision):
    by_xla = functools.partial(_convolve_by_xla, strides=strides)
    if kernel.shape[:2] != (1, 1):
        return by_xla(x, kernel)

    def on_cpu(x, kernel):
        return x[:, ::strides, ::strides] @ kernel[0, 0]

    # Chosen where the program is compiled for, not by the platform that traces it.
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_xla)


def _convolve_by_xla(x, kernel, strides):
    padding = [(edge // 2, edge // 2) for edge in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x, kernel, strides, precision):
    return _convolve(x, kernel, strides, precision), (x, kernel)


def _backward(strides, precision, saved, slope):
    x, kernel = saved
    rows, columns, channels, _ = kernel.shape
    by_xla = functools.partial(_convolve_by_xla, strides=strides)

    def input_by_xla(kernel, slope):
        return jax.linear_transpose(lambda x: by_xla(x, kernel), x)(slope)[0]

    def input_on_cpu(kernel, slope):
        if (rows, columns, strides) == (1, 1, 1):
            return slope @ kernel[0, 0].T
        return input_by_xla(kernel, slope)

    def kernel_by_xla(x, slope):
        return jax.linear_transpose(lambda kernel: by_xla(x, kernel), kernel)(slope)[0]

    def kernel_on_cpu(x, slope):
        """What each place of the kernel saw of the image, times the slopes of what it gave."""
        if channels < FEW_CHANNELS:
            return kernel_by_xla(x, slope)
        height, width = (strides * (edge - 1) + 1 for edge in slope.shape[1:3])
        x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
        slope = slope.reshape(-1, slope.shape[-1])
        products = []
        for row, column in itertools.product(range(rows), range(columns)):
            seen = x[:, row : row + height : strides, column : column + width : strides]
            # In this order: as `[F, C]`, which autodiff would give, XLA transposes both factors.
            products.append(
                jax.lax.dot_general(seen.reshape(-1, channels), slope, (((0,), (0,)), ((), ())))
            )
        return jnp.stack(products).reshape(kernel.shape)

    with jax.default_matmul_precision(precision):
        return (
            jax.lax.platform_dependent(kernel, slope, cpu=input_on_cpu, default=input_by_xla),
            jax.lax.platform_dependent(x, slope, cpu=kernel_on_cpu, default=kernel_by_xla),
        )


_convolve.defvjp(_forward, _backward)


def convolve_by_matmul(x, kernels):
    """Convolutions of one input as one matrix product, whose columns are then shifted and added.

    Known as kn2row (Vasudevan et al., arXiv:1704.04428), here for kernels of several shapes at
    once: the input is read once, and asymmetric kernels cost no more than their own FLOPs. The
    gradients are two matrix products of the same size. In bfloat16 the sum of k x k products is
    rounded more often than in a convolution.

    Args:
      x: `[B, H, W, C]`.
      kernels: `[rows, columns, C, F]` each, with any odd rows and columns and any F.

    Returns:
      `[B, H, W, sum of F]`, in the order of the kernels.
    """
    sizes = tuple(kernel.shape[:2] for kernel in kernels)
    taps = [
        kernel[row, column]
        for kernel, size in zip(kernels, sizes, strict=True)
        for row, column in itertools.product(*map(range, size))
    ]
    products = convolve(x, jnp.concatenate(taps, axis=-1)[None, None])
    return _add_shifted(products, sizes, tuple(kernel.shape[3] for kernel in kernels))


# A function of its own, because layers of equal shape then share what is traced of it.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _add_shifted(products, sizes, features):
    """`[B, H, W, sum of rows * columns * F]` -> `[B, H, W, sum of F]`, a sum for each kernel."""
    widths = [
        count for size, count in zip(sizes, features, strict=True) for _ in range(math.prod(size))
    ]
    parts = iter(jnp.split(products, list(itertools.accumulate(widths))[:-1], axis=-1))
    outputs = []
    for rows, columns in sizes:
        places = itertools.product(range(rows), range(columns))
        shifted = [
            _shift(next(parts), rows // 2 - row, columns // 2 - column) for row, column in places
        ]
        outputs.append(functools.reduce(jnp.add, shifted))
    return jnp.concatenate(outputs, axis=-1)


def _shift(x, down, right):
    """`[B, H, W, C]` moved over the image, with zeros where nothing comes from."""
    edges = ((0, 0, 0), (down, -down, 0), (right, -right, 0), (0, 0, 0))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def fuse(kernels, size):
    """Kernels `[rows, columns, C, F]`, odd and at most `size`, -> `[size, size, C, sum of F]`.

    Each lies in the middle, with zeros around it.
    """
    margins = [tuple((size - edge) // 2 for edge in kernel.shape[:2]) for kernel in kernels]
    padded = [
        jnp.pad(kernel, ((rows, rows), (columns, columns), (0, 0), (0, 0)))
        for kernel, (rows, columns) in zip(kernels, margins, strict=True)
    ]
    return jnp.concatenate(padded, axis=-1)
