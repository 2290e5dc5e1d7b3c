"""A figure of CT panels with titles, scale bars and a colour bar, as in papers."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from maknet_jax.figures import overlay, picture, text

_WIDTH, _GAP, _LINE = 340, 14, 19  # pixels: a panel, the space around it, a line of text
_COLUMNS = 6
_BAR_LENGTHS = (5, 10, 20, 50, 100, 200)  # mm
_INK, _QUIET = (0, 0, 0), (85, 85, 85)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
      title: above the picture.
      note: below the title; can have several lines.
      pixels: uint8 `[h, w, 3]`.
    """

    title: str
    note: str
    pixels: np.ndarray


def write_panels(
    path: str | pathlib.Path,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    *,
    caption: Sequence[str] = (),
    mm: float | None = None,
    right: bool = False,
    colour_bar: float | None = None,
) -> None:
    """Writes a PNG of rows of panels, each with a heading.

    Args:
      path: the PNG.
      rows: (heading, panels); a row of more than six panels is wrapped.
      caption: lines below the panels.
      mm: the edge of a pixel of the panels, for the scale bars; None draws none.
      right: mark the left edges as the patient's right.
      colour_bar: draw the colours of attribution maps, from minus to plus this value; None draws
        none.
    """
    lines: list[tuple[str, Sequence[Panel]]] = []
    for heading, panels in rows:
        for start in range(0, len(panels), _COLUMNS):
            lines.append((heading if start == 0 else "", panels[start : start + _COLUMNS]))
    columns = max(2, *(len(panels) for _, panels in lines))
    width = columns * (_WIDTH + _GAP) + _GAP
    below = [part for line in caption for part in text.wrap(line, width - 2 * _GAP, text.font(14))]
    above = _LINE * (1 + max(len(_notes(panel)) for _, panels in lines for panel in panels))
    heights = [_heading(heading) + above + _tallest(panels) + _GAP for heading, panels in lines]
    bar = 3 * _LINE if colour_bar else 0
    height = _GAP + sum(heights) + _LINE * len(below) + bar + _GAP
    figure = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(figure)
    top = _GAP
    for (heading, panels), line_height in zip(lines, heights, strict=True):
        if heading:
            fitted = text.shorten(heading, width - 2 * _GAP, text.font(17, bold=True))
            draw.text((_GAP, top), fitted, fill=_INK, font=text.font(17, bold=True))
        for column, panel in enumerate(panels):
            left = _GAP + column * (_WIDTH + _GAP)
            corner = left, top + _heading(heading) + above
            _draw_panel(figure, draw, corner, panel)
            shape = _WIDTH, _tallest([panel])
            if right:
                _draw_white(draw, (corner[0] + 8, corner[1] + shape[1] // 2 - 8), "R")
            if mm:
                scale = shape[0] / (panel.pixels.shape[1] * mm)  # pixels per mm
                _draw_scale_bar(draw, (corner[0] + 10, corner[1] + shape[1] - 10), scale)
        top += line_height
    if colour_bar:
        _draw_colour_bar(figure, draw, (_GAP, top), colour_bar)
        top += bar
    for number, line in enumerate(below):
        draw.text((_GAP, top + _LINE * number), line, fill=_QUIET, font=text.font(14))
    picture.write_png(path, figure)


def _heading(heading: str) -> int:
    return _LINE + 8 if heading else 0


def _notes(panel: Panel) -> list[str]:
    """The lines below the title."""
    return panel.note.splitlines() or [""]


def _tallest(panels: Sequence[Panel]) -> int:
    return max(round(_WIDTH * panel.pixels.shape[0] / panel.pixels.shape[1]) for panel in panels)


def _draw_panel(
    figure: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], panel: Panel
) -> None:
    """Draws a picture with its top left at `corner`, and its title and note above."""
    left, top = corner
    bold, face = text.font(15, bold=True), text.font(14)
    notes = _notes(panel)
    title = text.shorten(panel.title, _WIDTH, bold)
    draw.text((left, top - _LINE * (1 + len(notes))), title, fill=_INK, font=bold)
    for number, note in enumerate(notes):
        place = left, top - _LINE * (len(notes) - number)
        draw.text(place, text.shorten(note, _WIDTH, face), fill=_QUIET, font=face)
    pixels = Image.fromarray(panel.pixels)
    shape = _WIDTH, _tallest([panel])
    figure.paste(pixels.resize(shape, Image.Resampling.BICUBIC), corner)


def bar_length(width: float) -> int:
    """The mm of the longest scale bar that takes at most 30 % of a picture of `width` mm."""
    return max((mm for mm in _BAR_LENGTHS if mm <= 0.3 * width), default=_BAR_LENGTHS[0])


def _draw_scale_bar(draw: ImageDraw.ImageDraw, corner: tuple[int, int], scale: float) -> None:
    """Draws a scale bar, its bottom left at `corner`, at `scale` pixels per mm."""
    left, bottom = corner
    mm = bar_length(_WIDTH / scale)
    right = left + round(mm * scale)
    draw.rectangle((left - 1, bottom - 5, right + 1, bottom), fill=(0, 0, 0))
    draw.rectangle((left, bottom - 4, right, bottom - 1), fill=(255, 255, 255))
    label = f"{mm // 10} cm" if mm >= 10 else f"{mm} mm"
    _draw_white(draw, (left, bottom - 23), label)


def _draw_white(draw: ImageDraw.ImageDraw, place: tuple[int, int], label: str) -> None:
    """Writes white text with a black edge, readable on any picture."""
    white, black = (255, 255, 255), (0, 0, 0)
    draw.text(place, label, fill=white, font=text.font(14), stroke_width=2, stroke_fill=black)


def _draw_colour_bar(
    figure: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], largest: float
) -> None:
    """Draws the colours of attribution maps over a middle grey, with the values at its ends."""
    left, top = corner
    values = np.repeat(np.linspace(-1, 1, _WIDTH, dtype=np.float32)[None], 14, axis=0)
    grey = np.full(values.shape, 96, np.uint8)
    bar = overlay.over(grey, overlay.colours(values, 1.0))
    figure.paste(Image.fromarray(bar), (left, top))
    face = text.font(14)
    middle = left + _WIDTH / 2 - face.getlength("0") / 2
    lowers, raises = f"\N{MINUS SIGN}{largest:.2g} lowers", f"raises +{largest:.2g}"
    right = left + _WIDTH - face.getlength(raises)
    for place, label in ((left, lowers), (middle, "0"), (right, raises)):
        draw.text((place, top + 17), label, fill=_INK, font=face)
