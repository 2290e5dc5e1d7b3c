"""CT volumes and label maps as NIfTI, turned to the standard orientation by their affine.

The standard orientation of this project: slices run head to feet, rows anterior to posterior,
columns from the patient's right to the left (as DeepLesion and as radiologists look at CT).
"""

import contextlib
import logging
import math
import threading
import warnings

import numpy as np

from maknet_jax.errors import Rejected

LARGEST_MATRIX = 4096
LARGEST_SERIES = 8 << 30  # bytes of int16
COSINE_30 = math.cos(math.radians(30))
SPACING = (0.05, 50.0)  # mm: outside of these the unit is not millimetres
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


_quiet_lock = threading.Lock()
_quiet_readers = 0
_quiet_exit = contextlib.ExitStack()


@contextlib.contextmanager
def quiet():
    """Holds back warnings and log lines of pydicom and nibabel while any thread reads.

    `warnings.catch_warnings` alone is not safe in threads (the last to leave wins), so the first
    reader to come opens it and the last one to leave closes it.
    """
    global _quiet_readers, _quiet_exit
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel.global")]
    with _quiet_lock:
        _quiet_readers += 1
        if _quiet_readers == 1:
            _quiet_exit = contextlib.ExitStack()
            _quiet_exit.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for logger in loggers:
                for name, value in (("disabled", True), ("propagate", False)):
                    _quiet_exit.callback(setattr, logger, name, getattr(logger, name))
                    setattr(logger, name, value)  # `disabled` alone does not hold for children
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_readers -= 1
            if _quiet_readers == 0:
                _quiet_exit.close()


def axial_turns(directions):
    """Which axis of an array, and in which sense, is the standard z, y and x.

    Args:
      directions: [3, 3] unit vectors (LPS), one row for each axis of the array.

    Returns:
      three pairs (axis, flip): for z (head to feet), y (to posterior) and x (to the left).

    Raises:
      Rejected: an axis is more than 30 degrees away from each of the body's.
    """
    directions = np.asarray(directions, float)
    turns = []
    for body_axis, wanted in ((2, -1), (1, 1), (0, 1)):
        axis = int(np.argmax(np.abs(directions[:, body_axis])))
        cosine = directions[axis, body_axis]
        if not abs(cosine) >= COSINE_30:
            angle = math.degrees(math.acos(min(1.0, abs(cosine))))
            raise Rejected(f"oblique: {angle:.0f} degrees from the body's axes, the limit is 30")
        turns.append((axis, bool(cosine * wanted < 0)))
    return turns


def check_nifti(path):
    """Reads the header only; returns the number of axial slices. Raises Rejected."""
    _, turns, shape, _ = _open(path)
    return shape[turns[0][0]]


def read_nifti(path):
    """Reads a CT volume.

    Returns:
      hu: int16 [Z, Y, X], head to feet; exact for integers without a slope, else rounded to the
        nearest (halves to even).
      spacing: (z, y, x) in mm.
      stored: for each slice its index along that axis of the file which is z, as strings.

    Raises:
      Rejected: not 3-D, no orientation, oblique, not finite, or not HU.
    """
    image, turns, shape, spacing = _open(path)
    values = _values(image, turns, shape, path)
    hu = np.empty(values.shape, np.int16)
    low, high = np.inf, -np.inf
    for k, plane in enumerate(values):
        plane = _scaled(image, plane)
        if not np.isfinite(plane).all():
            raise Rejected("some values are not finite")
        low, high = min(low, plane.min()), max(high, plane.max())
        hu[k] = np.clip(np.rint(plane), -32768, 32767)
    _check_hu(low, high)
    stored = [str(k) for k in range(len(hu))]
    return hu, spacing, tuple(stored[::-1] if turns[0][1] else stored)


