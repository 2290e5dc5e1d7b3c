"""2 x 2 pooling with stride 2 whose backward pass needs neither the image nor a scatter.

The gradient of XLA's own pooling is select-and-scatter, which is slow and which deterministic GPU
mode refuses (flax #4233). Here the forward pass keeps which of the four pixels was the largest, a
byte a window (mixed pooling also how far it lay above the mean), and the backward pass chooses by
it. Values are the same, NaN included. So are gradients, ties included: of equal pixels the first
gets it; but a NaN gets that of its window itself, which XLA gives to another pixel. Images are
`[B, H, W, C]`; the last row and column of odd sizes are left out. Forward-mode differentiation
raises a TypeError.
"""

import functools

import jax
import jax.numpy as jnp


def max_pool(x):
    """The maximum: `[B, H, W, C]` -> `[B, H // 2, W // 2, C]`."""
    return _max_pool(_even(x))


def mix_pool(x, share):
    """`share` * maximum + (1 - `share`) * mean: `[B, H, W, C]` -> `[B, H // 2, W // 2, C]`.

    Computed in float32, both ways; `share` is a scalar, the result has the dtype of x.
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
        stays = (largest >= corner) | jnp.isnan(largest)
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
    largest, part = largest.astype(jnp.float32), share.astype(jnp.float32)
    mixed = part * largest + (1 - part) * mean
    return mixed.astype(x.dtype), (place, (largest - mean).astype(x.dtype), share)


def _mix_pool_backward(saved, slope):
    place, above, share = saved
    wide, part = slope.astype(jnp.float32), share.astype(jnp.float32)
    others = wide * ((1 - part) / 4)
    largest = (wide * part + others).astype(slope.dtype)
    of_share = (wide * above.astype(jnp.float32)).sum().astype(share.dtype)
    return _spread(place, largest, others.astype(slope.dtype)), of_share


_mix_pool.defvjp(_mix_pool_forward, _mix_pool_backward)
