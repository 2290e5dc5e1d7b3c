"""Many examples in one picture, which shows a flip, a wrong window or a bad crop at a glance."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from maknet_jax import files
from maknet_jax.errors import InputError

SOFT_TISSUE = (-160.0, 240.0)  # HU, the usual abdominal display window
_TILE, _TEXT = 192, 40  # pixels: the edge of a tile, the height of the text below it


class Example(Protocol):
    """The content of a tile; `records.Example` has these fields and more."""

    @property
    def id(self) -> str:
        """The first line below the picture."""

    @property
    def image(self) -> np.ndarray:
        """HU `[S, S, 3]`; the middle slice is drawn."""

    @property
    def labels(self) -> np.ndarray:
        """`[K]`, nonzero for the labels that are present."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """If it has "box" (x0, y0, x1, y1 in pixels of the image), the box is drawn."""


def to_grey(hu: np.ndarray, window: tuple[float, float] = SOFT_TISSUE) -> np.ndarray:
    """HU of any shape -> uint8, `window` (low, high) mapped to 0..255.

    Raises:
      InputError: low is not below high.
    """
    low, high = window
    if not low < high:
        raise InputError(f"window {low},{high} should be LOW,HIGH in HU, LOW below HIGH")
    return np.clip((hu.astype(np.float32) - low) * (255.0 / (high - low)), 0, 255).astype(np.uint8)


def write_contact_sheet(
    path: str | pathlib.Path,
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    columns: int = 6,
    window: tuple[float, float] = SOFT_TISSUE,
) -> None:
    """Writes a PNG: middle slices in rows, each with its id, its labels and its box.

    Args:
      path: the PNG.
      examples: the tiles, row by row.
      names: the K label names.
      columns: tiles per row.
      window: (low, high) of the display in HU.
    """
    columns = min(columns, max(1, len(examples)))
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * _TILE, max(1, rows) * (_TILE + _TEXT)), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for number, example in enumerate(examples):
        left, top = number % columns * _TILE, number // columns * (_TILE + _TEXT)
        tile = Image.fromarray(to_grey(example.image[..., 1], window))
        sheet.paste(tile.resize((_TILE - 4, _TILE - 4)), (left + 2, top + 2))
        if "box" in example.meta:
            # Coordinates of a box refer to pixel centres.
            corners = (np.asarray(example.meta["box"]) + 0.5) * (_TILE - 4) / len(example.image)
            draw.rectangle([*(corners + [left + 2, top + 2] * 2)], outline=(255, 180, 0))
        labels = [names[column] for column in np.flatnonzero(example.labels).tolist()]
        lines = [example.id[:30], *_wrap(", ".join(labels) or "no label", 31)[:2]]
        for line, text in enumerate(lines):
            colour = (150, 200, 255) if line == 0 else (230, 230, 230)
            draw.text((left + 3, top + _TILE - 2 + 13 * line), text, fill=colour)
    write_picture(path, sheet)


def write_picture(path: str | pathlib.Path, picture: Image.Image) -> None:
    """Writes a PNG that says what wrote it, so that it is never taken for CT."""
    text = PngInfo()
    text.add_text("Software", files.PNG_SOFTWARE)
    with files.write_whole(path, "wb") as file:
        picture.save(file, format="PNG", pnginfo=text)


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
