"""CT slices for display: windowed, with square pixels, at the resolution of the CT if possible."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from maknet_jax import files
from maknet_jax.errors import InputError

SOFT_TISSUE = (-160.0, 240.0)  # HU, the usual abdominal display window
# Kinds of files that store the directions of their axes, so that the patient's right is known.
_ORIENTED = ("dicom", "nifti")
LONGEST = 384  # pixels; smaller pictures are enlarged, so that their longer side has at least these


@dataclasses.dataclass(frozen=True)
class Picture:
    """A CT slice for display.

    Attributes:
      grey: uint8 `[h, w]`, with square pixels.
      mm: the edge of a pixel; None if unknown.
      stored: (rows, columns) before enlarging.
      native: True for pixels of the CT, False for the input of the network, which is smaller and
        stretched to a square.
    """

    grey: np.ndarray
    mm: float | None
    stored: tuple[int, int]
    native: bool

    @property
    def resolution(self) -> str:
        """The resolution in words."""
        size = "{} x {} pixels".format(*self.stored[::-1])
        if self.native:
            return f"crop of the CT, {size}"
        return f"enlarged from the input of the network, {size}"


def to_grey(hu: np.ndarray, window: tuple[float, float] = SOFT_TISSUE) -> np.ndarray:
    """HU of any shape -> uint8, `window` (low, high) mapped to 0..255.

    Raises:
      InputError: low is not below high.
    """
    low, high = window
    if not low < high:
        raise InputError(f"window {low},{high} should be LOW,HIGH in HU, LOW below HIGH")
    return np.clip((hu.astype(np.float32) - low) * (255.0 / (high - low)), 0, 255).astype(np.uint8)


def describe_window(window: Sequence[float]) -> str:
    """A display window in words: its ends, and its level and width as radiologists quote them."""
    low, high = window
    return f"window {low:g} to {high:g} HU (level {(low + high) / 2:g}, width {high - low:g})"


def write_png(path: str | pathlib.Path, image: Image.Image) -> None:
    """Writes a PNG whose metadata name this package, so that it is never taken for CT."""
    info = PngInfo()
    info.add_text("Software", files.PNG_SOFTWARE)
    with files.write_whole(path, "wb") as file:
        # Level 3 takes half of the time of the default, 6, for files of the same size.
        image.save(file, format="PNG", pnginfo=info, compress_level=3)


def resample(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bicubic, antialiased: `[h, w]` -> float32 `[*shape]`."""
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.BICUBIC))


def pixel_spacing(meta: Mapping[str, Any]) -> tuple[float, float] | None:
    """mm between the rows and between the columns of the slice of a record; None if unknown.

    Args:
      meta: of a record. DeepLesion's spacing is (x, y, z) and that of volumes (z, y, x); a patch
        around a lesion has a `box` and pixels of 1 mm.
    """
    if "box" in meta:
        return 1.0, 1.0
    spacing = meta.get("spacing") or ()
    y, x = (
        (*spacing[1::-1], None, None)[:2] if "slice_box" in meta else (*spacing, *[None] * 3)[1:3]
    )
    known = all(mm is not None and math.isfinite(mm) and mm > 0 for mm in (y, x))
    return (float(y), float(x)) if known else None


def is_oriented(meta: Mapping[str, Any]) -> bool:
    """Whether the left side of a picture is known to be the patient's right.

    It is if the files store directions. PNGs do not, and some of DeepLesion's are mirrored.
    """
    if "kind" in meta:
        return meta["kind"] in _ORIENTED
    return "case" in meta or "series" in meta


def extent(meta: Mapping[str, Any], size: int) -> tuple[float, float]:
    """The height and the width that the image of a record shows: in mm, else in pixels of the CT.

    Args:
      meta: of the record; without `crop` the image was not stretched.
      size: the edge of the image in pixels.
    """
    top, left, bottom, right = meta.get("crop") or (0, 0, size, size)
    y, x = pixel_spacing(meta) or (1.0, 1.0)
    return (bottom - top) * y, (right - left) * x


def shape_of(height: float, width: float, longest: int = LONGEST) -> tuple[int, int]:
    """(rows, columns) of a picture whose longer side has `longest` pixels."""
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def of_image(
    hu: np.ndarray, meta: Mapping[str, Any], window: tuple[float, float] = SOFT_TISSUE
) -> Picture:
    """The picture of a network's input, enlarged smoothly to the proportions of the body.

    Args:
      hu: HU `[S, S]`.
      meta: of the record, see `extent`.
      window: (low, high) of the display in HU.
    """
    height, width = extent(meta, len(hu))
    shape = shape_of(height, width, max(LONGEST, len(hu)))
    mm = width / shape[1] if pixel_spacing(meta) else None
    return Picture(to_grey(resample(hu, shape), window), mm, hu.shape, native=False)


def of_slice(
    hu: np.ndarray,
    spacing: tuple[float, float] | None,
    window: tuple[float, float] = SOFT_TISSUE,
) -> Picture:
    """The picture of a part of a CT slice, at its own resolution.

    Args:
      hu: HU `[H, W]`, the part that the network sees.
      spacing: mm between rows and between columns; None if unknown.
      window: (low, high) of the display in HU.
    """
    y, x = spacing or (1.0, 1.0)
    height, width = hu.shape[0] * y, hu.shape[1] * x
    shape = shape_of(height, width, max(LONGEST, *hu.shape))
    drawn = hu if shape == hu.shape else resample(hu, shape)
    mm = width / shape[1] if spacing else None
    return Picture(to_grey(drawn, window), mm, hu.shape, native=True)


def coronal(
    hu: np.ndarray, spacing: Sequence[float], columns: int = 256
) -> tuple[np.ndarray, tuple[float, float]]:
    """The mean of a volume along the rows, which looks like a radiograph.

    Args:
      hu: int16 `[Z, Y, X]`.
      spacing: mm along (z, y, x); nan if unknown.
      columns: the maximum number of columns; more are averaged.

    Returns:
      (view, spacing): uint8 `[Z, <= columns]`, and its mm between rows and between columns.
    """
    factor = -(-hu.shape[2] // columns)
    width = hu.shape[2] // factor
    rows = [np.clip(plane, -1000, 1500).mean(axis=0, dtype=np.float32) for plane in hu]
    mean = np.stack(rows)[:, : width * factor].reshape(len(hu), width, factor).mean(axis=-1)
    low, high = np.percentile(mean, (1, 99.8))
    view = to_grey(mean, (float(low), max(float(high), float(low) + 1)))
    return view, (spacing[0], spacing[2] * factor)
