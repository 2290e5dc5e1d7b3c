"""The standard orientation, and the conversion of stored arrays to it.

In the standard orientation slices run from head to feet, rows from anterior to posterior and
columns from the patient's right to the left, as in DeepLesion and as radiologists view CT.
Directions are unit vectors in DICOM's LPS coordinates (left, posterior, superior).
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maknet_jax.errors import Rejected

COSINE_30 = math.cos(math.radians(30))


class StoredAxis(NamedTuple):
    """An axis of a stored array, and whether its order must be reversed."""

    axis: int
    flip: bool


def standard_axes(directions: npt.ArrayLike) -> tuple[StoredAxis, StoredAxis, StoredAxis]:
    """Finds the axes of a stored array that become the standard z, y and x.

    Args:
      directions: [3, 3]; row k is the direction (LPS) in which axis k of the array increases.

    Returns:
      The stored axes of z (head to feet), y (to posterior) and x (to the left).

    Raises:
      Rejected: an axis is more than 30 degrees away from each axis of the body.
    """
    directions = np.asarray(directions, float)
    axes = []
    for body_axis, sense in ((2, -1), (1, 1), (0, 1)):
        axis = int(np.argmax(np.abs(directions[:, body_axis])))
        cosine = directions[axis, body_axis]
        if not abs(cosine) >= COSINE_30:
            angle = math.degrees(math.acos(min(1.0, abs(cosine))))
            raise Rejected(f"oblique: {angle:.0f} degrees from the body's axes; the limit is 30")
        axes.append(StoredAxis(axis, bool(cosine * sense < 0)))
    z, y, x = axes
    return z, y, x


def standard_affine(
    affine: np.ndarray, axes: tuple[StoredAxis, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """The affine of an array after `to_standard`.

    Args:
      affine: `[4, 4]`, indices of the stored array to any space in mm.
      axes: the result of `standard_axes`.
      shape: of the stored array.

    Returns:
      `[4, 4]`: indices (x, y, z) of the standard array `[Z, Y, X]` to the same space.
    """
    standard = np.eye(4)
    standard[:3, 3] = affine[:3, 3]
    for column, stored in enumerate(reversed(axes)):
        step = affine[:3, stored.axis]
        if stored.flip:
            standard[:3, 3] += step * (shape[stored.axis] - 1)
        standard[:3, column] = -step if stored.flip else step
    return standard


def to_standard(values: np.ndarray, axes: tuple[StoredAxis, ...]) -> np.ndarray:
    """A view of a stored 3-D array as [Z, Y, X] in the standard orientation.

    Args:
      values: the array as stored.
      axes: the result of `standard_axes`.
    """
    values = values.transpose([stored.axis for stored in axes])
    return values[tuple(slice(None, None, -1 if stored.flip else 1) for stored in axes)]
