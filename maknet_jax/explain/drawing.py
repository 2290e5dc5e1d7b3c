"""The pictures of results: the CT slice, its description, and the maps over it."""

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax.explain.selection import SelectedImage
from maknet_jax.figures import overlay, panels, picture

Arrays = Mapping[str, np.ndarray]
_TRUTHS = ("true", "false", "unknown")
_SHARPEST = 192  # pixels; smaller maps are enlarged smoothly, larger ones are drawn as they are


def store_picture(
    image: SelectedImage, window: Sequence[float]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, arrays) that `load_picture` reads.

    Args:
      image: the image; its `slice_hu` is drawn if present, else the input of the network.
      window: (low, high) of the display in HU.
    """
    low, high = window
    if image.slice_hu is None:
        drawn = picture.of_image(image.image[..., 1], image.meta, (low, high))
    else:
        spacing = picture.pixel_spacing(image.meta)
        drawn = picture.of_slice(image.slice_hu, spacing, (low, high))
    fields = {"mm": drawn.mm, "stored": list(drawn.stored), "native": drawn.native}
    return {"picture": fields}, {"picture": drawn.grey}


def load_picture(
    metadata: Mapping[str, Any], arrays: Arrays, window: Sequence[float]
) -> picture.Picture:
    """The picture of a result; results of earlier versions store the network's input only."""
    if "picture" not in metadata:
        low, high = window
        return picture.of_image(arrays["image"], metadata.get("meta", {}), (low, high))
    fields = metadata["picture"]
    return picture.Picture(
        arrays["picture"], fields["mm"], tuple(fields["stored"]), fields["native"]
    )


def facts(
    metadata: Mapping[str, Any], drawn: picture.Picture, window: Sequence[float]
) -> list[str]:
    """Where an image comes from and how it is drawn, one phrase each."""
    meta = metadata.get("meta", {})
    lines = [f"split {meta['split']}"] if meta.get("split") else []
    if metadata.get("id", "").startswith("sha256:") and meta.get("file"):
        # The files have no SeriesInstanceUID: their folder tells a reader more than a digest.
        lines.append("/".join(pathlib.PurePath(meta["file"]).parts[-2:]))
    if meta.get("slice") is not None:
        last = f", {meta['slices'] - 1}: feet" if meta.get("slices") else ""
        lines.append(f"slice {meta['slice']} (0: head{last})")
    side = [] if picture.is_oriented(meta) else ["the file does not say which side is right"]
    return [*lines, picture.describe_window(window), drawn.resolution, *side]


def smoothed_maps(arrays: Arrays) -> list[list[np.ndarray]]:
    """The maps `[S, S]` of a result by network, blurred for display."""
    places = itertools.takewhile(lambda place: f"maps_{place}" in arrays, itertools.count())
    return [
        [
            overlay.smooth(one * scale)
            for one, scale in zip(
                arrays[f"maps_{place}"].astype(np.float32).sum(axis=-1),
                arrays[f"scale_{place}"],
                strict=True,
            )
        ]
        for place in places
    ]


def map_layers(smoothed: Iterable[np.ndarray], scale: float) -> Iterator[np.ndarray]:
    """The maps of a network as RGBA uint8 `[H, W, 4]` layers for pages.

    Args:
      smoothed: of a network, see `smoothed_maps`.
      scale: `colour_scale` of the result.
    """
    for one in smoothed:
        edge = max(_SHARPEST, len(one))
        drawn = one if edge == len(one) else picture.resample(one, (edge, edge))
        yield overlay.colours(drawn, scale)


def colour_scale(smoothed: Iterable[Iterable[np.ndarray]]) -> float:
    """The attribution per pixel that is drawn in full colour.

    It is one value for all maps of an image, of all labels and networks: a label whose confidence
    hardly changes has a faint map.

    Args:
      smoothed: see `smoothed_maps`.
    """
    return overlay.scale_of(*itertools.chain.from_iterable(smoothed))


def scale_unit(arrays: Arrays, output: str) -> str:
    """What the colours of the maps measure; `output` is one of `options.OUTPUTS`."""
    size = "{} x {}".format(*arrays["image"].shape)
    name = "confidence" if output == "probability" else "logit"
    return f"change of the {name} per pixel of the network's input ({size})"


def describe_confidence(entry: Mapping[str, Any]) -> str:
    """A confidence, and on which side of its threshold it is."""
    side = "at or above" if entry["predicted"] else "below"
    return f"{entry['confidence']:.2f}, {side} its threshold {entry['threshold']:.2f}"


def describe_change(entry: Mapping[str, Any], output: str) -> str:
    """The confidence at the baseline, and the change that a map explains.

    Args:
      entry: a label with a map; those of earlier versions lack the baseline.
      output: one of `options.OUTPUTS`.
    """
    baseline = f"baseline {entry['baseline']:.2f}, " if "baseline" in entry else ""
    rounded = round(entry["change"], 2) + 0.0  # not -0.00
    change = f"{rounded:+.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{baseline}{'change' if output == 'probability' else 'logit'} {change}"


def perturbed_pictures(grey: np.ndarray, forms: np.ndarray) -> list[np.ndarray]:
    """Perturbed forms of an image as the CT slice with their changed pixels.

    Args:
      grey: uint8 `[h, w]`, the picture of the original.
      forms: uint8 `[N, S, S]`, the forms as the network sees them; the first is the original.
    """
    pictures = []
    for form in forms:
        changed = picture.resample((form != forms[0]).astype(np.float32), grey.shape)
        coarse = np.clip(picture.resample(form, grey.shape), 0, 255)
        pictures.append(np.where(changed > 0.5, np.rint(coarse), grey).astype(np.uint8))
    return pictures


