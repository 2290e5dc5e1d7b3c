"""The CT slices that records were prepared from, for pictures at the resolution of the CT."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax.ct import png, preprocess, volumes
from maknet_jax.data import deeplesion, records
from maknet_jax.errors import InputError, Rejected

_TOLERANCE = 1  # HU; of rounding
_CHECKED = 8  # images


def check_folder(folder: pathlib.Path) -> None:
    """Checks that a folder of CT exists.

    Raises:
      InputError: it does not.
    """
    if not folder.is_dir():
        raise InputError(
            f"--ct {folder} is not a folder: pass the CT that --data was prepared from"
        )


def check_matches(
    source: Callable[[int], records.Example], numbers: Sequence[int], folder: pathlib.Path
) -> None:
    """Checks that a folder holds the CT of any of some records, which are spread over `numbers`.

    Args:
      source: number -> record.
      numbers: of the selected records.
      folder: see `read_slice`.

    Raises:
      InputError: it holds none of them.
    """
    step = max(1, len(numbers) // _CHECKED)
    checked = [source(number) for number in numbers[::step][:_CHECKED]]
    if not any(map(_names_source, checked)):
        raise InputError(f"--ct {folder}: the records do not name the slices they show: omit it")
    if all(read_slice(example, folder) is None for example in checked):
        raise InputError(
            f"--ct {folder} holds the CT of none of {len(checked)} images that were checked, the "
            f"first of which is {checked[0].id}: pass the CT that --data was prepared from"
        )


def read_slice(example: records.Example, folder: pathlib.Path) -> np.ndarray | None:
    """The part of a CT slice that a record shows: int16 HU `[H, W]`.

    Args:
      example: of DeepLesion's key slices, or of a segmentation case.
      folder: the images of DeepLesion, or the folder of the cases.

    Returns:
      The part inside `crop`; None if `folder` lacks the slice, or if it is not that of the record.
    """
    crop = example.meta.get("crop")
    try:
        plane = _plane(example.meta, folder)
    except (Rejected, InputError):
        return None
    if plane is None or crop is None:
        return None
    plane = preprocess.clean(plane)
    _, _, bottom, right = crop
    if bottom > plane.shape[0] or right > plane.shape[1]:
        return None
    expected = preprocess.resize(plane, crop, len(example.image))
    if np.abs(expected.astype(np.int32) - example.image[..., 1]).max() > _TOLERANCE:
        return None
    return part(plane, crop)


def part(plane: np.ndarray, crop: preprocess.Box) -> np.ndarray:
    """The pixels of a slice inside a box."""
    top, left, bottom, right = crop
    return preprocess.clean(plane[top:bottom, left:right])


def _names_source(example: records.Example) -> bool:
    """Whether a record names the slice that it shows, see `_plane`."""
    return "slice_box" in example.meta or "case" in example.meta


def _plane(meta: Mapping[str, Any], folder: pathlib.Path) -> np.ndarray | None:
    """HU of the whole slice; None if it is not in the folder."""
    if "slice_box" in meta:
        path = deeplesion.find_image(folder, meta["file"])
        return None if path is None else png.read_png(path)
    if "case" in meta:
        for name in ("ct.nii.gz", "ct.nii"):
            path = folder / meta["case"] / name
            if path.is_file():
                return _volume(path).hu[meta["slice"]]
    return None


@functools.lru_cache(maxsize=1)
def _volume(path: pathlib.Path) -> volumes.Volume:
    return volumes.load_series_of(path)[0]
