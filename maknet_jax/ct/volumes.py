"""CT series read as volumes of Hounsfield units in the standard orientation."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from maknet_jax.ct import containers, dicom, dicomdir, nifti, png, reading, search, units
from maknet_jax.ct.read_ahead import read_ahead
from maknet_jax.ct.reading import content_id
from maknet_jax.ct.search import SeriesRef
from maknet_jax.ct.stacks import order_slices
from maknet_jax.errors import InputError, Rejected


@dataclasses.dataclass(frozen=True)
class Volume:
    """One CT series in the standard orientation of `geometry`.

    Attributes:
      hu: int16 [Z, Y, X] in HU; padding values are not changed.
      spacing: mm between neighbours along (z, y, x); nan where unknown.
      series: the SeriesInstanceUID, or the name relative to the root.
      slices: a name for each slice: the file relative to the root; for NIfTI the index along the
        stored z axis.
      uids: for each slice the SOPInstanceUID, or an id computed from the content of the file.
      affine: `[4, 4]`, indices (x, y, z) of `hu` to RAS in mm; None where unknown.
      body_part: the tag BodyPartExamined of the first slice; "" without it.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    series: str
    slices: tuple[str, ...]
    uids: tuple[str, ...]
    affine: np.ndarray | None = None
    body_part: str = ""

    @property
    def json_spacing(self) -> list[float | None]:
        """The spacing for JSON: None where it is unknown."""
        return [None if math.isnan(mm) else float(mm) for mm in self.spacing]


def load_series(
    ref: SeriesRef,
    *,
    png_window: tuple[float, float] | None = None,
    overrides: reading.Overrides = reading.STRICT,
) -> Volume:
    """Reads one series.

    Args:
      ref: one of the series of `search.find_series`.
      png_window: (low, high) in HU of 8-bit PNGs.
      overrides: what is read although it would be rejected.

    Raises:
      Rejected: a file of the series cannot be used, or the values are not HU.
    """
    try:
        if ref.kind == "dicom":
            return _load_dicom(ref, overrides)
        if ref.kind == "png":
            return _load_png(ref, png_window, overrides)
        hu, spacing, stored = nifti.read_nifti(ref.paths[0], overrides)
        affine = nifti.read_affine(ref.paths[0])
        digest = _file_id(ref.paths[0])
    except OSError as error:  # the file was removed or is not readable
        raise Rejected(f"cannot be read ({error.strerror or error})") from error
    uids = tuple(f"{digest}:{k}" for k in stored)
    return Volume(hu, spacing, ref.key, stored, uids, affine)


def load_all(
    series: Sequence[SeriesRef],
    failures: list[tuple[str, str]],
    *,
    png_window: tuple[float, float] | None = None,
    overrides: reading.Overrides = reading.STRICT,
) -> Iterator[tuple[SeriesRef, Volume]]:
    """Reads series one after the other; the next one is read while one is in use.

    Args:
      series: the result of `search.find_series`.
      failures: rejected series are appended as (first file, reason).
      png_window: (low, high) in HU of 8-bit PNGs.
      overrides: what is read although it would be rejected.
    """
    load = functools.partial(load_series, png_window=png_window, overrides=overrides)
    for ref, content in read_ahead(load, series):
        try:
            volume = content.result()
        except Rejected as error:
            failures.append((ref.paths[0], str(error)))
            continue
        yield ref, volume


def load_series_of(
    path: str | os.PathLike[str],
    *,
    png_window: tuple[float, float] | None = None,
    overrides: reading.Overrides = reading.STRICT,
    around: int = 1,
) -> tuple[Volume, int | None]:
    """Reads the slice or the volume at a path.

    Args:
      path: a DICOM or PNG file, which is read with its existing neighbours in the same series and
        folder; or a NIfTI file or a folder with exactly one series, of which the whole volume is
        read.
      png_window: (low, high) in HU of 8-bit PNGs.
      overrides: what is read although it would be rejected.
      around: neighbours on either side; always one for a PNG.

    Returns:
      (volume, index of the slice at `path`; None for a whole volume).

    Raises:
      InputError: the path does not exist, or the folder contains no series or several.
      Rejected: the file or its series cannot be used.
    """
    path = pathlib.Path(path)
    folder = containers.is_folder(path)
    if not folder and not containers.is_file(path):
        raise InputError(f"{path} does not exist: pass a CT file or the folder of a series")
    name = path.name.lower()
    if folder or name.endswith((".nii", ".nii.gz")) or dicomdir.is_dicomdir(str(path)):
        ref = _only_series(path, overrides)
        return load_series(ref, png_window=png_window, overrides=overrides), None
    if name.endswith(".png"):
        return _load_png_neighbours(path, png_window, overrides)
    return _load_dicom_neighbours(path, around, overrides)


