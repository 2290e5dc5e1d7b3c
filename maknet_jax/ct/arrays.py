"""CT volumes from arrays in memory, converted to the standard orientation."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maknet_jax.ct import geometry, nifti, reading, units
from maknet_jax.ct.reading import LARGEST_MATRIX
from maknet_jax.ct.volumes import Volume
from maknet_jax.errors import InputError, Rejected

# The direction, in LPS coordinates, in which an axis with this letter increases.
_DIRECTIONS = {
    "L": (1, 0, 0),
    "R": (-1, 0, 0),
    "P": (0, 1, 0),
    "A": (0, -1, 0),
    "S": (0, 0, 1),
    "I": (0, 0, -1),
}
_EXPECTED = (
    "pass affine=A (4 x 4, voxel indices to RAS in mm, as in nibabel), or spacing=(a, b, c) in mm "
    'and orientation="LPS", one entry per axis of the array (each letter is the direction in which '
    "that axis increases: L or R, P or A, S or I)"
)


def volume_of_array(
    hu: np.ndarray,
    *,
    affine: npt.ArrayLike | None = None,
    spacing: Sequence[float] | None = None,
    orientation: str | None = None,
    name: str = "array",
    overrides: reading.Overrides = reading.STRICT,
) -> Volume:
    """Makes a volume from an array of HU and its geometry.

    Args:
      hu: three axes in any order, integers or floats.
      affine: `[4, 4]`, indices of the array to RAS in mm; or the two below instead.
      spacing: mm along each axis of the array.
      orientation: three letters, the direction in which each axis increases: "LPS" axes run to the
        left, to posterior and to superior.
      name: the name of the series.
      overrides: whether values that do not look like HU are accepted.

    Returns:
      The volume, head to feet; its slices are named by their index along the array's z axis.

    Raises:
      InputError: the geometry is missing, incomplete or contradictory, or the values are not HU.
    """
    if (nibabel := hasattr(hu, "get_fdata")) or not _is_array(hu):
        voxels = "image.get_fdata() and affine=image.affine" if nibabel else "an array of HU"
        raise InputError(
            f"a {type(hu).__name__} is neither a path nor an array: pass the path of its file, or "
            f"{voxels}"
        )
    hu = np.asarray(hu)
    if hu.ndim != 3 or min(hu.shape) < 1 or max(hu.shape) > LARGEST_MATRIX:
        raise InputError(
            f"an array of shape {hu.shape} is not a CT volume: pass three axes of 1 to "
            f"{LARGEST_MATRIX} voxels"
        )
    if hu.dtype.kind not in "iuf":
        raise InputError(f"an array of dtype {hu.dtype} is not CT: pass HU as integers or floats")
    arguments = {"affine": affine, "spacing": spacing, "orientation": orientation}
    present = [key for key, value in arguments.items() if value is not None]
    if present not in (["affine"], ["spacing", "orientation"]):
        has = " and ".join(present) or "no geometry"
        raise InputError(f"an array of shape {hu.shape} with {has}: {_EXPECTED}")
    try:
        if affine is not None:
            matrix = np.asarray(affine, float)
            if matrix.shape != (4, 4):
                raise InputError(f"affine of shape {matrix.shape}: {_EXPECTED}")
        else:
            matrix = _affine(spacing or (), orientation or "")
        axes, steps = nifti.geometry_of(matrix)
        values = geometry.to_standard(hu, axes)
        volume = np.empty(values.shape, np.int16)
        counted = units.Values()
        for k, plane in enumerate(values):
            volume[k] = counted.add(plane)
        counted.check(overrides)
    except Rejected as error:
        raise InputError(f"the array of shape {hu.shape} cannot be used: {error}") from None
    z, y, x = (stored.axis for stored in axes)
    names = [str(k) for k in range(len(volume))]
    slices = tuple(names[::-1] if axes[0].flip else names)
    uids = tuple(f"{name}:{k}" for k in slices)
    standard = geometry.standard_affine(matrix, axes, hu.shape)
    return Volume(volume, (steps[z], steps[y], steps[x]), name, slices, uids, standard, file=name)


def _is_array(value: object) -> bool:
    """Whether NumPy takes a value for an array; any other object would become one of objects."""
    names = ("__array__", "__array_interface__", "__dlpack__")
    return isinstance(value, (list, tuple)) or any(hasattr(value, name) for name in names)


def _affine(spacing: Sequence[float], orientation: str) -> np.ndarray:
    """The affine to RAS of an array with these axes."""
    steps, letters = np.asarray(spacing, float), str(orientation).upper()
    pairs = {letter: pair for pair in ("LR", "PA", "SI") for letter in pair}
    if steps.shape != (3,) or not (steps > 0).all():
        raise InputError(f"spacing {spacing}: {_EXPECTED}")
    if len(letters) != 3 or {pairs.get(letter) for letter in letters} != {"LR", "PA", "SI"}:
        raise InputError(f"orientation {orientation!r}: {_EXPECTED}")
    affine = np.eye(4)
    for axis, letter in enumerate(letters):
        affine[:3, axis] = np.diag([-1, -1, 1]) @ _DIRECTIONS[letter] * steps[axis]
    return affine
