"""CT slices as PNG: DeepLesion's 16-bit files, and 8-bit images with a known display window."""

import io
import math
import os
import pathlib
import re
import struct
import zlib

import numpy as np
from PIL import Image

from maknet_jax import files
from maknet_jax.ct import containers, units
from maknet_jax.ct.reading import LARGEST_MATRIX, one_line
from maknet_jax.errors import InputError, Rejected

OFFSET = 32768  # DeepLesion stores HU + 32768

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY = 0  # colour type
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")  # the last number of a name is the index
_WINDOW_ADVICE = ": add --png-window LOW,HIGH"


def is_own_output(path: str | os.PathLike[str]) -> bool:
    """Whether this package wrote a PNG (a chart, a contact sheet), which is not CT."""
    try:
        with containers.open_file(path) as file:
            return b"Software\0" + files.PNG_SOFTWARE.encode() in file.read(1024)
    except OSError:
        return False  # read_png() reports it


def split_name(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """Splits the name of a slice into its series and its index, which is the last number in it.

    `000001_01_01/109.png` and `000001_01_01_109.png` both give ("000001_01_01", 109). A name
    without a number is a separate series with index None.
    """
    path = pathlib.Path(path)
    match = _NUMBERED.fullmatch(path.stem)
    if match is None:
        return path.stem, None
    series = (match[1].rstrip("_-. ") + match[3]).strip("_-. ")
    return series or path.absolute().parent.name, int(match[2])


def neighbour_path(path: str | os.PathLike[str], offset: int) -> pathlib.Path:
    """The path of the slice whose index is higher by `offset`; it may not exist.

    The index keeps its zero padding, unless only a file without exists: `img9.png` precedes
    `img10.png`. If there is no such index (the name contains no number, or the index would be
    negative), the result is a path that no slice has.
    """
    path = pathlib.Path(path)
    match = _NUMBERED.fullmatch(path.stem)
    if match is None or int(match[2]) + offset < 0:
        return path.with_name(f"{path.stem}.no-neighbour{offset:+d}{path.suffix}")
    number = int(match[2]) + offset
    padded, plain = (
        path.with_name(f"{match[1]}{text}{match[3]}{path.suffix}")
        for text in (f"{number:0{len(match[2])}d}", str(number))
    )
    return plain if not containers.is_file(padded) and containers.is_file(plain) else padded


def read_png(
    path: str | os.PathLike[str],
    window: tuple[float, float] | None = None,
    values: units.Values | None = None,
) -> np.ndarray:
    """Reads one slice.

    16-bit files: HU = value - 32768, exactly. 8-bit files (grey, or RGB with three equal
    channels) need a window: 0..255 -> low..high, rounded to the nearest.

    Args:
      path: the file.
      window: (low, high) in HU of the display window of 8-bit files.
      values: counts the HU of 16-bit files, for the unit check of the series.

    Returns:
      int16 [rows, columns] in HU.

    Raises:
      Rejected: not a complete PNG, in colour, of another depth, or 8-bit without a window.
      InputError: the window is not two finite numbers with low < high.
    """
    if window is not None:
        check_window(window)
    try:
        content = containers.read_file(path)
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror})") from error
    if not content.startswith(_SIGNATURE) or content[12:16] != b"IHDR" or len(content) < 33:
        raise Rejected("not a PNG file")
    columns, rows, depth, colour = struct.unpack(">IIBB", content[16:26])
    if not (1 <= rows <= LARGEST_MATRIX and 1 <= columns <= LARGEST_MATRIX):
        raise Rejected(f"PNG of {rows} x {columns} pixels: expected 1 to {LARGEST_MATRIX} each")
    if depth == 16 and colour == _GREY:
        hu = _pixels(content).astype(np.int32) - OFFSET
        return (units.Values() if values is None else values).add(hu)
    if depth != 8:
        raise Rejected(f"{depth}-bit PNG of colour type {colour}: expected 16-bit grey or 8-bit")
    if window is None:
        raise Rejected("8-bit PNG: HU are unknown without the display window" + _WINDOW_ADVICE)
    pixels = _pixels(content, None if colour == _GREY else "RGBA")
    if pixels.ndim == 3:
        if (pixels[..., 3] != 255).any():
            raise Rejected("PNG with transparent pixels: expected opaque grey")
        if (pixels[..., :3] != pixels[..., :1]).any():
            raise Rejected("PNG in colour: expected grey")
        pixels = pixels[..., 0]
    low, high = window
    return np.rint(low + pixels.astype(np.float64) * ((high - low) / 255)).astype(np.int16)


def reason_without_window(error: Exception) -> str:
    """The reason of a rejection, for commands without the option --png-window."""
    return str(error).removesuffix(_WINDOW_ADVICE)


def check_window(window: tuple[float, float]) -> None:
    """Raises InputError unless `window` is (low, high) in HU with low < high, both in int16."""
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high) and -32768 <= low < high <= 32767):
        raise InputError(
            f"PNG window {low},{high}: LOW must be below HIGH, both HU in the range of int16"
        )


def _pixels(content: bytes, mode: str | None = None) -> np.ndarray:
    try:
        _check_chunks(content)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if getattr(image, "n_frames", 1) != 1:
                raise ValueError("animated")
            return np.asarray(image if mode is None else image.convert(mode))
    except Exception as error:  # Pillow raises OSError, SyntaxError, zlib.error, ...
        raise Rejected(f"broken or truncated PNG ({one_line(error)})") from error


def _check_chunks(content: bytes) -> None:
    """Checks the checksum of every chunk; Pillow skips those of the pixels."""
    place, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        head = content[place : place + 8]
        if len(head) < 8:
            raise ValueError("no end marker")
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = place + 8 + size
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError(f"wrong checksum of chunk {kind.decode('latin-1')}")
        place = end + 4
