"""Shared by the experiments on organs: images with organ regions, their maps, means over patients.

`organs.py` uses a phantom; `attribution_organs.py`, `attribution_sanity.py` and
`perturbation_organs.py` use real patients with contours.
"""

import argparse
import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks import harness
from benchmarks.experiments import patient_metrics
from benchmarks.real_data import DATA
from maknet_jax.attribution import faithfulness as faith
from maknet_jax.attribution import perturbation
from maknet_jax.cli import options
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation import bootstrap
from maknet_jax.explain import results
from maknet_jax.explain.masks import check_masks, with_regions
from maknet_jax.explain.network import Network, open_networks
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.explain.selection import SelectedImage, Selection, select
from maknet_jax.figures import overlay, picture

BODY_THRESHOLD = -500  # HU
LEAST_PATIENTS = patient_metrics.ENOUGH  # organs with fewer are listed apart
TILE, CAPTION = 256, 18  # pixels of a picture, and of the line above it
WINDOW = (-250.0, 450.0)  # HU of pictures: soft tissue and bone
CONTOUR = (0, 230, 90)

Row = dict[str, Any]  # one label of one image, see `measure`


@dataclasses.dataclass(frozen=True)
class MapOptions:
    """How maps are made and tested.

    Attributes:
      path: the path of Integrated Gradients.
      smooth: sigma in pixels of the blur of maps before pixels are ranked.
      shares: `[F]`, shares of the pixels that are deleted or inserted, from 0 to 1; None omits it.
    """

    path: PathOptions
    smooth: float
    shares: np.ndarray | None


def body_of(hu: np.ndarray) -> np.ndarray:
    """The pixels of the body in the middle slice of HU `[H, W, 3]`: bool `[H, W]`."""
    return ndimage.binary_fill_holes(hu[..., 1] > BODY_THRESHOLD)


def mass_inside(values: np.ndarray, body: np.ndarray, region: np.ndarray) -> float:
    """The share of a map's positive mass in the body that is in a region; 0 without such mass."""
    return float(np.nan_to_num(faith.mass_inside(np.where(body, values, 0), region)))


def measure(
    net: Network,
    image: SelectedImage,
    number: int,
    regions: Mapping[int, np.ndarray],
    how: MapOptions,
) -> tuple[list[Row], np.ndarray]:
    """Explains labels of an image and compares their maps with the regions of their organs.

    Args:
      net: the network.
      image: the image.
      number: of the image, for the seed of the random order.
      regions: column of a label -> bool `[S, S]`.
      how: the options.

    Returns:
      (rows, maps): for each region a row with patient, id, label, `confidence`, `inside` (share of
      the positive attribution mass in the body that is inside the organ), `chance` (the organ's
      share of the body), `input` (its share of |image - baseline|, the map of a network with equal
      gradients), `flagged`, `relative` (completeness error) and `areas` under the curves of
      deletion and insertion by the map, then by random order; maps are float32 `[T, S, S]`.
    """
    hu = net.put(image.image[None])
    start = perturbation.make_baseline(image.image, how.path.baseline)
    baseline, body = net.put(start[None]), body_of(image.image)
    change = np.abs(np.asarray(hu) - np.asarray(baseline))[0].sum(axis=-1)
    rows, maps = [], []
    for column, region in regions.items():
        # One label per call, so that a single program is compiled for any number of labels.
        result = net.attribute(hu, np.array([[column]]), baseline, how.path)
        attribution = result.maps[0, 0].sum(axis=-1)
        maps.append(attribution)
        inside_body = body | region
        row: Row = {
            "patient": image.group,
            "id": image.id,
            "label": net.run.vocabulary.names[column],
            "confidence": float(result.end[0, 0]),
            "inside": mass_inside(attribution, inside_body, region),
            "chance": float(region.sum() / inside_body.sum()),
            "input": mass_inside(change, inside_body, region),
            "flagged": bool(result.flagged[0, 0]),
            "relative": float(result.relative[0, 0]),
        }
        if how.shares is not None:
            noise = np.random.default_rng([number, column]).normal(size=body.shape)
            # Both are smoothed, to differ in location only. In random order air comes last.
            ordered = [overlay.smooth(values, how.smooth) for values in (attribution, noise)]
            ordered[1] = np.where(inside_body, ordered[1], -np.inf)
            row["areas"] = []
            for values in ordered:
                order = faith.ranks(values[None])
                curves = faith.curves(
                    net.logit_fn, hu, np.array([column]), baseline, order, how.shares
                )
                row["areas"] += [float(faith.area(curve, how.shares)[0]) for curve in curves]
        rows.append(row)
    return rows, np.array(maps)


