"""Draws docs/images/overview.webp from the demo: CT, predicted labels and attributions.

    maknet demo --out demo
    python docs/images/overview.py --demo demo --out docs/images/overview.webp

For each of three labels, shows the slice of the hand-labelled split with this label for which the
student is most confident. Everything is generated: there are no patients.
"""

import argparse
import pathlib

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.data import records
from maknet_jax.explain import source_slices
from maknet_jax.explain.network import open_networks
from maknet_jax.figures import overlay, picture

LABELS = ("mediastinum", "liver", "urinary bladder")
SHOWN = 4  # labels per slice
TILE, GAP, LINE = 372, 30, 42  # pixels
RIGHT, WRONG, GREY = (110, 220, 130), (255, 110, 110), (225, 225, 225)


def main() -> None:
    """Reads the demo and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=pathlib.Path, required=True, help="folder of `maknet demo`")
    parser.add_argument("--out", required=True, help="the WebP to write")
    chosen = parser.parse_args()
    (network,) = open_networks(chosen.demo / "rounds" / "round-1")
    dataset = records.open_dataset(chosen.demo / "shards")
    source, names = dataset.source("hand"), dataset.vocabulary.names
    examples = [source[number] for number in range(len(source))]
    images = network.put(np.stack([example.image for example in examples]))
    scores = network.confidences(images)
    height = 2 * (TILE + GAP) + (SHOWN + 1) * LINE + 24
    sheet = Image.new("RGB", (len(LABELS) * (TILE + GAP) + GAP, height), (20, 20, 20))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 29)
    for place, label in enumerate(LABELS):
        column = names.index(label)
        has_label = np.asarray([example.labels[column] for example in examples]) > 0
        number = int(np.argmax(np.where(has_label, scores[:, column], -1)))
        example = examples[number]
        attribution = ig.integrated_gradients(
            network.logit_fn, images[number : number + 1], [[column]], baseline=0.0, refine=4
        )
        print(label, example.id, "incomplete" if attribution.flagged.any() else "complete")
        left, top = GAP + place * (TILE + GAP), GAP
        grey = _slice(chosen.demo, example)
        sheet.paste(Image.fromarray(grey), (left, top))
        top += TILE + 6
        best = np.argsort(-scores[number], kind="stable")[:SHOWN]
        for row, k in enumerate(best.tolist()):
            colour = RIGHT if example.labels[k] else WRONG
            draw.text((left, top + row * LINE), names[k], fill=colour, font=font)
            text = f"{scores[number, k]:.2f}"
            end = left + TILE - draw.textlength(text, font)
            draw.text((end, top + row * LINE), text, fill=colour, font=font)
        top += SHOWN * LINE + GAP
        values = overlay.smooth(attribution.maps[0, 0].sum(axis=-1), sigma=1.5)
        colours = overlay.colours(values, overlay.scale_of(values))
        resized = Image.fromarray(colours).resize((TILE, TILE), Image.Resampling.BICUBIC)
        sheet.paste(Image.fromarray(overlay.over(grey, np.asarray(resized))), (left, top))
        draw.text((left, top + TILE + 6), f"why {label}?", fill=GREY, font=font)
    sheet.save(chosen.out, quality=85)


def _slice(demo: pathlib.Path, example: records.Example) -> np.ndarray:
    """The crop of the slice at its own resolution, as uint8 `[TILE, TILE]`."""
    folder = demo / "phantom" / "deeplesion" / "Images_png"
    hu = source_slices.read_slice(example, folder)
    assert hu is not None, f"{example.meta['file']} is not in {folder}"
    grey = Image.fromarray(picture.to_grey(hu))
    return np.asarray(grey.resize((TILE, TILE), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    main()
