"""Many examples in one picture, which shows a flip, a wrong window or a bad crop at a glance."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from maknet_jax.figures import overlay, picture, text

_TILE, _GAP, _LINE = 224, 8, 15  # pixels: the edge of a picture, the space around it, a text line
_MOST_LINES = 8  # of labels
_BACKGROUND, _ID, _LABELS, _QUIET = (24, 24, 24), (150, 200, 255), (235, 235, 235), (170, 170, 170)
_BOX = (255, 180, 0)


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
        """`box` (x0, y0, x1, y1 in pixels of the image) is drawn, `split` written below.

        The picture has the proportions of the body, see `picture.extent`.
        """


def write_contact_sheet(
    path: str | pathlib.Path,
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    columns: int = 6,
    window: tuple[float, float] = picture.SOFT_TISSUE,
) -> None:
    """Writes a PNG: middle slices in rows, each with its id, its split, its labels and its box.

    Args:
      path: the PNG.
      examples: the tiles, row by row.
      names: the K label names.
      columns: tiles per row.
      window: (low, high) of the display in HU.
    """
    columns = min(columns, max(1, len(examples)))
    rows = [examples[start : start + columns] for start in range(0, len(examples), columns)]
    texts = [[_lines(example, names) for example in row] for row in rows]
    heights = [_TILE + _GAP + _LINE * max(map(len, row)) for row in texts]
    width = columns * (_TILE + _GAP) + _GAP
    header = text.wrap(_header(examples, window), width - 2 * _GAP, text.font(13))
    top = 2 * _GAP + _LINE * len(header)
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(header):
        draw.text((_GAP, _GAP + _LINE * number), line, fill=_LABELS, font=text.font(13))
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for column, (example, tile_lines) in enumerate(zip(row, lines, strict=True)):
            left = _GAP + column * (_TILE + _GAP)
            _draw_tile(sheet, draw, (left, top), example, window)
            for number, (line, colour) in enumerate(tile_lines):
                place = left, top + _TILE + 2 + _LINE * number
                draw.text(place, line, fill=colour, font=text.font(12))
        top += height
    picture.write_png(path, sheet)


def make_tiles(
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    window: tuple[float, float] = picture.SOFT_TISSUE,
) -> list[dict[str, Any]]:
    """The same tiles for a page: the values of the macro `tiles` of `templates/parts.html.j2`.

    Args:
      examples: the tiles.
      names: the K label names.
      window: (low, high) of the display in HU.
    """
    tiles = []
    for example in examples:
        size = len(example.image)
        shape = picture.shape_of(*picture.extent(example.meta, size), 2 * _TILE)
        grey = picture.to_grey(picture.resample(example.image[..., 1], shape), window)
        labels = ", ".join(names[k] for k in np.flatnonzero(example.labels).tolist())
        tiles.append(
            {
                "uri": overlay.to_uri(grey),
                "alt": f"CT slice {example.id}: {labels or 'no label'}",
                "aspect": shape[1] / shape[0],
                "title": example.id,
                "note": example.meta.get("split", ""),
                "labels": labels or "no label",
            }
        )
    return tiles


def _header(examples: Sequence[Example], window: tuple[float, float]) -> str:
    if not examples:
        return "no images"
    size = len(examples[0].image)
    count = f"{len(examples)} image{'s' * (len(examples) > 1)}"
    return f"{count} of {size} x {size} pixels, {picture.describe_window(window)}"


def _lines(example: Example, names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """(text, colour) of the lines below a picture."""
    face = text.font(12)
    labels = [names[column] for column in np.flatnonzero(example.labels).tolist()]
    none = "no label" if len(example.labels) else "not labelled"
    lines = text.wrap(", ".join(labels) or none, _TILE, face)
    for left_out in range(1, len(labels) + 1):
        if len(lines) <= _MOST_LINES:
            break
        listed = [*labels[:-left_out], f"and {left_out} more"]
        lines = text.wrap(", ".join(listed), _TILE, face)
    split = [(str(example.meta["split"]), _QUIET)] if example.meta.get("split") else []
    return [
        (text.shorten(example.id, _TILE, face), _ID),
        *split,
        *((line, _LABELS) for line in lines),
    ]


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    example: Example,
    window: tuple[float, float],
) -> None:
    """Draws the picture of an example and its box into a square with its top left at `corner`."""
    size = len(example.image)
    shape = picture.shape_of(*picture.extent(example.meta, size), _TILE)
    grey = picture.to_grey(picture.resample(example.image[..., 1], shape), window)
    left, top = corner[0] + (_TILE - shape[1]) // 2, corner[1] + (_TILE - shape[0]) // 2
    draw.rectangle([*corner, corner[0] + _TILE - 1, corner[1] + _TILE - 1], fill=(0, 0, 0))
    sheet.paste(Image.fromarray(grey), (left, top))
    if "box" in example.meta:
        # Coordinates of a box refer to pixel centres.
        scale = np.asarray([shape[1], shape[0]] * 2) / size
        corners = (np.asarray(example.meta["box"]) + 0.5) * scale + [left, top] * 2
        draw.rectangle([*corners.tolist()], outline=_BOX)
