"""3 x 3 convolutions by Winograd's minimal filtering, for CPUs (Lavin and Gray, arXiv:1509.09308).

F(2 x 2, 3 x 3): every 2 x 2 outputs are computed from a tile of 4 x 4 inputs with 16 products per
pair of channels instead of 36. Each of the 16 is a matrix product over all tiles. The transforms
only add, subtract and halve, so the rounding error is that of a direct convolution; the larger
tiles of F(4 x 4, 3 x 3) would lose a digit. Images are `[B, H, W, C]`, padded by one on every
side, kernels `[3, 3, C, F]`, strides 1.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

Grid = Sequence[Sequence[jax.Array]]
LEAST_SAVING = 32  # C F / (C + F), see `is_faster`
LEAST_TILES = 64


def is_faster(x: jax.Array, kernel: jax.Array, strides: int) -> bool:
    """True if the transforms take less time than the products that they save.

    The transforms of images grow with C + F and the products with C F; that of the kernel does not
    depend on the number of tiles. In other dtypes than float32 the sums of the transforms would be
    rounded too coarsely.
    """
    *size, channels, features = kernel.shape
    saving = channels * features / max(1, channels + features)
    images = x.shape[0] if isinstance(x.shape[0], int) else 1  # may be symbolic
    tiles = images * math.prod(-(-edge // 2) for edge in x.shape[1:3])
    fits = (*size, strides) == (3, 3, 1) and x.dtype == jnp.float32
    return fits and saving >= LEAST_SAVING and tiles >= LEAST_TILES


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, H, W, C]`, `[3, 3, C, F]` -> `[B, H, W, F]`."""
    return _convolve(x, _on_both_axes(_of_kernel, kernel), over_features=0)


def gradient_of_input(kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """`[3, 3, C, F]`, `[B, H, W, F]` -> `[B, H, W, C]`: a convolution with the kernel turned.

    Turned by 180 degrees, the transformed kernel has its first and last rows and columns swapped.
    """
    weights = _on_both_axes(_of_kernel, kernel)
    turned = [[weights[row][column] for column in (3, 1, 2, 0)] for row in (3, 1, 2, 0)]
    return _convolve(cotangent, turned, over_features=1)


def _convolve(x: jax.Array, weights: Grid, over_features: int) -> jax.Array:
    """A convolution with a transformed kernel, whose axis `over_features` is summed over."""
    contract = (((3,), (over_features,)), ((), ()))
    products = [
        [jax.lax.dot_general(tile, weight, contract) for tile, weight in zip(*rows, strict=True)]
        for rows in zip(_input_tiles(x), weights, strict=True)
    ]
    corners = _on_both_axes(_to_output, products)
    batch, height, width, features = corners[0][0].shape
    # [B, h, w, F] at each row and column within the 2 x 2 outputs -> [B, h, 2, w, 2, F].
    outputs = jnp.stack([jnp.stack(row, axis=3) for row in corners], axis=2)
    outputs = outputs.reshape(batch, 2 * height, 2 * width, features)
    return outputs[:, : x.shape[1], : x.shape[2]]


def gradient_of_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """`[B, H, W, C]`, `[B, H, W, F]` -> `[3, 3, C, F]`."""
    odd = [(0, edge % 2) for edge in cotangent.shape[1:3]]
    cotangent = jnp.pad(cotangent, ((0, 0), *odd, (0, 0)))
    corners = [[cotangent[:, row::2, column::2] for column in (0, 1)] for row in (0, 1)]
    products = [
        [_sum_over_pixels(tile, spread) for tile, spread in zip(*rows, strict=True)]
        for rows in zip(_input_tiles(x), _on_both_axes(_from_output, corners), strict=True)
    ]
    return jnp.stack([jnp.stack(row) for row in _on_both_axes(_to_kernel, products)])


def _sum_over_pixels(tile: jax.Array, spread: jax.Array) -> jax.Array:
    """`[B, h, w, C]`, `[B, h, w, F]` -> `[C, F]`."""
    tile, spread = (each.reshape(-1, each.shape[-1]) for each in (tile, spread))
    return jax.lax.dot_general(tile, spread, (((0,), (0,)), ((), ())))


def _input_tiles(x: jax.Array) -> Grid:
    """The transformed tiles at each of 4 x 4 positions: `[B, ceil(H / 2), ceil(W / 2), C]`."""
    height, width = (-(-edge // 2) * 2 for edge in x.shape[1:3])
    edges = [(1, 1 + even - edge) for even, edge in zip((height, width), x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    tiles = [
        [x[:, row : row + height : 2, column : column + width : 2] for column in range(4)]
        for row in range(4)
    ]
    return _on_both_axes(_of_input, tiles)


def _on_both_axes(
    transform: Callable[..., list[jax.Array]], grid: Iterable[Iterable[jax.Array]]
) -> Grid:
    """Applies a transform of a sequence to the columns of a grid, then to its rows."""
    columns = [transform(*column) for column in zip(*grid, strict=True)]
    return [transform(*row) for row in zip(*columns, strict=True)]


def _of_input(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> list[jax.Array]:
    return [a - c, b + c, c - b, b - d]


def _of_kernel(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _to_output(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> list[jax.Array]:
    return [a + b + c, b - c - d]


def _from_output(a: jax.Array, b: jax.Array) -> list[jax.Array]:
    """The transpose of `_to_output`."""
    return [a, a + b, a - b, -b]


def _to_kernel(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> list[jax.Array]:
    """The transpose of `_of_kernel`."""
    return [a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d]