def by_patient(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[str, float]:
    """Patient -> mean of a value over its rows."""
    patients: dict[str, list[float]] = {}
    for row in rows:
        patients.setdefault(row["patient"], []).append(value(row))
    return {patient: float(np.mean(values)) for patient, values in patients.items()}


def interval(patients: Mapping[str, float]) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over patients; 95 % by resampling patients."""
    return faith.bootstrap(list(patients.values()))


def paired(
    one: Mapping[str, float], other: Mapping[str, float]
) -> tuple[float, float, float] | None:
    """The `interval` of one minus other over the patients of both; None if there are none."""
    shared = {patient: one[patient] - other[patient] for patient in one if patient in other}
    return interval(shared) if shared else None


def ratio_interval(
    above: Mapping[str, float], below: Mapping[str, float]
) -> tuple[float, float, float]:
    """(ratio, low, high) of two means over the same patients, by resampling patients."""
    pairs = np.array([(above[patient], below[patient]) for patient in above])
    drawn = np.random.default_rng(0).integers(len(pairs), size=(bootstrap.DRAWS, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    mean = pairs.mean(axis=0)
    return float(mean[0] / mean[1]), float(low), float(high)


def with_enough_patients(rows: Sequence[Row]) -> set[str]:
    """The labels with at least 20 patients; all if none has, as in small trials."""
    patients: dict[str, set[str]] = {}
    for row in rows:
        patients.setdefault(row["label"], set()).add(row["patient"])
    enough = {label for label, members in patients.items() if len(members) >= LEAST_PATIENTS}
    return enough or set(patients)


def parser(file: str, description: str | None) -> options.Parser:
    """The options shared by the experiments on real patients, see `harness.parser`."""
    result = harness.parser(file, description, size=False, repeats=False)
    result.add_argument(
        "--workdirs", type=harness.words, required=True, help="one or two runs, comma-separated"
    )
    result.add_argument("--data", help="prepared data set (default: the one trained on)")
    result.add_argument(
        "--masks",
        default=str(DATA / "openkbp" / "train"),
        help="the cases of the split (default: OpenKBP's training patients)",
    )
    result.add_argument(
        "--split", default="val", help="default: val, the tuning patients; test is for final tables"
    )
    result.add_argument("--folder", help="folder for results (default: temporary)")
    result.add_argument("--patients", type=options.count, help="maximal number of patients")
    result.add_argument("--per-organ", type=options.count, help="images per patient and organ")
    result.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    result.add_argument("--steps", type=options.count, help="steps of the path")
    result.add_argument(
        "--baseline", help="black, blurred or HU (default: black, as in the paper)", default="black"
    )
    return result


def open_images(
    chosen: argparse.Namespace, *, most: int | None = None
) -> tuple[list[Network], Selection, dict[str, Any]]:
    """Opens networks and chooses images, a few per patient and organ.

    The images of a patient are taken in random order; one is chosen while any of its organs has
    fewer than `per_organ` images. The choice does not depend on other patients.

    Args:
      chosen: the options of `parser`.
      most: maximal number of images per patient.

    Returns:
      (networks, selection, settings of `explain.results.explain`). The regions of the images are
      named like the labels.

    Raises:
      InputError: an option is invalid.
    """
    if len(chosen.workdirs) > 2:
        raise InputError(f"--workdirs {','.join(chosen.workdirs)} names more than two runs")
    # One device: images are explained one by one, each with a different number of labels.
    devices = jax.local_devices()[:1]
    networks = open_networks(*chosen.workdirs, devices=devices)
    run = networks[0].run
    dataset = records.open_dataset(chosen.data or run.data_path)
    parts = dataset.info.get("about", {}).get("masks")
    if parts is None:
        raise InputError(f"{dataset.path} was not made by `maknet prepare segmentations`")
    organs = [name for names in parts.values() for name in names]
    digest = check_masks(pathlib.Path(chosen.masks), organs)
    selection = select(run, SelectionOptions(split=chosen.split, data=chosen.data))
    patients: dict[str, list[tuple[int, SelectedImage]]] = {}
    for number, reader in enumerate(selection.readers):
        image = reader()
        patients.setdefault(image.group, []).append((number, image))
    numbers: list[int] = []
    for patient in sorted(patients)[: chosen.patients]:
        images, counts = patients[patient], np.zeros(len(run.vocabulary), int)
        generator = np.random.default_rng([chosen.seed, zlib.crc32(patient.encode())])
        taken: list[int] = []
        for place in generator.permutation(len(images)):
            number, image = images[place]
            if (counts[image.labelled] < chosen.per_organ).any():
                counts[image.labelled] += 1
                taken.append(number)
        numbers += taken[:most]
    readers = [selection.readers[number] for number in sorted(numbers)]
    if not readers:
        raise InputError(f"split {chosen.split} has no image with a label: choose another split")
    identity = selection.identity | {"numbers": sorted(numbers)}
    selection = dataclasses.replace(selection, readers=readers, identity=identity)
    selection = with_regions(selection, masks=chosen.masks, organs=organs, size=run.size)
    settings = {
        "networks": [network.identity for network in networks],
        "steps": chosen.steps,
        "baseline": chosen.baseline,
        "masks": digest,
        "parts": parts,
    }
    return networks, selection, settings


def explain(
    file: str,
    folder: pathlib.Path,
    selection: Selection,
    settings: dict[str, Any],
    explain_image: Callable[[SelectedImage, int], results.Result],
) -> tuple[list[pathlib.Path], results.Failures]:
    """Calls `explain_image` on each image without a result; returns (files of results, failures).

    Args:
      file: the script's `__file__`.
      folder: of the results.
      selection: the images.
      settings: everything on which the results depend.
      explain_image: image, number -> metadata and arrays.
    """
    paths, failures = results.explain(
        pathlib.Path(file).name,
        folder,
        selection,
        settings,
        lambda numbered: [explain_image(image, number) for number, image in numbered.items()],
        batch_size=1,
        option="--folder",
    )
    return list(paths.values()), failures


def rounded(document: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with floats rounded to five decimals."""
    return json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 5))


