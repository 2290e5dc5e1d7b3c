"""`maknet perturb`: how labels change when parts of the image are changed (paper, 5.2)."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from markupsafe import Markup

from maknet_jax import console, files, predict, scoring
from maknet_jax.attribute import any_reached, describe, label_entry, warnings
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.errors import InputError
from maknet_jax.explain import drawing, results
from maknet_jax.explain.masks import check_masks, with_regions
from maknet_jax.explain.network import Network, open_networks
from maknet_jax.explain.options import (
    DISPLAY,
    PATH,
    SHARE,
    STRATEGIES,
    DisplayOptions,
    PathOptions,
    SelectionOptions,
)
from maknet_jax.explain.selection import SelectedImage, select
from maknet_jax.figures import overlay, page, picture
from maknet_jax.training import sharding

COLUMNS = (
    "id",
    "model",
    "perturbed",
    "label",
    "truth",
    "reason",
    "before",
    "after",
    "rank_before",
    "rank_after",
    "fell_out",
    "flags",
)


def perturb(
    folder: str | pathlib.Path,
    out: str | pathlib.Path,
    selection: SelectionOptions,
    path: PathOptions = PATH,
    display: DisplayOptions = DISPLAY,
    *,
    strategies: Sequence[str] = STRATEGIES,
    masks: str | pathlib.Path | None = None,
    organs: Sequence[str] | None = None,
    share: float = SHARE,
) -> dict[str, Any]:
    """Perturbs a selection of images and compares the top labels; resumes if interrupted.

    "neighbour" fills a region with the pixels around it, and "patch" blackens its bounding box.
    "attribution" deletes the pixels that raise the confidences of the original's top labels most,
    for each network by its own map. "random" deletes as many random pixels, as a control.

    Args:
      folder: the workdir of `maknet train`, a bundle or a released name.
      out: the folder to write: cases/*.npz, pictures/*.png, perturbations.csv, index.html (works
        offline), summary.json, failures.csv.
      selection: which images, labels and networks; `top` is the number of labels compared.
      path: the path of Integrated Gradients and the baseline of deleted pixels; the probability is
        attributed, without refinement.
      display: how results are shown.
      strategies: some of `STRATEGIES`.
      masks: the masks of the regions, see `masks.find_regions`; None takes DeepLesion's boxes.
      organs: names or values in the masks, each a separate region; None takes all nonzero pixels as
        one region.
      share: share of the pixels that are deleted.

    Returns:
      The summary: for each network and strategy, the mean drop of the top labels' confidences and
      the share of them that stay in the top, with 95 % intervals over patients or series.

    Raises:
      InputError: nothing to perturb, or invalid options.
    """
    out = pathlib.Path(out)
    # Everything is checked before `out` is claimed.
    ig.check(path.method, path.steps, 0, "probability")
    if path.output != PATH.output or path.refine:
        raise InputError(
            f"output {path.output} with refine {path.refine}: perturb attributes the probability "
            "without refinement"
        )
    perturbation.make_baseline(np.zeros((1, 1, 1), np.int16), path.baseline)
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies:
        raise InputError(f"strategy {unknown} is unknown: choose from {', '.join(STRATEGIES)}")
    if not 0 < share < 1:
        raise InputError(f"--share {share} should be above 0 and below 1")
    networks = open_networks(folder, selection.compare, checkpoint=selection.checkpoint)
    run = networks[0].run
    score = functools.partial(predict.predict_volume, run, png_window=selection.png_window)
    selected = select(run, selection, score, scoring.network_flags(run))
    digest = None
    if {"neighbour", "patch"} & set(strategies):
        digest = check_masks(pathlib.Path(masks), organs) if masks else None
        size = run.size
        selected = with_regions(selected, masks=masks, organs=organs, size=size)
    devices = jax.local_device_count()
    batch_size = sharding.round_up_to_devices(path.batch_size or devices, devices)
    settings = results.shared_settings(networks, selection, path, display)
    shown = None if selection.pseudonyms else masks and str(masks)
    settings |= {"strategies": list(strategies), "masks": shown, "organs": organs}
    settings |= {"masks_digest": digest, "share": share}

    def explain_batch(numbered: results.Images) -> list[results.Result]:
        hu = results.padded(numbered.values(), batch_size)
        base = np.stack([perturbation.make_baseline(image, path.baseline) for image in hu])
        influential = [_influential(network, hu, base, settings) for network in networks]
        return [
            _perturbed(
                out,
                networks,
                number,
                image,
                settings,
                base[row],
                [masks[row] for masks in influential],
            )
            for row, (number, image) in enumerate(numbered.items())
        ]

    job = results.Job("perturb", out, folder, networks, selected, settings)
    return job.run(explain_batch, _write, batch_size=batch_size, most_shown=display.most_shown)


def _influential(
    network: Network, hu: np.ndarray, base: np.ndarray, settings: dict[str, Any]
) -> np.ndarray:
    """The pixels that raise each image's top labels most: bool `[B, S, S]`."""
    if not {"attribution", "random"} & set(settings["strategies"]):
        return np.zeros(hu.shape[:3], bool)
    images = network.put(hu)
    order = np.argsort(-network.confidences(images), axis=1, kind="stable")
    attribution = ig.integrated_gradients(
        network.logit_fn,
        images,
        order[:, : settings["top"]],
        network.put(base),
        steps=settings["steps"],
        method=settings["method"],
    )
    maps = attribution.maps.sum(axis=(1, 4))
    return np.stack([perturbation.most_influential(one, settings["share"]) for one in maps])


def _perturbed(
    out: pathlib.Path,
    networks: Sequence[Network],
    number: int,
    image: SelectedImage,
    settings: dict[str, Any],
    base: np.ndarray,
    influential: Sequence[np.ndarray],
) -> results.Result:
    """(metadata, arrays) of one image; writes its pictures."""
    strategies, hu = settings["strategies"], image.image
    common = [("original", hu)]
    for name, region in image.regions.items():
        if "neighbour" in strategies:
            common.append((f"neighbour: {name}", perturbation.neighbour(hu, region)))
        if "patch" in strategies:
            common.append((f"patch: {name}", perturbation.patch(hu, region)))
    ranks = faithfulness.random_ranks(perturbation.differs(hu, base), number)
    models, arrays = [], {}
    for place, (network, mask) in enumerate(zip(networks, influential, strict=True)):
        deleted = {"attribution": mask, "random": ranks < mask.sum()}
        forms = common + [
            (f"{name}: {pixels.mean():.0%} of pixels", perturbation.delete(hu, pixels, base))
            for name, pixels in deleted.items()
            if name in strategies
        ]
        stack = np.stack([form for _, form in forms])
        columns = _columns(image, network, [title for title, _ in forms], stack, settings["top"])
        models.append({"name": network.name, "columns": columns})
        arrays[f"pictures_{place}"] = picture.to_grey(stack[..., 1], settings["display"])
    fields, drawn = drawing.store_picture(image, settings["display"])
    metadata, arrays = image.metadata(models) | fields, arrays | drawn
    drawing.write_perturbed(out / "pictures" / f"{number:05d}.png", metadata, arrays, settings)
    return metadata, arrays


def _columns(
    image: SelectedImage, network: Network, titles: Sequence[str], hu: np.ndarray, top: int
) -> list[dict[str, Any]]:
    """The top labels of each form of an image, always including those of the original."""
    order, scores = _scored(network, hu)
    first = order[0, :top].tolist()
    columns = []
    for row, title in enumerate(titles):
        rank = np.argsort(order[row])
        now = order[row, :top].tolist()
        labels = [
            label_entry(image, network.run, k, scores[row])
            | {
                "before": float(scores[0, k]),
                "rank": int(rank[k]) + 1,
                "state": "" if k in first and k in now else "gone" if k in first else "new",
            }
            for k in now + [k for k in first if k not in now]
        ]
        columns.append({"title": title, "labels": labels})
    return columns


def _scored(network: Network, hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels by confidence, confidences), each `[N, K]`; one image per device at a time."""
    devices = jax.local_device_count()
    rows = sharding.round_up_to_devices(len(hu), devices)
    padded = np.concatenate([hu, hu[:1].repeat(rows - len(hu), axis=0)])
    parts = [
        network.confidences(network.put(padded[k : k + devices])) for k in range(0, rows, devices)
    ]
    scores = np.concatenate(parts)[: len(hu)]
    return np.argsort(-scores, axis=1, kind="stable"), scores


def _write(explained: results.Explained) -> dict[str, Any]:
    """Writes all files except the results themselves; returns new entries of the summary."""
    out, summary, names = explained.out, explained.summary, explained.names
    rows: list[list[Any]] = []
    drops: dict[tuple[str, str], list[float]] = {}
    stays: dict[tuple[str, str], list[float]] = {}
    groups: dict[tuple[str, str], list[str]] = {}
    loaded = [(path, results.load_metadata(path, names)) for path in explained.files.values()]
    # Labels of the original of each image.
    originals = [
        [entry for model in metadata["models"] for entry in model["columns"][0]["labels"]]
        for _, metadata in loaded
    ]
    reached = sum(map(any_reached, originals))
    known = any(entry["truth"] != "unknown" for entries in originals for entry in entries)
    for _, metadata in loaded:
        for model in metadata["models"]:
            original, *columns = model["columns"]
            before = {entry["label"]: entry for entry in original["labels"]}
            by_strategy: dict[str, list[tuple[float, float]]] = {}
            for column in columns:
                first = [entry for entry in column["labels"] if entry["label"] in before]
                for entry in first:
                    old = before[entry["label"]]
                    rows.append(
                        [
                            metadata["id"],
                            model["name"],
                            column["title"],
                            entry["label"],
                            entry["truth"],
                            entry["reason"],
                            old["confidence"],
                            entry["confidence"],
                            old["rank"],
                            entry["rank"],
                            entry["state"] == "gone",
                            "|".join(metadata.get("flags", ())),
                        ]
                    )
                drop = np.mean([entry["before"] - entry["confidence"] for entry in first])
                stay = np.mean([entry["state"] != "gone" for entry in first])
                strategy = column["title"].partition(":")[0]
                by_strategy.setdefault(strategy, []).append((float(drop), float(stay)))
            for strategy, values in by_strategy.items():  # one value per image, not per organ
                key = model["name"], strategy
                drop, stay = np.mean(values, axis=0)
                drops.setdefault(key, []).append(drop)
                stays.setdefault(key, []).append(stay)
                groups.setdefault(key, []).append(metadata["group"])
    console.write_table(out / "perturbations.csv", COLUMNS, rows)
    console.write_failures(out / "failures.csv", explained.failures)
    by_network = [
        {
            "model": key[0],
            "strategy": key[1],
            "images": len(values),
            "groups": len(set(groups[key])),
            "fall": faithfulness.bootstrap(values, groups[key]),
            "stay": faithfulness.bootstrap(stays[key], groups[key]),
        }
        for key, values in drops.items()
    ]
    slices = [[path] for path, _ in loaded]
    if not {"neighbour", "patch"} & set(summary["strategies"]):
        slices = drawing.by_slice(loaded)  # without regions, lesions of a slice look the same
    shown = [group[0] for group in slices[: explained.most_shown]]
    with files.write_whole(out / "index.html") as file:
        everything = summary | {"results": by_network, "reached": reached}
        lead = page.perturbation_lead(
            everything,
            *table(everything),
            len(shown),
            warnings(everything),
            truth_known=known,
        )
        drawn = (_card(path, summary["display"], names) for path in shown)
        file.write(page.document("Perturbations", lead, drawn))
    written = ("index.html", "perturbations.csv", "cases", "pictures")
    more: dict[str, Any] = {
        "results": by_network,
        "reached": reached,
        "files": [str(out / name) for name in written],
        "failures_file": str(out / "failures.csv") if explained.failures else None,
    }
    files.write_json(out / "summary.json", summary | more)
    return more


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) of a summary's results, as text."""
    cells = [
        [
            row["model"],
            row["strategy"],
            row["images"],
            row["groups"],
            *(console.format_interval(row[name]) for name in ("fall", "stay")),
        ]
        for row in summary["results"]
    ]
    header = [
        "network",
        "perturbed",
        "images",
        "patients or series",
        "confidence drop",
        f"share still in top {summary['top']} of {summary['labels']}",
    ]
    return header, cells


def _card(path: pathlib.Path, display: Sequence[float], names: Sequence[str]) -> Markup:
    metadata, arrays = results.load(path, names)
    drawn = drawing.load_picture(metadata, arrays | {"image": arrays["pictures_0"][0]}, display)
    for place, model in enumerate(metadata["models"]):
        forms = drawing.perturbed_pictures(drawn.grey, arrays[f"pictures_{place}"])
        for column, form in zip(model["columns"], forms, strict=True):
            column["uri"] = overlay.to_uri(form)
    return page.perturbation_card(
        metadata["id"],
        metadata["models"],
        facts=drawing.facts(metadata, drawn, display),
        warnings=describe(metadata),
        aspect=drawn.grey.shape[1] / drawn.grey.shape[0],
        right=picture.is_oriented(metadata.get("meta", {})),
    )
