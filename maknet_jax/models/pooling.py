"""Pooling with a cheap backward pass: 2 x 2 with stride 2, and maxima over whole axes.

The gradient of XLA's own pooling is select-and-scatter, which is slow and is rejected by the
deterministic GPU mode (flax #4233). Here the backward pass needs neither the image nor a scatter:
the forward pass saves the index of the largest of the four pixels, one byte per window (mixed
pooling also saves its difference from the mean), and the backward pass selects by it. Values are
equal to XLA's, NaN included. Gradients are also equal: the first of equal pixels gets the gradient.
The only exception is a window with a NaN: here the NaN gets the gradient, in XLA another pixel.
Images are `[B, H, W, C]`; the last row and column of odd sizes are dropped. Forward-mode
differentiation raises a TypeError.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum: `[B, H, W, C]` -> `[B, H // 2, W // 2, C]`."""
    return _max_pool(_even(x))


def mix_pool(x: jax.Array, share: jax.Array) -> jax.Array:
    """`share` * maximum + (1 - `share`) * mean, computed in float32 in both passes.

    Args:
      x: `[B, H, W, C]`.
      share: a scalar.

    Returns:
      `[B, H // 2, W // 2, C]`, in the dtype of x.
    """
    return _mix_pool(_even(x), share)


def _even(x: jax.Array) -> jax.Array:
    return x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]


def _corners(x: jax.Array) -> list[jax.Array]:
    return [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


def _largest(corners: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The maximum of the four and its index among them, uint8."""
    largest, index = corners[0], jnp.zeros(corners[0].shape, jnp.uint8)
    for number, corner in enumerate(corners[1:], 1):
        unchanged = (largest >= corner) | jnp.isnan(largest)
        largest = jnp.where(unchanged, largest, corner)
        index = jnp.where(unchanged, index, jnp.uint8(number))
    return largest, index


def _spread(index: jax.Array, largest: jax.Array, others: jax.Array) -> jax.Array:
    """`[B, h, w, C]` each -> `[B, 2h, 2w, C]`: `largest` at a window's `index`, else `others`."""
    batch, height, width, channels = index.shape
    index, largest, others = (part[:, :, None, :, None] for part in (index, largest, others))
    numbers = jnp.arange(4, dtype=index.dtype).reshape(1, 1, 2, 1, 2, 1)
    spread = jnp.where(index == numbers, largest, others)
    return spread.reshape(batch, 2 * height, 2 * width, channels)


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    return _largest(_corners(x))[0]


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _largest(_corners(x))


def _max_pool_backward(index: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (_spread(index, cotangent, jnp.zeros_like(cotangent)),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)

_Residuals = tuple[jax.Array, jax.Array, jax.Array]  # index, largest - mean, share


@jax.custom_vjp
def _mix_pool(x: jax.Array, share: jax.Array) -> jax.Array:
    return _mix_pool_forward(x, share)[0]


def _mix_pool_forward(x: jax.Array, share: jax.Array) -> tuple[jax.Array, _Residuals]:
    corners = _corners(x)
    largest, index = _largest(corners)
    mean = functools.reduce(jnp.add, [corner.astype(jnp.float32) for corner in corners]) / 4
    largest, part = largest.astype(jnp.float32), share.astype(jnp.float32)
    mixed = part * largest + (1 - part) * mean
    return mixed.astype(x.dtype), (index, (largest - mean).astype(x.dtype), share)


def _mix_pool_backward(residuals: _Residuals, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    index, above, share = residuals
    dtype, part = cotangent.dtype, share.astype(jnp.float32)
    cotangent = cotangent.astype(jnp.float32)
    others = cotangent * ((1 - part) / 4)
    largest = (cotangent * part + others).astype(dtype)
    of_share = (cotangent * above.astype(jnp.float32)).sum().astype(share.dtype)
    return _spread(index, largest, others.astype(dtype)), of_share


_mix_pool.defvjp(_mix_pool_forward, _mix_pool_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def maximum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """`x.max(axes)`, which saves no mask of the size of x for the backward pass.

    JAX's own maximum saves where x has it, in the dtype of x. The gradients are equal: those of
    equal maxima share the cotangent. The only exception is more than 256 equal maxima in bfloat16,
    which JAX counts in bfloat16 and too low; here they are counted in float32.

    Args:
      x: any shape.
      axes: the axes to reduce, which the result lacks.
    """
    return x.max(axes)


def _maximum_forward(
    x: jax.Array, axes: Sequence[int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest = x.max(axes)
    return largest, (x, largest)


def _maximum_backward(
    axes: Sequence[int], residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array]:
    x, largest = residuals
    is_largest = (x == jnp.expand_dims(largest, axes)).astype(x.dtype)
    return (is_largest * jnp.expand_dims(cotangent / is_largest.sum(axes), axes),)


maximum.defvjp(_maximum_forward, _maximum_backward)
