"""Maps of CT files as NIfTI in the space of the CT."""

import contextlib
import gzip
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maknet_jax import files
from maknet_jax.explain import results

_HEADER = 352  # bytes before the voxels
_LARGEST = 32767  # of int16


class _Slice(NamedTuple):
    """An explained slice of a series."""

    path: pathlib.Path
    metadata: dict[str, Any]


def write_maps(
    folder: pathlib.Path, paths: Mapping[int, pathlib.Path], names: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Writes FOLDER/SERIES/LABEL.nii.gz for each series and label, with .N for network N of two.

    A voxel is the sum over the three channels of a map, at the middle slice, resized to the box
    that the network saw and divided by its change in area: the voxels of a slice sum to the change
    of the output from the baseline to the image, up to interpolation. Slices without a map of the
    label, and voxels outside the box, are 0.

    Args:
      folder: the folder to write.
      paths: number -> file of an image's result.
      names: of the networks.

    Returns:
      (one entry per file: series, label, model, slices, file; the number of explained series
      without geometry, such as PNG, which have no file).
    """
    series: dict[str, dict[int, _Slice]] = {}
    unplaced = set()
    for path in paths.values():
        metadata = results.load_metadata(path, names)
        meta = metadata.get("meta", {})
        if meta.get("affine") is not None:
            series.setdefault(meta["series"], {})[meta["slice"]] = _Slice(path, metadata)
        elif "slice" in meta:
            unplaced.add(metadata["group"])
    entries: list[dict[str, Any]] = []
    for key, slices in series.items():
        entries += _write_series(_free(folder, key, entries), key, slices)
    return entries, len(unplaced)


def _free(folder: pathlib.Path, key: str, entries: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """The folder of a series; two keys that differ in special characters get different ones."""
    name = re.sub(r"[^\w.-]+", "_", key).strip(".") or "series"
    taken = {pathlib.Path(entry["file"]).parent.name for entry in entries}
    count = 1
    while (folder / (name if count == 1 else f"{name}-{count}")).name in taken:
        count += 1
    return folder / (name if count == 1 else f"{name}-{count}")


def _write_series(
    folder: pathlib.Path, key: str, slices: Mapping[int, _Slice]
) -> list[dict[str, Any]]:
    """Writes the files of one series, slice by slice; returns their entries."""
    meta = next(iter(slices.values())).metadata["meta"]
    largest: dict[tuple[int, str], float] = {}  # (network, label) -> bound of the voxels
    counts: dict[tuple[int, str], int] = {}
    for _, each in sorted(slices.items()):
        with np.load(each.path) as stored:
            for place, label, row in _maps(each.metadata):
                bound = 3 * float(stored[f"scale_{place}"][row]) * _density(each.metadata)
                largest[place, label] = max(bound, largest.get((place, label), 0.0))
                counts[place, label] = counts.get((place, label), 0) + 1
    several = len({place for place, _ in largest}) > 1
    entries = []
    with contextlib.ExitStack() as stack:
        streams: dict[tuple[int, str], tuple[gzip.GzipFile, float]] = {}
        for (place, label), bound in largest.items():
            name = re.sub(r"[^\w.-]+", "_", label) + (f".{place}" if several else "")
            path = folder / f"{name}.nii.gz"
            file = stack.enter_context(files.write_whole(path, "wb"))
            zipped = gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0)
            stream = stack.enter_context(zipped)
            slope = bound / _LARGEST
            stream.write(_header(meta["shape"], meta["affine"], slope, label))
            streams[place, label] = stream, slope
            model = next(iter(slices.values())).metadata["models"][place]["name"]
            entry = {"series": key, "label": label, "model": model}
            entries.append(entry | {"slices": counts[place, label], "file": str(path)})
        for number in range(meta["shape"][0]):
            planes = _planes(slices[number]) if number in slices else {}
            for which, (stream, slope) in streams.items():
                plane = planes.get(which)
                if plane is None:
                    plane = np.zeros(meta["shape"][1:], np.float32)
                stream.write(np.rint(plane / slope).astype("<i2").tobytes())
    return entries


def _maps(metadata: Mapping[str, Any]) -> list[tuple[int, str, int]]:
    """(network, label, row of its map) of each map of an image."""
    return [
        (place, entry["label"], entry["map"])
        for place, model in enumerate(metadata["models"])
        for entry in model["labels"]
        if entry["map"] is not None
    ]


def _density(metadata: Mapping[str, Any]) -> float:
    """Pixels of the network's image per pixel of the CT."""
    top, left, bottom, right = metadata["meta"]["crop"]
    return metadata["meta"]["size"] ** 2 / ((bottom - top) * (right - left))


def _planes(explained: _Slice) -> dict[tuple[int, str], np.ndarray]:
    """(network, label) -> float32 `[Y, X]` in the pixels of the CT."""
    metadata, arrays = results.load(explained.path)
    top, left, bottom, right = metadata["meta"]["crop"]
    planes = {}
    for place, label, row in _maps(metadata):
        small = arrays[f"maps_{place}"][row].astype(np.float32).sum(axis=-1)
        small *= arrays[f"scale_{place}"][row] * np.float32(_density(metadata))
        picture = Image.fromarray(small).resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR
        )
        plane = np.zeros(metadata["meta"]["shape"][1:], np.float32)
        plane[top:bottom, left:right] = picture
        planes[place, label] = plane
    return planes


def _header(
    shape: Sequence[int], affine: Sequence[Sequence[float]], slope: float, label: str
) -> bytes:
    """The header of a NIfTI of int16 times `slope`; shape is (z, y, x)."""
    import nibabel  # slow to import, and most runs write no NIfTI

    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(tuple(shape)[::-1])
    header.set_sform(np.asarray(affine), code="scanner")
    header.set_qform(np.asarray(affine), code="scanner", strip_shears=True)
    header.set_xyzt_units("mm")
    header.set_slope_inter(slope, 0)
    header["descrip"] = f"maknet-jax attribution: {label}".encode()[:79]
    header["vox_offset"] = _HEADER
    return header.binaryblock.ljust(_HEADER, b"\0")