def load_label_map(path, like=None):
    """Reads an integer label map (such as organ masks); returns uint16 [Z, Y, X], head to feet.

    Args:
      path: the file.
      like: the NIfTI of the CT that it belongs to; if given, both must share their voxel grid.

    Raises:
      Rejected: as `read_nifti`, or not labels (0 to 65535, whole numbers), or another grid.
    """
    image, turns, shape, _ = _open(path)
    if like is not None:
        other, _, other_shape, _ = _open(like)
        if shape != other_shape or not np.allclose(image.affine, other.affine, atol=1e-2):
            raise Rejected(f"the label map lies on another voxel grid than {like}")
    values = _values(image, turns, shape, path)
    labels = np.empty(values.shape, np.uint16)
    for k, plane in enumerate(values):
        plane = _scaled(image, plane)
        if not (np.isfinite(plane).all() and plane.min() >= 0 and plane.max() <= 65535):
            raise Rejected("a label map holds whole numbers from 0 to 65535")
        labels[k] = np.rint(plane)
        if (labels[k] != plane).any():
            raise Rejected("a label map holds whole numbers from 0 to 65535")
    return labels


def _open(path):
    """(image, turns as in `axial_turns`, shape, spacing), from the header only."""
    import nibabel  # slow to import, and most runs read no NIfTI

    try:
        with quiet():
            image = nibabel.load(path)
            shape = tuple(int(n) for n in image.shape)
            dtype = image.get_data_dtype()
            header = image.header
            forms = int(header["sform_code"]), int(header["qform_code"])
            qform = header.get_qform() if forms[1] > 0 else None
            unit = header.get_xyzt_units()[0]
            affine = np.asarray(image.affine, float)
    except Exception as error:  # nibabel raises anything on broken files
        text = " ".join(str(error).split())[:200]
        raise Rejected(f"broken NIfTI file ({type(error).__name__}: {text})") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise Rejected(f"a NIfTI of shape {shape}: only 3-D volumes are understood")
    if dtype.kind not in "iuf":
        raise Rejected(f"a NIfTI of {dtype}: only numbers of one channel are understood")
    if min(shape) < 1 or max(shape) > LARGEST_MATRIX or np.prod(shape) * 2 > LARGEST_SERIES:
        raise Rejected(f"a NIfTI of shape {shape}: at most {LARGEST_MATRIX} and 8 GiB of int16")
    if forms == (0, 0):
        raise Rejected("neither sform nor qform: left and right are unknown")
    if unit not in ("mm", "unknown"):
        raise Rejected(f"the unit of the affine is {unit}: only mm is understood")
    turns, spacing = _geometry(affine)
    if forms[0] > 0 and qform is not None and _geometry(qform)[0] != turns:
        raise Rejected("sform and qform disagree about the orientation")
    return image, turns, shape, tuple(spacing[axis] for axis, _ in turns)


def _geometry(affine):
    columns = np.asarray(affine, float)[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    if not (
        np.isfinite(affine).all() and SPACING[0] <= spacing.min() <= spacing.max() <= SPACING[1]
    ):
        raise Rejected(f"voxels of {spacing} mm: outside {SPACING[0]} to {SPACING[1]} mm")
    turns = axial_turns((RAS_TO_LPS @ (columns / spacing)).T)
    if sorted(axis for axis, _ in turns) != [0, 1, 2]:
        raise Rejected("the axes of the affine are not independent")
    return turns, [float(value) for value in spacing]


def _values(image, turns, shape, path):
    """The stored values as a view [Z, Y, X] in the standard orientation, not yet scaled."""
    try:
        with quiet():
            values = np.asanyarray(image.dataobj.get_unscaled()).reshape(shape)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Rejected(f"broken or truncated NIfTI data ({text})") from error
    values = values.transpose([axis for axis, _ in turns])
    return values[tuple(slice(None, None, -1 if flip else 1) for _, flip in turns)]


def _scaled(image, plane):
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    if (slope, intercept) == (1.0, 0.0):
        return plane
    return plane * slope + intercept


def _check_hu(low, high):
    """CT holds air, so real HU go below 0; and they span more than a normalised picture."""
    found = f"values from {low:g} to {high:g}"
    if low >= 0:
        raise Rejected(
            f"{found}: not HU (a label map, a display picture or shifted values); "
            "store Hounsfield units, in which water is 0 and air -1000"
        )
    if high - low <= 2:
        raise Rejected(f"{found}: not HU (normalised or constant); store Hounsfield units")
    if low < -32768 or high > 32767:
        raise Rejected(f"{found}: outside int16, so not HU")