def by_slice(
    explained: Iterable[tuple[pathlib.Path, Mapping[str, Any]]],
) -> list[list[pathlib.Path]]:
    """Groups results by the slice that they show.

    DeepLesion's records are lesions, of which a slice can have several.

    Args:
      explained: (file of a result, its metadata).
    """
    groups: dict[str, list[pathlib.Path]] = {}
    for path, metadata in explained:
        meta = metadata.get("meta", {})
        whole = "slice_box" in meta and "box" not in meta
        key = f"slice {meta['file']}" if whole else f"image {metadata['id']}"
        groups.setdefault(key, []).append(path)
    return list(groups.values())


def merge_truth(metadata: dict[str, Any], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The metadata of one slice from those of its lesions, for one card.

    A label is present if it is annotated for any lesion, else absent if any lesion excludes it.
    """
    for other in others:
        metadata["id"] += f", #{other['id'].rpartition('#')[2]}"
        for model, same in zip(metadata["models"], other["models"], strict=True):
            listed = {entry["label"]: entry for entry in same["labels"]}
            for entry in model["labels"]:
                twin = listed.get(entry["label"], entry)
                if _TRUTHS.index(twin["truth"]) < _TRUTHS.index(entry["truth"]):
                    entry |= {name: twin[name] for name in ("truth", "reason", "outcome")}
            missed = {values[0]: values for values in model["missed"] + same["missed"]}
            model["missed"] = list(missed.values())
    return metadata


def annotated(metadata: Mapping[str, Any]) -> list[str]:
    """The annotated labels of a result of `maknet attribute`, in alphabetical order."""
    first = metadata["models"][0]
    names = [entry["label"] for entry in first["labels"] if entry["truth"] == "true"]
    return sorted([*names, *(name for name, *_ in first["missed"])])


def write_overlays(
    path: pathlib.Path, metadata: Mapping[str, Any], arrays: Arrays, settings: Mapping[str, Any]
) -> None:
    """Writes a figure: a row per network with the CT and the map of each explained label.

    Args:
      path: the PNG.
      metadata: of a result of `maknet attribute`.
      arrays: of the same result.
      settings: of the run: display, output, steps, method and baseline.
    """
    drawn = load_picture(metadata, arrays, settings["display"])
    low, high = settings["display"]
    smoothed, output = smoothed_maps(arrays), settings["output"]
    scale = colour_scale(smoothed)
    ct = panels.Panel("CT", f"{low:g} to {high:g} HU", _colourless(drawn.grey))
    rows = []
    for model, maps in zip(metadata["models"], smoothed, strict=True):
        row = [ct]
        entries = [entry for entry in model["labels"] if entry["map"] is not None]
        for entry in entries:
            one = maps[entry["map"]]
            rgba = overlay.colours(picture.resample(one, drawn.grey.shape), scale)
            note = f"{describe_confidence(entry)}\n{describe_change(entry, output)}"
            title = entry["label"] + ", incomplete map" * entry["flagged"]
            row.append(panels.Panel(title, note, overlay.over(drawn.grey, rgba)))
        rows.append((model["name"], row))
    caption = [
        f"Colours: {scale_unit(arrays, output)}, the same scale for all maps of this image; full "
        "colour at the largest of their 99.5th percentiles",
        ", ".join([metadata["id"], *facts(metadata, drawn, settings["display"])]),
        f"Integrated Gradients of the {output}, {settings['steps']} steps, "
        f"{settings['method']} rule, baseline {settings['baseline']}",
        *_flags(metadata),
    ]
    right = picture.is_oriented(metadata["meta"])
    panels.write_panels(path, rows, caption=caption, mm=drawn.mm, right=right, colour_bar=scale)


def write_perturbed(
    path: pathlib.Path, metadata: Mapping[str, Any], arrays: Arrays, settings: Mapping[str, Any]
) -> None:
    """Writes a figure: a row per network with each form and its confidence in one label.

    The label is the original's most confident one.

    Args:
      path: the PNG.
      metadata: of a result of `maknet perturb`.
      arrays: of the same result.
      settings: of the run: display.
    """
    drawn = load_picture(metadata, arrays, settings["display"])
    rows = []
    for place, model in enumerate(metadata["models"]):
        forms = perturbed_pictures(drawn.grey, arrays[f"pictures_{place}"])
        row = []
        top = model["columns"][0]["labels"][0]["label"]
        for column, form in zip(model["columns"], forms, strict=True):
            entry = next(entry for entry in column["labels"] if entry["label"] == top)
            note = f"{top} {describe_confidence(entry)}"
            row.append(panels.Panel(column["title"], note, _colourless(form)))
        rows.append((model["name"], row))
    caption = [", ".join([metadata["id"], *facts(metadata, drawn, settings["display"])])]
    caption += _flags(metadata)
    right = picture.is_oriented(metadata["meta"])
    panels.write_panels(path, rows, caption=caption, mm=drawn.mm, right=right)


def _flags(metadata: Mapping[str, Any]) -> list[str]:
    """A line that names the flags of a result, if it has any."""
    return [f"flags: {', '.join(metadata['flags'])}"] if metadata.get("flags") else []


def _colourless(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
