"""A picture of many examples at once: a flip, a wrong window or a bad crop is seen at a glance."""

import numpy as np
from PIL import Image, ImageDraw

from maknet_jax import files
from maknet_jax.errors import InputError

SOFT_TISSUE = (-160.0, 240.0)  # HU, the usual abdominal display window
_TILE, _TEXT = 192, 40


def to_grey(hu, window=SOFT_TISSUE):
    """HU of any shape -> uint8, `window` (low, high) mapped to 0..255."""
    low, high = window
    if not low < high:
        raise InputError(f"window {low},{high}: the low end must lie below the high end")
    return np.clip((hu.astype(np.float32) - low) * (255.0 / (high - low)), 0, 255).astype(np.uint8)


def sample(dataset, count):
    """`count` random examples of a `records.Dataset`, over all splits; always the same ones."""
    places = [
        (split, number)
        for split, entry in dataset.info["splits"].items()
        for number in range(entry["count"])
    ]
    generator = np.random.default_rng(0)
    chosen = sorted(generator.choice(len(places), min(count, len(places)), replace=False))
    sources = {split: dataset.source(split) for split in dataset.info["splits"]}
    return [sources[places[number][0]][places[number][1]] for number in chosen]


def write_contact_sheet(path, examples, names, *, columns=6, window=SOFT_TISSUE):
    """Writes a PNG: middle slices in rows, each with its id, its labels and its box.

    Args:
      path: the PNG.
      examples: a sequence of `records.Example`.
      names: the label names in column order.
      columns: tiles in a row.
      window: the display window in HU.
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
            # A box counts pixels by their middles.
            places = (np.asarray(example.meta["box"]) + 0.5) * (_TILE - 4) / len(example.image)
            draw.rectangle([*(places + [left + 2, top + 2] * 2)], outline=(255, 180, 0))
        labels = [names[column] for column in np.flatnonzero(example.labels)]
        lines = [example.id[:30], *_wrap(", ".join(labels) or "no label", 31)[:2]]
        for line, text in enumerate(lines):
            colour = (150, 200, 255) if line == 0 else (230, 230, 230)
            draw.text((left + 3, top + _TILE - 2 + 13 * line), text, fill=colour)
    with files.write_whole(path, "wb") as file:
        sheet.save(file, format="PNG")


def _wrap(text, width):
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