def label_regions(
    image: SelectedImage, net: Network, parts: Mapping[str, Sequence[str]]
) -> dict[int, np.ndarray]:
    """Column -> region bool `[S, S]` of the labels that are present in an image."""
    regions = {}
    for column in image.labelled.tolist():
        names = parts[net.run.vocabulary.names[column]]
        masks = [image.regions[name] for name in names if name in image.regions]
        if masks:
            regions[column] = np.any(masks, axis=0)
    return regions


def draw_map(hu: np.ndarray, values: np.ndarray | None, region: np.ndarray) -> np.ndarray:
    """A picture uint8 `[TILE, TILE, 3]`: the CT, a map over it, and the contour of a region.

    Args:
      hu: `[S, S]`.
      values: the map `[S, S]`; None draws the CT only.
      region: bool `[S, S]`.
    """
    factor = TILE / len(hu)
    grey = ndimage.zoom(picture.to_grey(hu, WINDOW), factor, order=1)
    drawn = np.repeat(grey[..., None], 3, axis=-1)
    if values is not None:
        smoothed = ndimage.zoom(overlay.smooth(values), factor, order=1)
        drawn = overlay.over(grey, overlay.colours(smoothed, overlay.scale_of(smoothed)))
    large = ndimage.zoom(region.astype(np.uint8), factor, order=0) > 0
    drawn[large & ~ndimage.binary_erosion(large)] = CONTOUR
    return drawn


def write_pictures(path: pathlib.Path, rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> None:
    """Writes a PNG of rows of (caption, uint8 `[TILE, TILE, 3]`)."""
    width, height = max(map(len, rows)) * (TILE + 4), len(rows) * (TILE + CAPTION)
    sheet = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        for place, (caption, drawn) in enumerate(row):
            left, top = place * (TILE + 4), line * (TILE + CAPTION)
            draw.text((left + 3, top + 3), caption[:42], fill=(230, 230, 230))
            sheet.paste(Image.fromarray(drawn), (left, top + CAPTION))
    picture.write_png(path, sheet)