def slice_of(volume: Volume, name: str | int) -> int:
    """The index, head to feet, of the slice `name`: a file, or a stored index.

    Raises:
      InputError: the volume has no such slice.
    """
    try:
        return volume.slices.index(str(name))
    except ValueError:
        raise InputError(
            f"no slice {name} in {volume.series}: it has {volume.slices[0]} to {volume.slices[-1]}"
        ) from None


def _only_series(path: pathlib.Path, overrides: reading.Overrides) -> SeriesRef:
    series, failures = search.find_series(path, overrides=overrides)
    if len(series) == 1:
        return series[0]
    if series:
        keys = ", ".join(ref.key for ref in series[:5]) + (", ..." if len(series) > 5 else "")
        raise InputError(f"{path} contains {len(series)} series ({keys}): pass one file or folder")
    if failures:
        raise Rejected(failures[0][1])
    raise InputError(f"{path} contains no CT: expected DICOM, NIfTI or PNG")


def _file_id(path: str) -> str:
    return content_id(containers.read_file(path))


def _load_dicom(
    ref: SeriesRef, overrides: reading.Overrides, distance: float | None = None
) -> Volume:
    """Reads the files of `ref`.

    Args:
      ref: a DICOM series, or a part of one.
      overrides: what is read although it would be rejected.
      distance: mm between slices, if `ref` is a part of a series that was already checked.
    """
    headers, planes, values = [], {}, units.Values()
    for path in containers.in_order(ref.paths):
        try:
            header, planes[path] = dicom.read_slice(path, values, overrides)
        except Rejected as error:
            raise Rejected(f"{search.relative_name(path, ref.root)}: {error}") from error
        headers.append(header)
    values.check(overrides)
    ordered, gap = order_slices(headers)
    return Volume(
        np.stack([planes.pop(header.path) for header in ordered]),
        (gap if distance is None else distance, *ordered[0].standard_spacing),
        ref.key,
        tuple(search.relative_name(header.path, ref.root) for header in ordered),
        tuple(header.uid for header in ordered),
        dicom.stack_affine(ordered),
        ordered[0].body_part,
    )


@functools.lru_cache(maxsize=2)
def _folder_headers(
    folder: str, _mtime_ns: int, overrides: reading.Overrides
) -> list[dicom.Header]:
    """The headers of the DICOM files directly in a folder, cached for reading slice by slice."""
    paths = [os.path.join(folder, name) for name in containers.list_folder(folder)]
    headers = [search.header_of(path, overrides) for path in containers.in_order(paths)]
    return [header for header in headers if isinstance(header, dicom.Header)]


def _load_dicom_neighbours(
    path: pathlib.Path, around: int, overrides: reading.Overrides
) -> tuple[Volume, int]:
    headers = _folder_headers(str(path.parent), containers.modified(path.parent), overrides)
    centre = next((header for header in headers if header.path == str(path)), None)
    if centre is None:
        reason = search.other_format(path)
        raise Rejected(reason or "not a CT image: expected DICOM, NIfTI or PNG")
    if centre.problem:
        raise Rejected(centre.problem)
    usable = [header for header in headers if not header.problem]
    group = next(group for group in search.group_by_series(usable) if centre in group)
    ordered, distance = order_slices(group)
    index = ordered.index(centre)
    first = max(0, index - around)
    paths = tuple(header.path for header in ordered[first : index + around + 1])
    ref = SeriesRef("dicom", paths, search.series_key(group), len(paths), str(path.parent))
    return _load_dicom(ref, overrides, distance), index - first


def _load_png_neighbours(
    path: pathlib.Path, window: tuple[float, float] | None, overrides: reading.Overrides
) -> tuple[Volume, int]:
    before, after = (str(png.neighbour_path(path, offset)) for offset in (-1, 1))
    centre = str(path)
    paths = tuple(p for p in (before, centre, after) if p == centre or containers.is_file(p))
    series, _ = png.split_name(path)
    ref = SeriesRef("png", paths, series, len(paths), str(path.parent))
    return load_series(ref, png_window=window, overrides=overrides), paths.index(centre)


def _load_png(
    ref: SeriesRef, window: tuple[float, float] | None, overrides: reading.Overrides
) -> Volume:
    planes: list[np.ndarray] = []
    values = units.Values()
    names = tuple(search.relative_name(path, ref.root) for path in ref.paths)
    for path, name in zip(ref.paths, names, strict=True):
        try:
            planes.append(png.read_png(path, window, values))
        except Rejected as error:
            raise Rejected(f"{name}: {error}") from error
        if planes[-1].shape != planes[0].shape:
            raise Rejected(f"{name} has another size than the other slices of its series")
    if len(values):  # the window states the HU of 8-bit files
        values.check(overrides)
    uids = tuple(_file_id(path) for path in ref.paths)
    return Volume(np.stack(planes), (math.nan,) * 3, ref.key, names, uids)
