"""`maknet attribute`: Integrated Gradients of labels for any number of images (paper, 5.1)."""

import dataclasses
import functools
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from markupsafe import Markup

from maknet_jax import console, files, predict, scoring
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.evaluation import metrics, protocol
from maknet_jax.evaluation.series import FLAGS, OF_NETWORK, describe_flags
from maknet_jax.explain import drawing, results
from maknet_jax.explain.label_names import label_columns
from maknet_jax.explain.network import Network, open_networks
from maknet_jax.explain.nifti_maps import write_maps
from maknet_jax.explain.options import DISPLAY, PATH, DisplayOptions, PathOptions, SelectionOptions
from maknet_jax.explain.selection import SelectedImage, select
from maknet_jax.explain.truth import outcome
from maknet_jax.figures import overlay, page, picture
from maknet_jax.runs.workdir import Run
from maknet_jax.training import sharding

SHARES = np.linspace(0, 1, 21)  # of the pixels, for deletion and insertion
AREAS = ("deletion", "insertion", "random deletion", "random insertion")
COLUMNS = (
    "id",
    "model",
    "label",
    "truth",
    "reason",
    "confidence",
    "threshold",
    "predicted",
    "baseline",
    "change",
    "residual",
    "relative",
    "flagged",
    "flags",
    "file",
)


@dataclasses.dataclass(frozen=True)
class _Explained:
    """A batch explained by one network.

    Attributes:
      network: the network.
      confidences: `[B, K]`.
      targets: `[B, T]`, the labels that are explained, the same for all networks.
      attribution: of the targets.
      areas: `[B, 4]` in the order of `AREAS` for the first target, or None.
    """

    network: Network
    confidences: np.ndarray
    targets: np.ndarray
    attribution: ig.Attribution
    areas: np.ndarray | None


def attribute(
    folder: str | pathlib.Path,
    out: str | pathlib.Path,
    selection: SelectionOptions,
    path: PathOptions = PATH,
    display: DisplayOptions = DISPLAY,
    *,
    faithful: bool = False,
    nifti: bool = True,
) -> dict[str, Any]:
    """Integrated Gradients of a selection of images; resumes if interrupted.

    Two networks are explained for the same labels: `selection.labels`, or the most confident ones
    of the first network.

    Args:
      folder: the workdir of `maknet train`, a bundle or a released name.
      out: the folder to write: cases/*.npz (maps), overlays/*.png, index.json, attributions.csv,
        index.html (works offline), summary.json, failures.csv; of CT files also
        nifti/SERIES/LABEL.nii.gz, the maps in the space of the CT.
      selection: which images, labels and networks.
      path: the path of Integrated Gradients.
      display: how results are shown.
      faithful: also measure deletion and insertion for each image's first label against random
        pixels; 84 more forward passes per image.
      nifti: write the maps of CT files as NIfTI, too.

    Returns:
      The summary.

    Raises:
      InputError: nothing to explain, or invalid options.
    """
    out = pathlib.Path(out)
    # Everything is checked before `out` is claimed.
    ig.check(path.method, path.steps, path.refinements, path.output)
    perturbation.make_baseline(np.zeros((1, 1, 1), np.int16), path.baseline)
    networks = open_networks(folder, selection.compare, checkpoint=selection.checkpoint)
    run = networks[0].run
    columns = label_columns(run, selection.labels)
    score = functools.partial(predict.predict_volume, run, png_window=selection.png_window)
    selected = select(run, selection, score, scoring.network_flags(run))
    devices = jax.local_device_count()
    batch_size = sharding.round_up_to_devices(path.batch_size or devices, devices)
    settings = results.shared_settings(networks, selection, path, display)
    settings |= {"output": path.output, "refine": path.refinements, "faithful": faithful}
    if selection.compare and not columns:
        settings["labels_of"] = "the first network"  # earlier versions: each network's own

    def explain_batch(numbered: results.Images) -> list[results.Result]:
        hu = results.padded(numbered.values(), batch_size)
        base = np.stack([perturbation.make_baseline(image, path.baseline) for image in hu])
        random = _random_order(hu, base, list(numbered)) if faithful else None
        explained: list[_Explained] = []
        for network in networks:
            images, black = network.put(hu), network.put(base)
            confidences = network.confidences(images)
            if columns:
                targets = np.tile(np.asarray(columns, np.int64), (batch_size, 1))
            elif explained:  # two networks are compared on the same labels
                targets = explained[0].targets
            else:
                targets = np.argsort(-confidences, axis=1, kind="stable")[:, : settings["top"]]
            attribution = network.attribute(images, targets, black, path)
            areas = None
            if random is not None:
                maps = attribution.maps[:, 0].sum(-1)
                areas = _areas(network, images, black, targets[:, 0], maps, random)
            explained.append(_Explained(network, confidences, targets, attribution, areas))
        return [
            _result(out, number, image, row, explained, settings)
            for row, (number, image) in enumerate(numbered.items())
        ]

    job = results.Job("attribute", out, folder, networks, selected, settings)
    write = functools.partial(_write, nifti=nifti)
    return job.run(explain_batch, write, batch_size=batch_size, most_shown=display.most_shown)


