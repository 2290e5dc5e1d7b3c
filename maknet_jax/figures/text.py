"""Text in pictures drawn with Pillow: fonts, and text that fits a width."""

import functools
import pathlib

from PIL import ImageFont


@functools.lru_cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it; `size` in pixels."""
    import matplotlib  # only for its fonts: Pillow's own has no accents

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def shorten(text: str, width: float, face: ImageFont.FreeTypeFont) -> str:
    """The text with its middle replaced by an ellipsis if it is wider than `width` pixels.

    Ids often share their beginning and differ at the end, so twice as much of the end is kept.
    """
    if face.getlength(text) <= width:
        return text
    for count in range(len(text) - 1, 0, -1):
        start = count // 3
        short = f"{text[:start]}…{text[len(text) - (count - start) :]}"
        if face.getlength(short) <= width:
            return short
    return "…"


def wrap(text: str, width: float, face: ImageFont.FreeTypeFont) -> list[str]:
    """The words of a text in lines of at most `width` pixels; longer words are shortened."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shorten(line, width, face) for line in lines]
