r"""Figure 3 on real patients: do attributions lie inside the contoured organ of the label?

    python benchmarks/experiments/attribution_organs.py \
        --workdirs runs/maknet,runs/vgg16 --masks openkbp/train --folder runs/figure3
    python benchmarks/experiments/attribution_organs.py --workdirs RUN --quick  # to see it run

Takes one or two runs on data of `maknet prepare segmentations`. For a few images per patient and
organ: the share of the positive attribution mass in the body that lies inside the organ, against
the organ's share of the body (chance); and the mean confidence while pixels are deleted, or
inserted, in the order of the map, against a random order within the body. Maps are of labels that
are present and that the network predicts. A second control is the share of |image - baseline|
inside the organ: the map of a network whose gradient is equal everywhere.

Means are over patients, with 95 % intervals by resampling patients. Organs with fewer than 20
patients are listed below the mean and are not part of it. Networks are compared on the labels that
both predict. The default split are the tuning patients. FOLDER/maps.png shows one image per organ,
the median by mass inside over chance.

Resumes in --folder if interrupted. `attribution_sanity.py` has the checks with random weights and
random labels.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.experiments import organ_maps
from benchmarks.experiments.organ_maps import LEAST_PATIENTS, Row
from maknet_jax import console
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.explain import results
from maknet_jax.explain.network import Network
from maknet_jax.explain.options import PathOptions
from maknet_jax.explain.selection import SelectedImage

FULL = {"patients": None, "per_organ": 1, "steps": 50, "shares": 21, "refine": 0}
QUICK = {"patients": 3, "per_organ": 1, "steps": 8, "shares": 5, "refine": 0}
HEADER = (
    "organ, network",
    "patients",
    "maps",
    "mass inside",
    "body",
    "times chance",
    "by input",
    "deletion - random",
    "insertion - random",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Explains, prints the table, writes the JSON and the pictures."""
    parser = organ_maps.parser(__file__, __doc__)
    parser.add_argument(
        "--least", type=float, default=0.5, help="minimal confidence of a label (default: 0.5)"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=1.0,
        help="sigma in pixels of the blur of maps before ranking (default: 1)",
    )
    parser.add_argument("--shares", type=options.count, help="points of the curves (default: 21)")
    parser.add_argument(
        "--refine", type=int, help="times that the steps of incomplete maps double (default: 0)"
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    networks, selection, settings = organ_maps.open_images(chosen)
    path = PathOptions(steps=chosen.steps, baseline=chosen.baseline, refine=chosen.refine)
    how = organ_maps.MapOptions(path, chosen.smooth, np.linspace(0, 1, chosen.shares))
    settings |= {"refine": chosen.refine, "smooth": chosen.smooth, "shares": chosen.shares}

    def explain_image(image: SelectedImage, number: int) -> results.Result:
        regions = organ_maps.label_regions(image, networks[0], settings["parts"])
        arrays = {"image": image.image[..., 1], "regions": np.array(list(regions.values()))}
        rows = []
        for place, net in enumerate(networks):
            measured, arrays[f"maps_{place}"] = organ_maps.measure(net, image, number, regions, how)
            rows.append(measured)
        return {"id": image.id, "rows": rows}, arrays

    with harness.run_folder(chosen.folder, "--folder") as folder:
        paths, failures = organ_maps.explain(__file__, folder, selection, settings, explain_image)
        stored = [results.load_metadata(path)["rows"] for path in paths]
        predicted = [
            [row for image in stored for row in image[place] if row["confidence"] >= chosen.least]
            for place in range(len(networks))
        ]
        if not all(predicted):
            raise InputError(
                f"one of {','.join(chosen.workdirs)} predicts no organ with confidence "
                f"{chosen.least} or more: lower --least"
            )
        draw(folder / "maps.png", paths, networks, predicted[0])
    document = summarize(predicted, [net.name for net in networks])
    report(argv, chosen, document, predicted, len(paths), failures)


def summarize(predicted: Sequence[Sequence[Row]], names: Sequence[str]) -> dict[str, Any]:
    """The results of networks, and the first minus the second.

    Args:
      predicted: for each network the rows of the labels that it predicts.
      names: the names of the networks.

    Returns:
      `networks`: name -> organ -> patients, maps, intervals; the organ "mean" is over all organs
      with at least 20 patients. `difference`: organ -> patients and intervals of the first network
      minus the second on the labels that both predict; empty for one network.
    """
    enough = set.intersection(*(organ_maps.with_enough_patients(rows) for rows in predicted))
    groups = {"mean": enough} | {organ: {organ} for organ in sorted(_organs(predicted[0]))}
    document: dict[str, Any] = {"apart": sorted(_organs(predicted[0]) - enough), "difference": {}}
    document["networks"] = {
        name: {
            group: _values([row for row in rows if row["label"] in organs])
            for group, organs in groups.items()
            if any(row["label"] in organs for row in rows)
        }
        for name, rows in zip(names, predicted, strict=True)
    }
    if len(predicted) == 2:
        keys = [{(row["id"], row["label"]) for row in rows} for rows in predicted]
        both = [
            [row for row in rows if (row["id"], row["label"]) in keys[0] & keys[1]]
            for rows in predicted
        ]
        for group, organs in groups.items():
            one, other = ([row for row in rows if row["label"] in organs] for rows in both)
            if one:
                document["difference"][group] = _differences(one, other)
    return document


def _organs(rows: Sequence[Row]) -> set[str]:
    return {row["label"] for row in rows}


def _gains(row: Row) -> tuple[float, float]:
    """Deletion and insertion by the map minus random order."""
    deletion, insertion, random_deletion, random_insertion = row["areas"]
    return deletion - random_deletion, insertion - random_insertion


def _values(rows: Sequence[Row]) -> dict[str, Any]:
    inside, chance, by_input, deletion, insertion = (
        organ_maps.by_patient(rows, value)
        for value in (
            lambda row: row["inside"],
            lambda row: row["chance"],
            lambda row: row["input"],
            lambda row: _gains(row)[0],
            lambda row: _gains(row)[1],
        )
    )
    return {
        "patients": len(inside),
        "maps": len(rows),
        "inside": organ_maps.interval(inside),
        "chance": float(np.mean(list(chance.values()))),
        "times_chance": organ_maps.ratio_interval(inside, chance),
        "input_times_chance": organ_maps.ratio_interval(by_input, chance)[0],
        "deletion": organ_maps.interval(deletion),
        "insertion": organ_maps.interval(insertion),
        "flagged": float(np.mean([row["flagged"] for row in rows])),
        "relative": float(np.median([row["relative"] for row in rows])),
    }


def _differences(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    values = {
        "inside": lambda row: row["inside"],
        "deletion": lambda row: _gains(row)[0],
        "insertion": lambda row: _gains(row)[1],
    }
    result: dict[str, Any] = {"patients": len({row["patient"] for row in one}), "maps": len(one)}
    for name, value in values.items():
        means = (organ_maps.by_patient(rows, value) for rows in (one, other))
        result[name] = organ_maps.paired(*means)
    return result


def draw(
    path: pathlib.Path, files: Sequence[pathlib.Path], networks: Sequence[Network], rows: list[Row]
) -> None:
    """Writes a picture of one image per organ: the CT, and the map of each network.

    Args:
      path: the PNG.
      files: the results of the images.
      networks: the networks.
      rows: of the labels that the first network predicts; the median by mass inside over chance is
        shown.
    """
    pictures = []
    for organ in sorted(_organs(rows)):
        ordered = sorted(
            (row for row in rows if row["label"] == organ),
            key=lambda row: row["inside"] / row["chance"],
        )
        shown = ordered[len(ordered) // 2]
        for file in files:
            metadata, arrays = results.load(file)
            if metadata["id"] != shown["id"]:
                continue
            labels = [row["label"] for row in metadata["rows"][0]]
            at = labels.index(organ)
            hu, region = arrays["image"], arrays["regions"][at]
            line = [(f"{organ} {shown['id']}", organ_maps.draw_map(hu, None, region))]
            for place, net in enumerate(networks):
                row = metadata["rows"][place][at]
                times = row["inside"] / row["chance"]
                caption = f"{net.run.model_name} {row['confidence']:.2f}, {times:.1f}x chance"
                picture = organ_maps.draw_map(hu, arrays[f"maps_{place}"][at], region)
                line.append((caption, picture))
            pictures.append(line)
    organ_maps.write_pictures(path, pictures)


def report(
    argv: Sequence[str] | None,
    chosen: argparse.Namespace,
    document: Mapping[str, Any],
    predicted: Sequence[Sequence[Row]],
    images: int,
    failures: results.Failures,
) -> None:
    """Prints the table and writes the JSON."""
    cells = []
    groups = list(next(iter(document["networks"].values())))
    for group in [group for group in groups if group not in document["apart"]] + document["apart"]:
        for name, organs in document["networks"].items():
            if group in organs:
                title = f"{group}{' (apart)' * (group in document['apart'])}, {name}"
                cells.append([title, *_cells(organs[group])])
    notes = [
        f"{images} images; labels present and predicted with confidence {chosen.least} or more; "
        f"organs with fewer than {LEAST_PATIENTS} patients are apart from the mean; split "
        f"{chosen.split}",
        "incomplete maps (1 %): "
        + ", ".join(f"{np.mean([row['flagged'] for row in rows]):.0%}" for rows in predicted)
        + "; median completeness error "
        + ", ".join(f"{np.median([row['relative'] for row in rows]):.2%}" for rows in predicted),
    ]
    for group, values in document["difference"].items():
        text = ", ".join(
            f"{name} {console.format_interval(values[name], signed=True)}"
            for name in ("inside", "deletion", "insertion")
        )
        notes.append(f"first minus second, {group} ({values['patients']} patients): {text}")
    notes += [f"failed: {name}: {reason}" for name, reason in failures]
    harness.report(__file__, argv, chosen, HEADER, cells, notes, organ_maps.rounded(document))


def _cells(values: Mapping[str, Any]) -> list[Any]:
    return [
        values["patients"],
        values["maps"],
        console.format_interval(values["inside"]),
        f"{values['chance']:.3f}",
        console.format_interval(values["times_chance"], 1),
        f"{values['input_times_chance']:.1f}",
        console.format_interval(values["deletion"], signed=True),
        console.format_interval(values["insertion"], signed=True),
    ]


if __name__ == "__main__":
    harness.run(main)
