"""Many examples in one picture, which shows a flip, a wrong window or a bad crop at a glance."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from maknet_jax import console
from maknet_jax.figures import overlay, picture, text

_TILE, _GAP, _LINE = 224, 8, 15  # pixels: the edge of a picture, the space around it, a text line
_MOST_LINES = 8  # of labels
_BACKGROUND, _ID, _LABELS, _QUIET = (24, 24, 24), (150, 200, 255), (235, 235, 235), (170, 170, 170)
_UNKNOWN, _MOST_UNKNOWN = (230, 190, 120), 2  # colour and lines of the unknown labels
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
    def label_mask(self) -> np.ndarray:
        """`[K]`, zero for the labels that are unknown; empty without labels."""

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
        labels = ", ".join(_present(example, names))
        tiles.append(
            {
                "uri": overlay.to_uri(grey),
                "alt": f"CT slice {example.id}: {labels}",
                "aspect": shape[1] / shape[0],
                "right": picture.is_oriented(example.meta),
                "title": example.id,
                "note": example.meta.get("split", ""),
                "labels": labels,
                "unknown": _listed(_unknown(example, names), 8),
            }
        )
    return tiles


def _header(examples: Sequence[Example], window: tuple[float, float]) -> str:
    if not examples:
        return "no images"
    size, count = len(examples[0].image), console.plural(len(examples), "image")
    return f"{count} of {size} x {size} pixels, {picture.describe_window(window)}"


def _lines(example: Example, names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """(text, colour) of the lines below a picture."""
    face = text.font(12)
    labels = _present(example, names)
    unknown = _unknown(example, names)
    split = [(str(example.meta["split"]), _QUIET)] if example.meta.get("split") else []
    return [
        (text.shorten(example.id, _TILE, face), _ID),
        *split,
        *((line, _LABELS) for line in _wrapped("", labels, _MOST_LINES)),
        *((line, _UNKNOWN) for line in _wrapped("unknown: ", unknown, _MOST_UNKNOWN)),
    ]


def _present(example: Example, names: Sequence[str]) -> list[str]:
    """The names of the labels that are present, or a note that none is."""
    present = [names[column] for column in np.flatnonzero(example.labels).tolist()]
    return present or ["no label" if len(example.labels) else "not labelled"]


def _unknown(example: Example, names: Sequence[str]) -> list[str]:
    """The names of the labels that are neither known to be present nor to be absent."""
    return [names[column] for column in np.flatnonzero(example.label_mask == 0).tolist()]


def _wrapped(start: str, names: Sequence[str], most_lines: int) -> list[str]:
    """The lines of a list of names, cut with a count; none without names."""
    face = text.font(12)
    for shown in range(len(names), -1, -1):
        lines = text.wrap(start + _listed(names, shown), _TILE, face)
        if len(lines) <= most_lines:
            return lines if names else []
    return []


def _listed(names: Sequence[str], most: int) -> str:
    """Names separated by commas; those after the first `most` are counted."""
    left_out = len(names) - most
    return ", ".join([*names[:most], *([f"and {left_out} more"] if left_out > 0 else [])])


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
