"""Patches around lesions, cropped like LesaNet's (Yan et al. 2019, section 4.1, and its code)."""

import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from maknet_jax.ct import png, preprocess, reading, units
from maknet_jax.errors import Rejected

SIZE = 120  # edge of a patch: pixels, each 1 mm wide
SLICE_DISTANCE = 2.0  # mm between the three slices
# Stored in dataset.json: prepared data sets hold this text.
RULE = "1 mm a pixel, three slices at 2 mm, around the lesion's centre, borders repeated"


def three_slices(read: Callable[[int], np.ndarray], interval: float) -> list[np.ndarray]:
    """The slice of a lesion and the slices 2 mm before and after it, linearly interpolated.

    Args:
      read: read(offset) -> int16 `[H, W]` in HU, the slice at this offset from the middle one, or
        the nearest available one.
      interval: mm between slices; if unknown (nan, or not above 0) the slice is repeated.

    Returns:
      Three float32 `[H, W]` in HU, padding replaced by air.

    Raises:
      Rejected: the slices differ in size.
    """

    def plane(offset: int) -> np.ndarray:
        return preprocess.clean(read(offset)).astype(np.float32)

    middle = plane(0)
    if not interval > 0:
        return [middle] * 3
    steps = SLICE_DISTANCE / interval
    whole, share = math.floor(steps), steps % 1
    outer = []
    for sign in (-1, 1):
        planes = (
            [plane(sign * whole), plane(sign * (whole + 1))] if share else [plane(sign * whole)]
        )
        if any(one.shape != middle.shape for one in planes):
            raise Rejected(
                "the neighbouring slices differ in size: expected equal rows and columns"
            )
        outer.append((1 - share) * planes[0] + share * planes[-1])
    return [outer[0], middle, outer[1]]


def make_patch(
    slices: Sequence[np.ndarray],
    box: Sequence[float],
    spacing: Sequence[float],
    size: int = SIZE,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """A patch around a lesion at 1 mm per pixel.

    LesaNet repeats the border on one side of each axis only and clips the box at 0 only; here both
    sides are treated the same way.

    Args:
      slices: three `[H, W]` in HU.
      box: (x0, y0, x1, y1) in pixels of the slice, counted from 0.
      spacing: (x, y, ...) in mm.
      size: edge of the patch in mm.

    Returns:
      (image, box): int16 `[size, size, 3]` in HU, and the lesion's box (x0, y0, x1, y1) in pixels
      of the patch.

    Raises:
      Rejected: the box or the spacing is invalid.
    """
    scale = np.asarray(spacing[:2], float)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise Rejected(f"pixel spacing {tuple(spacing[:2])} should be above 0 mm")
    corners = np.asarray(box, float).reshape(2, 2) * scale
    if not (np.isfinite(corners).all() and (corners[0] <= corners[1]).all()):
        raise Rejected(f"box {tuple(box)} should be x0,y0,x1,y1 with x0 <= x1 and y0 <= y1")
    middle = np.rint(corners.mean(axis=0))
    places = []
    for axis, length in ((1, slices[0].shape[0]), (0, slices[0].shape[1])):
        last = max(0, np.rint(length * scale[axis]) - 1)
        line = np.clip(np.arange(size) + middle[axis] - size // 2, 0, last)
        places.append((line + 0.5) / scale[axis] - 0.5)
    grid = np.meshgrid(*places, indexing="ij")
    planes = [ndimage.map_coordinates(one, grid, order=1, mode="nearest") for one in slices]
    image = np.rint(np.stack(planes, axis=-1)).astype(np.int16)
    inside = np.clip(corners - middle + size // 2, 0, size)
    return image, tuple(inside.ravel().tolist())


def patch_of_png(
    path: str | os.PathLike,
    box: Sequence[float],
    spacing: Sequence[float],
    size: int = SIZE,
    overrides: reading.Overrides = reading.STRICT,
) -> tuple[np.ndarray, tuple[float, ...], int]:
    """`make_patch` of a PNG slice and its neighbours, found by file name.

    Args:
      path: the slice; a missing neighbour is replaced by the nearest existing slice.
      box: (x0, y0, x1, y1) in pixels of the slice, counted from 0.
      spacing: (x, y, z) in mm.
      size: edge of the patch in mm.
      overrides: what is read although it would be rejected.

    Returns:
      (image, box, repeated): see `make_patch`, and the number of missing slices.

    Raises:
      Rejected: a slice cannot be read, or the box or the spacing is invalid.
    """
    path, repeated = pathlib.Path(path), 0
    values = units.Values()

    def read(offset: int) -> np.ndarray:
        nonlocal repeated
        nearest = offset
        while nearest and not png.neighbour_path(path, nearest).is_file():
            nearest -= int(math.copysign(1, nearest))
        repeated += nearest != offset
        return png.read_png(png.neighbour_path(path, nearest) if nearest else path, values=values)

    slices = three_slices(read, spacing[2])
    values.check(overrides)
    return *make_patch(slices, box, spacing, size), repeated
