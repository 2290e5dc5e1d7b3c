"""2 x 2 pooling with stride 2, whose way back is one pass over a quarter of the image.

The gradient of XLA's own pooling is select-and-scatter, which is slow and which deterministic GPU
mode refuses (flax #4233). Here the way there keeps which of the four pixels was the largest, one
byte each, and the way back chooses by it; values and gradients are the same, ties included: the
first of equal pixels gets the slope. Images are `[B, H, W, C]`; the last row and column of odd
sizes are left out. Forward-mode differentiation raises a TypeError.
"""

import functools

import jax
import jax.numpy as jnp


def max_pool(x):
    """The maximum: `[B, H, W, C]` -> `[B, H // 2, W // 2, C]`."""
    return _max_pool(_even(x))


def mix_pool(x, share):
    """`share` * maximum + (1 - `share`) * mean: `[B, H, W, C]` -> `[B, H // 2, W // 2, C]`.

    Computed in float32; `share` is a scalar of the dtype of x.
    """
    return _mix_pool(_even(x), share)


def _even(x):
    return x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]


def _corners(x):
    return [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


def _largest(corners):
    """The maximum of the four and, as uint8, which of them it is."""
    largest, place = corners[0], jnp.zeros(corners[0].shape, jnp.uint8)
    for number, corner in enumerate(corners[1:], 1):
        stays = largest >= corner
        largest = jnp.where(stays, largest, corner)
        place = jnp.where(stays, place, jnp.uint8(number))
    return largest, place


def _spread(place, largest, others):
    """`[B, h, w, C]` each -> `[B, 2h, 2w, C]`: `largest` where `place` says, else `others`."""
    batch, height, width, channels = place.shape
    place, largest, others = (part[:, :, None, :, None] for part in (place, largest, others))
    numbers = jnp.arange(4, dtype=place.dtype).reshape(1, 1, 2, 1, 2, 1)
    spread = jnp.where(place == numbers, largest, others)
    return spread.reshape(batch, 2 * height, 2 * width, channels)


@jax.custom_vjp
def _max_pool(x):
    return _largest(_corners(x))[0]


def _max_pool_forward(x):
    return _largest(_corners(x))


def _max_pool_backward(place, slope):
    return (_spread(place, slope, jnp.zeros_like(slope)),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def _mix_pool(x, share):
    return _mix_pool_forward(x, share)[0]


def _mix_pool_forward(x, share):
    corners = _corners(x)
    largest, place = _largest(corners)
    mean = functools.reduce(jnp.add, [corner.astype(jnp.float32) for corner in corners]) / 4
    above = largest.astype(jnp.float32) - mean
    mixed = mean + share.astype(jnp.float32) * above
    return mixed.astype(x.dtype), (place, above.astype(x.dtype), share)


def _mix_pool_backward(saved, slope):
    place, above, share = saved
    others = slope * ((1 - share) / 4)
    steep = (slope.astype(jnp.float32) * above.astype(jnp.float32)).sum()
    return _spread(place, slope * share + others, others), steep.astype(share.dtype)


_mix_pool.defvjp(_mix_pool_forward, _mix_pool_backward)