def _random_order(hu: np.ndarray, base: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Random ranks `[B, H, W]`, which depend on an image's number but not on its batch."""
    differs = perturbation.differs(hu, base)
    order = [faithfulness.random_ranks(differs[row], number) for row, number in enumerate(numbers)]
    return np.stack(order + order[-1:] * (len(hu) - len(order)))


def label_entry(image: SelectedImage, run: Run, column: int, scores: np.ndarray) -> dict[str, Any]:
    """The displayed values of a label: truth, confidence, and whether they agree.

    A label is predicted where its confidence reaches its threshold; parents are not added, so that
    each label depends on its own confidence only.

    Args:
      image: the image.
      run: the network's run.
      column: of the label.
      scores: `[K]`, the confidences.
    """
    truth = image.truth(column)
    predicted = bool(protocol.predict(scores[None], run.thresholds)[0, column])
    return {
        "label": run.vocabulary.names[column],
        "truth": truth.value,
        "reason": truth.reason,
        "confidence": float(scores[column]),
        "threshold": float(run.thresholds[column]),
        "predicted": predicted,
        "outcome": outcome(truth.value, predicted),
    }


def _areas(
    network: Network,
    images: jax.Array,
    black: jax.Array,
    targets: np.ndarray,
    maps: np.ndarray,
    random: np.ndarray,
) -> np.ndarray:
    """`[B, 4]` in the order of `AREAS`."""
    areas = []
    for order in (faithfulness.ranks(maps), random):
        for curve in faithfulness.curves(network.logit_fn, images, targets, black, order, SHARES):
            areas.append(faithfulness.area(curve, SHARES))
    return np.stack(areas, axis=1)


def _result(
    out: pathlib.Path,
    number: int,
    image: SelectedImage,
    row: int,
    explained: Sequence[_Explained],
    settings: dict[str, Any],
) -> results.Result:
    """(metadata, arrays) of one image; writes its overlay."""
    names = explained[0].network.run.vocabulary.names
    arrays, models = {"image": image.image[..., 1]}, []
    for place, batch in enumerate(explained):
        scores, targets = batch.confidences[row], batch.targets[row].tolist()
        best = np.argsort(-scores, kind="stable")[: settings["top"]].tolist()
        attribution = batch.attribution
        maps = attribution.maps[row, : len(targets)]
        scale = np.abs(maps).max(axis=(1, 2, 3)) + np.float32(1e-30)
        # Half precision relative to each map's largest value: half the bytes, 3 digits.
        arrays[f"maps_{place}"] = (maps / scale[:, None, None, None]).astype(np.float16)
        arrays[f"scale_{place}"] = scale
        entries, listed = [], dict.fromkeys(targets + best)
        for column in listed:
            entry = label_entry(image, batch.network.run, column, scores) | {"map": None}
            if column in targets:
                at = targets.index(column)
                start = attribution.start[row, at]
                start = metrics.sigmoid(start) if settings["output"] == "logit" else start
                entry |= {"map": at, "baseline": float(start)}
                entry["change"] = float(attribution.end[row, at] - attribution.start[row, at])
                entry |= {"residual": float(attribution.residual[row, at])}
                entry |= {"relative": float(attribution.relative[row, at])}
                entry |= {"flagged": bool(attribution.flagged[row, at])}
            entries.append(entry)
        missed = [
            [names[k], float(scores[k]), float(batch.network.run.thresholds[k])]
            for k in image.labelled
            if k not in listed
        ]
        model: dict[str, Any] = {"name": batch.network.name, "labels": entries, "missed": missed}
        if batch.areas is not None:
            model["areas"] = dict(zip(AREAS, batch.areas[row].tolist(), strict=True))
            model["areas_of"] = names[targets[0]]
        models.append(model)
    fields, drawn = drawing.store_picture(image, settings["display"])
    metadata, arrays = image.metadata(models) | fields, arrays | drawn
    drawing.write_overlays(out / "overlays" / f"{number:05d}.png", metadata, arrays, settings)
    return metadata, arrays


def any_reached(labels: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any of some labels of an image, see `label_entry`, reaches its threshold."""
    return any(entry["predicted"] for entry in labels)


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """What is doubtful about the images of a summary of `attribute` or `perturb`, a line each.

    These are their flags, and images in which no label reaches its threshold.
    """
    images = console.plural(summary["images"], "image")
    lines = describe_flags(summary["flags"], images)
    if without := summary["images"] - summary.get("reached", summary["images"]):
        lines.append(f"none of the labels shown reaches its threshold in {without:,} of {images}")
    return lines


def describe(metadata: Mapping[str, Any]) -> list[str]:
    """The flags of a result with their meanings, without those of the network, of all results."""
    names = [name for name in metadata.get("flags", ()) if name not in OF_NETWORK]
    return [f"{name}: {FLAGS[name]}" for name in names]


def cards(
    slices: Iterable[Sequence[pathlib.Path]],
    settings: Mapping[str, Any],
    names: Sequence[str] = (),
    notes: Mapping[pathlib.Path, Sequence[str]] = types.MappingProxyType({}),
) -> Iterator[Markup]:
    """The HTML cards of results: each shows a slice with its maps.

    Args:
      slices: files of results, those of one slice together, see `drawing.by_slice`.
      settings: of the run: display and output.
      names: of the networks, see `results.load_metadata`.
      notes: file of a result -> lines below its CT.
    """
    for path, *others in slices:
        metadata, arrays = results.load(path, names)
        metadata = drawing.merge_truth(
            metadata, [results.load_metadata(other, names) for other in others]
        )
        display, output = settings["display"], settings["output"]
        drawn = drawing.load_picture(metadata, arrays, display)
        smoothed = drawing.smoothed_maps(arrays)
        scale = drawing.colour_scale(smoothed)
        for model, maps in zip(metadata["models"], smoothed, strict=True):
            model["uris"] = [overlay.to_uri(layer) for layer in drawing.map_layers(maps, scale)]
            for entry in model["labels"]:
                if entry["map"] is not None:
                    entry["effect"] = drawing.describe_change(entry, output)
        present = ", ".join(drawing.annotated(metadata))
        yield page.attribution_card(
            metadata["id"],
            overlay.to_uri(drawn.grey),
            metadata["models"],
            facts=drawing.facts(metadata, drawn, display),
            notes=[*([f"annotated: {present}"] if present else []), *notes.get(path, ())],
            warnings=describe(metadata),
            aspect=drawn.grey.shape[1] / drawn.grey.shape[0],
            right=picture.is_oriented(metadata["meta"]),
            scale=(scale, drawing.scale_unit(arrays, output)),
        )


def _differences(areas: dict[str, dict[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, one value per image) for each paired comparison."""
    for area in AREAS[:2]:
        for name, each in areas.items():
            yield f"{name}: {area}, map minus random", each[area] - each[f"random {area}"]
        if len(areas) == 2:
            one, two = areas
            yield f"{area}, {one} minus {two}", areas[one][area] - areas[two][area]


def _write(explained: results.Explained, *, nifti: bool) -> dict[str, Any]:
    """Writes all files except the results themselves; returns new entries of the summary."""
    out, summary, names = explained.out, explained.summary, explained.names
    index, rows, groups = [], [], []
    flags: dict[str, list[bool]] = {}
    reached, known = 0, False
    per_image: dict[str, list[list[float]]] = {}
    for number, path in explained.files.items():
        metadata = results.load_metadata(path, names)
        file = path.relative_to(out).as_posix()
        index.append({"number": number, "file": file, "overlay": f"overlays/{path.stem}.png"})
        index[-1] |= metadata
        groups.append(metadata["group"])
        mapped = [
            entry
            for model in metadata["models"]
            for entry in model["labels"]
            if entry["map"] is not None
        ]
        reached += any_reached(mapped)
        known |= any(entry["truth"] != "unknown" for entry in mapped)
        known |= any(model["missed"] for model in metadata["models"])
        for model in metadata["models"]:
            name = model["name"]
            per_image.setdefault(name, []).append(list(model.get("areas", {}).values()))
            for entry in model["labels"]:
                if entry["map"] is None:
                    continue
                flags.setdefault(name, []).append(entry["flagged"])
                values = {"id": metadata["id"], "model": name, "file": file} | entry
                values["flags"] = "|".join(metadata.get("flags", ()))
                rows.append([values.get(column, "") for column in COLUMNS])
    files.write_json(out / "index.json", index)
    console.write_table(out / "attributions.csv", COLUMNS, rows)
    console.write_failures(out / "failures.csv", explained.failures)
    more: dict[str, Any] = {
        "complete": {name: float(1 - np.mean(each)) for name, each in flags.items()},
        "flagged": {name: int(np.sum(each)) for name, each in flags.items()},
        "groups": len(set(groups)),
        "reached": reached,
    }
    if summary["faithful"]:
        areas = {
            name: dict(zip(AREAS, np.transpose(each), strict=True))
            for name, each in per_image.items()
        }
        more["faithfulness"] = {
            name: {area: faithfulness.bootstrap(values, groups) for area, values in each.items()}
            for name, each in areas.items()
        }
        more["differences"] = {
            name: faithfulness.bootstrap(values, groups) for name, values in _differences(areas)
        }
    slices = drawing.by_slice(zip(explained.files.values(), index, strict=True))
    shown = slices[: explained.most_shown]
    with files.write_whole(out / "index.html") as page_file:
        everything = summary | more
        lead = page.attribution_lead(
            everything, len(shown), len(slices), warnings(everything), truth_known=known
        )
        drawn = cards(shown, summary, names)
        page_file.write(page.document("Attributions", lead, drawn))
    written = ["index.html", "attributions.csv", "index.json", "cases", "overlays"]
    if nifti:
        more["nifti"], more["without_geometry"] = write_maps(out / "nifti", explained.files, names)
        written += ["nifti"] if more["nifti"] else []
    more["files"] = [str(out / name) for name in written]
    more["failures_file"] = str(out / "failures.csv") if explained.failures else None
    files.write_json(out / "summary.json", summary | more)
    return more
