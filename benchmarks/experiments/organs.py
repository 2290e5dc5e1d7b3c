"""Measures whether attributions lie inside the organ of the label, on a phantom with known organs.

    python benchmarks/experiments/organs.py --folder runs/organs  # draws a phantom and trains on it
    python benchmarks/experiments/organs.py --workdir demo/rounds/round-1 --masks demo/phantom/masks
    python benchmarks/experiments/organs.py --quick  # small phantom, only to see it run

For each image of the split and each visible organ whose label the network predicts: the share of
the positive attribution mass in the body that lies inside the organ, against the organ's share of
the body (chance); and the mean confidence while pixels are deleted in the order of the map, against
a random order. Intervals resample patients.

In the phantom that this script draws, each optional organ is absent in up to half of the patients.
Where organs always occur together, a network may recognize one by the others, and maps that point
at those are right.

Expect about 0.21 of the mass inside the organ, 0.13 by chance (benchmarks/RESULTS.md). The full run
trains 24 epochs on 800 phantom patients at 96 x 96; its duration was not recorded.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from benchmarks import harness
from benchmarks.experiments import organ_maps
from benchmarks.experiments.organ_maps import Row
from maknet_jax import files, phantom, prepare, train
from maknet_jax.cli import options
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain.masks import find_regions
from maknet_jax.explain.network import open_networks
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.explain.selection import select
from maknet_jax.runs import config as configs

FULL = {"images": 200, "steps": 50}
TRAINING = {"patients": 800, "epochs": 24, "size": 96, "seed": 0}
QUICK = {"images": 12, "steps": 10}
QUICK_TRAINING = {"patients": 60, "epochs": 12, "size": 64, "seed": 0}
AUGMENTATION = [f"augment.{kind}_probability=0.5" for kind in ("rotation", "crop", "contrast")]
SHARES = np.linspace(0, 1, 21)  # of the pixels deleted or inserted


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__, repeats=False)
    parser.add_argument("--workdir", help="run trained on a phantom (default: train one)")
    parser.add_argument("--masks", help="masks of that phantom")
    parser.add_argument("--folder", help="folder for the training run (default: temporary)")
    parser.add_argument(
        "--patients", type=options.count, help="patients of the phantom to train on"
    )
    parser.add_argument("--epochs", type=options.count, help="training epochs")
    parser.add_argument("--seed", type=int, help="seed of the phantom and the training")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--images", type=options.count, help="maximal number of images")
    parser.add_argument("--steps", type=options.count, help="steps of the path")
    parser.add_argument(
        "--baseline",
        default="-400",
        help="black, blurred or HU (default: -400, between lung and soft tissue, because pixels "
        "equal to the baseline get no attribution)",
    )
    parser.add_argument(
        "--least", type=float, default=0.5, help="minimal confidence of a label (default: 0.5)"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=1.0,
        help="sigma in pixels of the blur of maps before ranking",
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    if bool(chosen.workdir) != bool(chosen.masks):
        raise InputError("--workdir and --masks need each other: pass both, or neither to train")
    for name, value in (QUICK_TRAINING if chosen.quick else TRAINING).items():
        option = getattr(chosen, name)
        if chosen.workdir and option is not None:
            raise InputError(f"--{name} {option} applies to training only: omit it with --workdir")
        if not chosen.workdir and option is None:
            setattr(chosen, name, value)
    with harness.run_folder(chosen.folder, "--folder") as folder:
        workdir, masks = chosen.workdir, chosen.masks
        if not workdir:
            workdir, masks = train_on_phantom(folder, chosen)
        rows = measure(workdir, pathlib.Path(masks), chosen)
    if not rows:
        raise InputError(
            f"{workdir} predicts no organ in split {chosen.split!r} with confidence {chosen.least} "
            "or more: lower --least"
        )
    results = summarize(rows)
    cells = [
        [
            name,
            *(
                "{:.3f} ({:.3f} to {:.3f})".format(*results[name][kind])
                for kind in ("map", "random", "difference")
            ),
        ]
        for name in results
    ]
    flagged, labels = np.mean([row["flagged"] for row in rows]), list(_by_label(rows))
    harness.report(
        __file__,
        argv,
        chosen,
        ["", "map", "chance", "difference"],
        cells,
        [
            f"{len(rows)} labels of {len({row['id'] for row in rows})} images of "
            f"{len({row['patient'] for row in rows})} patients; means over patients, 95 % "
            f"intervals by resampling patients; {flagged:.1%} of the maps flagged as incomplete",
            "mass inside over chance: "
            + ", ".join(
                f"{row['label']} {row['inside'] / row['chance']:.1f}x"
                for row in sorted(labels, key=lambda row: -row["inside"] / row["chance"])
            ),
        ],
        {"results": results, "rows": labels},
    )


def train_on_phantom(
    folder: pathlib.Path, chosen: argparse.Namespace
) -> tuple[pathlib.Path, pathlib.Path]:
    """Draws a phantom and trains the small MAKNet on it; returns (workdir, masks)."""
    paths = phantom.open_phantom(
        folder / "phantom",
        patients=chosen.patients,
        unlabelled_volumes=0,
        seed=chosen.seed,
        absent=0.5,
    )
    if not (folder / "shards" / "dataset.json").exists():
        prepare.prepare_deeplesion(
            out=folder / "shards", size=chosen.size, **phantom.deeplesion_files(paths)
        )
    changes = [f"data.path={folder / 'shards'}", f"data.size={chosen.size}", f"seed={chosen.seed}"]
    config = configs.load("smoke", [*changes, *AUGMENTATION, f"epochs={chosen.epochs:.1f}"])
    train.train(config, folder / "run")
    return folder / "run", paths["masks"]


def measure(
    workdir: str | pathlib.Path, masks: pathlib.Path, chosen: argparse.Namespace
) -> list[Row]:
    """Explains every visible organ that the network predicts in an image of the split.

    Args:
      workdir: a trained run.
      masks: folder of the phantom's masks.
      chosen: the options.

    Returns:
      The rows of `organ_maps.measure`.
    """
    # One device: images are explained one by one, each with a different number of labels.
    net = open_networks(workdir, devices=jax.local_devices()[:1])[0]
    organs = set(files.read_json(masks / "organs.json").values())
    labels = {
        column: name for column, name in enumerate(net.run.vocabulary.names) if name in organs
    }
    selection = select(net.run, SelectionOptions(split=chosen.split, limit=chosen.images))
    path = PathOptions(steps=chosen.steps, baseline=chosen.baseline, refine=2)
    how = organ_maps.MapOptions(path, chosen.smooth, SHARES)
    rows: list[Row] = []
    for number, reader in enumerate(selection.readers):
        image = reader()
        scores = net.confidences(net.put(image.image[None]))[0]
        regions = {}
        for column, name in labels.items():
            if scores[column] >= chosen.least:
                try:
                    regions[column] = find_regions(
                        image, masks=masks / "deeplesion", organs=[name], size=len(image.image)
                    )[name]
                except Rejected:
                    continue  # predicted, but not visible in this slice
        if regions:
            rows += organ_maps.measure(net, image, number, regions, how)[0]
    return rows


def _by_label(rows: Sequence[Row]) -> Iterator[Row]:
    """Yields a row per label: maps, patients, mean share inside the organ and by chance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    for label, members in sorted(groups.items()):
        yield {
            "label": label,
            "maps": len(members),
            "patients": len({row["patient"] for row in members}),
            "inside": float(np.mean([row["inside"] for row in members])),
            "chance": float(np.mean([row["chance"] for row in members])),
            "flagged": sum(bool(row["flagged"]) for row in members),
        }


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Measure -> "map", "random" and "difference", each (mean, low, high) over patients."""
    pairs: dict[str, tuple[Callable[[Row], float], Callable[[Row], float]]] = {
        "mass inside the organ": (lambda row: row["inside"], lambda row: row["chance"]),
        "confidence while deleting": (lambda row: row["areas"][0], lambda row: row["areas"][2]),
        "confidence while inserting": (lambda row: row["areas"][1], lambda row: row["areas"][3]),
    }
    results = {}
    for name, values in pairs.items():
        one, other = (organ_maps.by_patient(rows, value) for value in values)
        difference = {patient: one[patient] - other[patient] for patient in one}
        each = {"map": one, "random": other, "difference": difference}
        results[name] = {kind: organ_maps.interval(means) for kind, means in each.items()}
    return results


if __name__ == "__main__":
    harness.run(main)
