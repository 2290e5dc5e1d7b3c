r"""Figure 4 on real patients: how confidences change when parts of the image are changed.

    python benchmarks/experiments/perturbation_organs.py \
        --workdirs runs/maknet,runs/vgg16 --masks openkbp/train --folder runs/figure4
    python benchmarks/experiments/perturbation_organs.py --workdirs RUN --quick  # to see it run

The paper (section 5.2) claims that MAKNet's labels change less than VGG16's when an organ is
replaced by its neighbourhood (`neighbour`) or covered by a black patch (`patch`), and drop when the
most influential pixels are deleted (`attribution`). Each change is compared with the same change of
a random region of equal area in the same body: the organ's shape at another place that does not
touch it (a compact region of equal area where it does not fit); for `attribution` as many pixels of
the body, the largest of a random map with the same spectrum. Changes of up to five labels count,
those that the network predicts in the original.

Drops of confidence are averaged over the labels of an image, then over the images of a patient;
intervals resample patients. Networks are compared on the images in which both predict a label. The
default split are the tuning patients. Organs with fewer than 20 patients are listed per organ only.
FOLDER/changes.png shows one image of each of the first six patients. Resumes in --folder.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import signal

from benchmarks import harness
from benchmarks.experiments import organ_maps
from benchmarks.experiments.organ_maps import Row
from maknet_jax import console
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.explain import results
from maknet_jax.explain.network import Network
from maknet_jax.explain.options import SHARE, PathOptions
from maknet_jax.explain.selection import SelectedImage

FULL = {"patients": None, "per_organ": 1, "steps": 50, "draws": 5}
QUICK = {"patients": 2, "per_organ": 1, "steps": 8, "draws": 2}
STRATEGIES = ("neighbour", "patch", "attribution")
TOP = 5  # labels
BATCH = 8  # images per call
SHOWN = 6  # patients in the picture
MEASURES = {
    "drop": lambda row: row["drop"],
    "control": lambda row: row["control"],
    "difference": lambda row: row["drop"] - row["control"],
    "kept": lambda row: row["kept"],
    "kept_control": lambda row: row["kept_control"],
}
HEADER = (
    *("change, network", "patients", "images", "drop", "drop, random region", "difference"),
    *("labels kept", "kept, random"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Perturbs, prints the table, writes the JSON and the picture."""
    parser = organ_maps.parser(__file__, __doc__)
    parser.add_argument(
        "--least", type=float, default=0.5, help="minimal confidence of a label (default: 0.5)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="share of the pixels that attribution deletes (default: %(default)s)",
    )
    parser.add_argument(
        "--draws", type=options.count, help="random regions per change (default: 5)"
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    networks, selection, settings = organ_maps.open_images(chosen)
    settings |= {"least": chosen.least, "share": chosen.share, "draws": chosen.draws}

    with harness.run_folder(chosen.folder, "--folder") as folder:
        paths, failures = organ_maps.explain(
            __file__,
            folder,
            selection,
            settings,
            lambda image, number: perturbed(networks, image, number, settings),
        )
        stored = [results.load_metadata(path)["rows"] for path in paths]
        rows = [[row for image in stored for row in image[place]] for place in range(len(networks))]
        if not all(rows):
            raise InputError(
                f"one of {','.join(chosen.workdirs)} predicts no label with confidence "
                f"{chosen.least} or more: lower --least"
            )
        draw(folder / "changes.png", paths, networks)
    document = summarize(rows, [net.name for net in networks])
    report(argv, chosen, document, len(paths), failures)


def random_region(
    region: np.ndarray, body: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """A random region of equal area inside the body that does not overlap the region.

    It has the shape of the region, at a random one of all places where that fits; if it fits
    nowhere, it is the pixels nearest to a random one. If the rest of the body is smaller than the
    region, it is all of it.

    Args:
      region: bool `[H, W]`, not empty.
      body: bool `[H, W]`.
      generator: the source of randomness.

    Returns:
      bool `[H, W]`.
    """
    allowed, area = body & ~region, int(region.sum())
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    shape = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    fits = signal.correlate(allowed.astype(float), shape.astype(float), mode="valid")
    places = np.argwhere(fits > area - 0.5)
    result = np.zeros_like(region)
    if len(places):
        top, left = places[generator.integers(len(places))]
        result[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        return result
    pixels = np.argwhere(allowed)
    if len(pixels):
        distance = ((pixels - pixels[generator.integers(len(pixels))]) ** 2).sum(axis=1)
        nearest = pixels[np.argsort(distance, kind="stable")[:area]]
        result[tuple(nearest.T)] = True
    return result


def random_pixels(
    values: np.ndarray, body: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """The largest pixels in the body of a random map with the spectrum of another map.

    They are scattered or clustered like the largest pixels of that map.

    Args:
      values: the map `[S, S]`.
      body: bool `[S, S]`; pixels outside come last.
      count: number of pixels.
      generator: the source of randomness.

    Returns:
      bool `[S, S]`.
    """
    phases = np.angle(np.fft.fft2(generator.normal(size=values.shape)))
    surrogate = np.fft.ifft2(np.abs(np.fft.fft2(values)) * np.exp(1j * phases)).real
    return faithfulness.ranks(np.where(body, surrogate, -np.inf)) < count


def perturbed(
    networks: Sequence[Network], image: SelectedImage, number: int, settings: dict[str, Any]
) -> results.Result:
    """Changes an image in all ways and scores the results.

    Args:
      networks: the networks.
      image: the image.
      number: of the image, the seed of the random regions.
      settings: of `organ_maps.open_images`, with least, share and draws.

    Returns:
      (metadata, arrays): `rows` of each network have patient, id, strategy, organ ("" for
      attribution), area (share of the body), and over its labels the means of `drop` (confidence in
      the original minus that after the change), `kept` (still predicted), and of the same for the
      random regions: `control` and `kept_control`; `own` has these four for the organ's own label,
      None if it is not predicted. The arrays are the pictures.
    """
    hu, body = image.image, organ_maps.body_of(image.image)
    black = np.full_like(hu, perturbation.AIR)
    regions = organ_maps.label_regions(image, networks[0], settings["parts"])
    # (strategy, column of the organ, area, changed image, its random controls)
    common: list[tuple[str, int, float, np.ndarray, list[np.ndarray]]] = []
    for column, region in regions.items():
        generator = np.random.default_rng([number, column])
        covered = perturbation.patch(np.zeros((*region.shape, 1), np.int16), region, 1)[..., 0] > 0
        # Black patches of air change nothing: the control covers as much of the body.
        for strategy, changed in (("neighbour", region), ("patch", covered & (body | region))):
            controls = [random_region(changed, body, generator) for _ in range(settings["draws"])]
            forms = [
                perturbation.neighbour(hu, mask)
                if strategy == "neighbour"
                else perturbation.delete(hu, mask, black)
                for mask in (changed, *controls)
            ]
            common.append((strategy, column, np.mean(changed) / np.mean(body), forms[0], forms[1:]))
    rows: list[list[Row]] = []
    arrays = {"image": hu[..., 1]}
    for place, net in enumerate(networks):
        before = _confidences(net, [hu])[0]
        top = np.flatnonzero(before >= settings["least"])
        top = top[np.argsort(-before[top], kind="stable")][:TOP]
        if not top.size:
            rows.append([])
            continue
        base, values = _influential(net, hu, top, settings)
        mask = perturbation.most_influential(values, settings["share"])
        masks = [mask]
        for draw_number in range(settings["draws"]):
            generator = np.random.default_rng([number, draw_number])
            masks.append(random_pixels(values, body, int(mask.sum()), generator))
        deleted, *controls = [perturbation.delete(hu, one, base) for one in masks]
        changes = [*common, ("attribution", -1, np.mean(mask) / np.mean(body), deleted, controls)]
        scores = _confidences(net, [form for *_, one, many in changes for form in (one, *many)])
        scores = scores.reshape(len(changes), 1 + settings["draws"], -1)
        measured = []
        for (strategy, column, area, *_), after in zip(changes, scores, strict=True):
            row: Row = {
                "patient": image.group,
                "id": image.id,
                "strategy": strategy,
                "organ": net.run.vocabulary.names[column] if column >= 0 else "",
                "area": float(area),
                **_changes(before[top], after[:, top], settings["least"]),
                "own": None,
            }
            if column in top:
                after = after[:, [column]]
                row["own"] = _changes(before[[column]], after, settings["least"])
            measured.append(row)
        rows.append(measured)
        arrays[f"attribution_{place}"] = np.stack([deleted[..., 1], controls[0][..., 1]])
    arrays["changes"] = np.array([[one[..., 1], many[0][..., 1]] for *_, one, many in common])
    return {"id": image.id, "patient": image.group, "rows": rows}, arrays


def _changes(before: np.ndarray, after: np.ndarray, least: float) -> dict[str, float]:
    """The measures of labels `[T]` before, and `[1 + draws, T]` after a change and its controls."""
    drops, kept = (before - after).mean(axis=1), (after >= least).mean(axis=1)
    return {
        "drop": float(drops[0]),
        "control": float(drops[1:].mean()),
        "kept": float(kept[0]),
        "kept_control": float(kept[1:].mean()),
    }


def _influential(
    net: Network, hu: np.ndarray, columns: np.ndarray, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(baseline in HU, sum of the maps of some labels `[S, S]`)."""
    path = PathOptions(steps=settings["steps"], baseline=settings["baseline"], refine=0)
    base = perturbation.make_baseline(hu, path.baseline)
    images, start = net.put(hu[None]), net.put(base[None])
    targets = columns[:, None, None]
    maps = [net.attribute(images, target, start, path).maps[0, 0] for target in targets]
    return base, np.sum(maps, axis=(0, 3))


def _confidences(net: Network, forms: Sequence[np.ndarray]) -> np.ndarray:
    """`[N, K]` of N images, in padded batches, so that one program is compiled."""
    stack = np.stack([*forms, *[forms[0]] * (-len(forms) % BATCH)])
    parts = [net.put(stack[start : start + BATCH]) for start in range(0, len(stack), BATCH)]
    return np.concatenate([net.confidences(part) for part in parts])[: len(forms)]


def summarize(rows: Sequence[Sequence[Row]], names: Sequence[str]) -> dict[str, Any]:
    """Intervals by change, of each network and of the first minus the second.

    Args:
      rows: of each network, see `perturbed`.
      names: the names of the networks.

    Returns:
      `changes`: change -> network -> patients, images and (mean, low, high) of drop, control,
      difference (drop minus control), kept and kept_control; and, for two networks, "first minus
      second" on the same images. A change is a strategy, over all organs with at least 20 patients;
      "own label" counts the label of the organ that is changed only, over these organs or one.
    """
    enough = set.intersection(*(_with_enough_patients(part) for part in rows))
    organs = sorted({row["organ"] for row in rows[0]} - {""})
    changes: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:
        of = [[row for row in part if row["strategy"] == strategy] for part in rows]
        if strategy == "attribution":
            changes[strategy] = _by_network(of, names)
            continue
        own = [[row | row["own"] for row in part if row["own"]] for part in of]
        changes[strategy] = _by_network(_of_organs(of, enough), names)
        changes[f"{strategy}, own label"] = _by_network(_of_organs(own, enough), names)
        for organ in organs:
            of_organ = _of_organs(own, {organ})
            changes[f"{strategy}, own label, {organ}"] = _by_network(of_organ, names)
    return {"changes": changes, "apart": sorted(set(organs) - enough)}


def _of_organs(rows: Sequence[Sequence[Row]], organs: set[str]) -> list[list[Row]]:
    return [[row for row in part if row["organ"] in organs] for part in rows]


def _with_enough_patients(rows: Sequence[Row]) -> set[str]:
    labels = [row | {"label": row["organ"]} for row in rows if row["organ"]]
    return organ_maps.with_enough_patients(labels)


def _by_network(rows: Sequence[Sequence[Row]], names: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, part in zip(names, rows, strict=True):
        if part:
            result[name] = _counts(part) | {
                measure: organ_maps.interval(organ_maps.by_patient(part, value))
                for measure, value in MEASURES.items()
            }
    if len(rows) == 2:
        shared = set.intersection(*({(row["id"], row["organ"]) for row in part} for part in rows))
        both = [[row for row in part if (row["id"], row["organ"]) in shared] for part in rows]
        if shared:
            result["first minus second"] = _counts(both[0]) | {
                measure: organ_maps.paired(*(organ_maps.by_patient(part, value) for part in both))
                for measure, value in MEASURES.items()
            }
    return result


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "patients": len({row["patient"] for row in rows}),
        "images": len({row["id"] for row in rows}),
    }


def draw(path: pathlib.Path, files: Sequence[pathlib.Path], networks: Sequence[Network]) -> None:
    """Writes a picture: for an image of each of the first patients all changes with their drops.

    Args:
      path: the PNG.
      files: the results of the images.
      networks: the networks.
    """
    shown: dict[str, pathlib.Path] = {}
    for file in files:
        metadata = results.load_metadata(file)
        if all(metadata["rows"]):
            shown.setdefault(metadata["patient"], file)
    pictures = []
    for file in list(shown.values())[:SHOWN]:
        metadata, arrays = results.load(file)
        nothing = np.zeros(arrays["image"].shape, bool)
        line = [(metadata["id"], organ_maps.draw_map(arrays["image"], None, nothing))]
        drops = list(zip(*metadata["rows"], strict=True))  # by change, then by network
        # The largest organ; each has two changes, and the last change is attribution.
        areas = [rows[0]["area"] for rows in drops[:-1:2]]
        largest = slice(2 * int(np.argmax(areas)), 2 * int(np.argmax(areas)) + 2)
        for pair, rows in zip(arrays["changes"][largest], drops[largest], strict=True):
            titles = f"{rows[0]['strategy']} {rows[0]['organ']}", "random region"
            for form, key, title in zip(pair, ("drop", "control"), titles, strict=True):
                values = " ".join(f"{row[key]:+.2f}" for row in rows)
                line.append((f"{title} {values}", organ_maps.draw_map(form, None, nothing)))
        for place, net in enumerate(networks):
            row = metadata["rows"][place][-1]
            pair = arrays[f"attribution_{place}"]
            for form, key, kind in zip(pair, ("drop", "control"), ("", "random"), strict=True):
                caption = f"{kind or 'attribution'} {net.run.model_name} {row[key]:+.2f}"
                line.append((caption, organ_maps.draw_map(form, None, nothing)))
        pictures.append(line)
    if pictures:
        organ_maps.write_pictures(path, pictures)


def report(
    argv: Sequence[str] | None,
    chosen: argparse.Namespace,
    document: Mapping[str, Any],
    images: int,
    failures: results.Failures,
) -> None:
    """Prints the table and writes the JSON."""
    cells = [
        [
            f"{change}{' (apart)' * any(organ in change for organ in document['apart'])}, {name}",
            values["patients"],
            values["images"],
            *(
                console.format_interval(values[measure], signed=True)
                for measure in ("drop", "control", "difference")
            ),
            *(f"{values[measure][0]:+.2f}" for measure in ("kept", "kept_control")),
        ]
        for change, networks in document["changes"].items()
        for name, values in networks.items()
    ]
    notes = [
        f"{images} images, split {chosen.split}; drop: mean over the predicted labels (at least "
        f"{chosen.least}, at most {TOP}) of the confidence before minus after; {chosen.draws} "
        f"random regions per change; attribution deletes {chosen.share:.0%} of the pixels",
        *(f"failed: {name}: {reason}" for name, reason in failures),
    ]
    harness.report(__file__, argv, chosen, HEADER, cells, notes, organ_maps.rounded(document))


if __name__ == "__main__":
    harness.run(main)
