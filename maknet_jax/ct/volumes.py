"""CT series read as volumes of Hounsfield units in the standard orientation."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from maknet_jax.ct import (
    containers,
    dicom,
    dicom_frames,
    dicomdir,
    nifti,
    paged,
    pieces,
    png,
    preprocess,
    reading,
    search,
    units,
)
from maknet_jax.ct.blocks import Block, segment
from maknet_jax.ct.read_ahead import read_ahead
from maknet_jax.ct.search import SeriesRef
from maknet_jax.ct.stacks import Stack, find_stacks
from maknet_jax.errors import InputError, Rejected


@dataclasses.dataclass(frozen=True)
class Volume:
    """One CT series in the standard orientation of `geometry`.

    Attributes:
      hu: int16 [Z, Y, X] in HU; padding values are not changed.
      spacing: mm between neighbours along (z, y, x); nan where unknown, and along z where the
        distance of slices changes.
      series: the SeriesInstanceUID, or the name relative to the root.
      slices: a name for each slice: its file relative to the root; in a volume with a `file` the
        index along the stored z axis.
      uids: for each slice the SOPInstanceUID, or an id computed from the content of the file.
      affine: `[4, 4]`, indices (x, y, z) of `hu` to RAS in mm; None where unknown.
      body_part: the tag BodyPartExamined of the first slice; "" without it.
      blocks: the division into evenly spaced blocks; empty if there is one block.
      context: the slices in the folder before the first and after the last one, which are its
        neighbours but not part of the volume; None where there is none.
      file: the NIfTI file of all slices relative to the root, or the name of the array; "" where
        each slice has its own file or frame.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    series: str
    slices: tuple[str, ...]
    uids: tuple[str, ...]
    affine: np.ndarray | None = None
    body_part: str = ""
    blocks: tuple[Block, ...] = ()
    context: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    file: str = ""

    def neighbours(self, centre: int) -> list[np.ndarray]:
        """The slice before, the slice, and the slice after it.

        At the ends, beside missing slices and at lateral jumps the slice itself is repeated.
        """
        first, stop = segment(self.blocks, centre, len(self.hu))
        around = preprocess.neighbours(self.hu[first:stop], centre - first)
        before, after = self.context
        if centre == 0 and before is not None:
            around[0] = before
        if centre == len(self.hu) - 1 and after is not None:
            around[2] = after
        return around

    def triplets(self) -> list[tuple[int, float]]:
        """(middle slice, mm between its slices) of triplets without overlap within blocks."""
        whole = Block(0, len(self.hu), self.spacing[0], 0.0, False)
        return triplets_of(self.blocks or (whole,))

    @property
    def z_mm(self) -> np.ndarray:
        """Float `[Z]`: mm of each slice below the first one; nan where the spacing is unknown."""
        if len(self.hu) == 1:
            return np.zeros(1)
        if len(self.blocks) < 2:
            return np.arange(len(self.hu)) * self.spacing[0]
        return np.concatenate(
            [
                block.offset
                + np.concatenate([[0.0], np.arange(1, block.stop - block.start) * block.distance])
                for block in self.blocks
            ]
        )

    @property
    def position_mm(self) -> np.ndarray:
        """Float `[Z]`: the scanner's z of each slice (of its first voxel), which decreases towards
        the feet; nan where the affine is unknown, as in series whose distances change.
        """
        if self.affine is None:
            return np.full(len(self.hu), math.nan)
        return self.affine[2, 3] + self.affine[2, 2] * np.arange(len(self.hu))

    @property
    def json_spacing(self) -> list[float | None]:
        """The spacing for JSON: None where it is unknown."""
        return spacing_json(self.spacing)


def triplets_of(blocks: Iterable[Block]) -> list[tuple[int, float]]:
    """(middle slice, mm between its slices) of triplets without overlap within blocks."""
    return [
        (block.start + centre, block.distance)
        for block in blocks
        for centre in preprocess.centres(block.stop - block.start, overlap=False)
    ]


def spacing_json(spacing: Sequence[float]) -> list[float | None]:
    """Mm for JSON: None where unknown."""
    return [None if math.isnan(mm) else float(mm) for mm in spacing]


def load_series(
    ref: SeriesRef,
    *,
    png_window: tuple[float, float] | None = None,
    overrides: reading.Overrides = reading.STRICT,
) -> Volume:
    """Reads one series.

    Args:
      ref: one of the series of `search.find_series`. A single DICOM or PNG file is read with its
        neighbours in the folder as context.
      png_window: (low, high) in HU of 8-bit PNGs.
      overrides: what is read although it would be rejected.

    Raises:
      Rejected: a file of the series cannot be used, or the values are not HU.
    """
    try:
        if ref.kind == "dicom":
            if len(ref.paths) > 1:
                return _load_dicom(ref, overrides)
            return _load_dicom_slice(ref, overrides)
        if ref.kind == "png":
            if len(ref.paths) > 1:
                return _load_png(ref, png_window, overrides)
            around = _load_png_neighbours(pathlib.Path(ref.paths[0]), png_window, overrides)
            return _only_slice(*around, ref)
        hu, spacing, stored = nifti.read_nifti(ref.paths[0], overrides)
        affine = nifti.read_affine(ref.paths[0])
        digest = containers.content_id(ref.paths[0])
    except OSError as error:  # the file was removed or is not readable
        raise Rejected(f"cannot be read ({error.strerror or error})") from error
    uids = tuple(f"{digest}:{k}" for k in stored)
    file = search.relative_name(ref.paths[0], ref.root)
    return Volume(hu, spacing, ref.key, stored, uids, affine, file=file)


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
        folder; or a NIfTI file, a multi-frame DICOM file or a folder with exactly one series, of
        which the whole volume is read.
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
    headers = search.headers_of(str(path), overrides)
    if isinstance(headers, list) and len(headers) > 1:
        return load_series(_only_series(path, overrides), overrides=overrides), None
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


def _load_dicom(
    ref: SeriesRef, overrides: reading.Overrides, distance: float | None = None
) -> Volume:
    """Reads the files of `ref`.

    Args:
      ref: a DICOM series, or a part of one.
      overrides: what is read although it would be rejected.
      distance: mm between slices, if `ref` is a part of a series that was already checked.
    """
    planes = paged.Slices(len(ref.paths))
    evidence = pieces.read_slices(ref, planes.append, overrides)
    stack = pieces.check([evidence], overrides)  # rejects slices of different shapes
    numbers = {header.path: number for number, header in enumerate(evidence.headers)}
    return Volume(
        planes.ordered([numbers[header.path] for header in stack.headers]),
        (stack.distance if distance is None else distance, *stack.headers[0].standard_spacing),
        ref.key,
        tuple(search.relative_name(header.path, ref.root) for header in stack.headers),
        tuple(header.uid for header in stack.headers),
        dicom.stack_affine(stack.headers) if len(stack.blocks) == 1 else None,
        stack.headers[0].body_part,
        stack.blocks if len(stack.blocks) > 1 else (),
    )


def _load_dicom_slice(ref: SeriesRef, overrides: reading.Overrides) -> Volume:
    """The slice of a series of one file, with its neighbours in the folder as context."""
    if dicom_frames.split_path(ref.paths[0])[1] is not None:
        return _load_dicom(ref, overrides)
    volume, index = _load_dicom_neighbours(pathlib.Path(ref.paths[0]), 1, overrides)
    return _only_slice(volume, index, ref)


def _only_slice(volume: Volume, index: int, ref: SeriesRef) -> Volume:
    """One slice of a volume, with its neighbours as context."""
    before, _, after = volume.neighbours(index)
    here = slice(index, index + 1)
    return dataclasses.replace(
        volume,
        hu=volume.hu[here],
        series=ref.key,
        slices=(search.relative_name(ref.paths[0], ref.root),),
        uids=volume.uids[here],
        affine=None,
        blocks=(),
        context=(before, after),
    )


@functools.lru_cache(maxsize=2)
def _folder_headers(
    folder: str, _mtime_ns: int, overrides: reading.Overrides
) -> list[dicom.Header]:
    """The headers of the DICOM files directly in a folder, cached for reading slice by slice."""
    paths = [os.path.join(folder, name) for name in containers.list_folder(folder)]
    read = [search.headers_of(path, overrides) for path in containers.in_order(paths)]
    return [header for headers in read if isinstance(headers, list) for header in headers]


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
    try:
        stack, index = _place_of(centre, *find_stacks(group))
    except Rejected:  # perhaps for other images at this position, which do not matter here
        others = [header for header in group if header.position != centre.position]
        stack, index = _place_of(centre, *find_stacks([*others, centre]))
    first, stop = segment(stack.blocks, index, len(stack.headers))
    first, stop = max(first, index - around), min(stop, index + around + 1)
    paths = tuple(header.path for header in stack.headers[first:stop])
    ref = SeriesRef("dicom", paths, search.series_key(group), len(paths), str(path.parent))
    return _load_dicom(ref, overrides, stack.distance), index - first


def _place_of(
    centre: dicom.Header, stacks: Sequence[Stack], failures: Sequence[tuple[str, str]]
) -> tuple[Stack, int]:
    """The stack of a slice, and its index there or that of the slice that it repeats."""
    originals = dict(pair for stack in stacks for pair in stack.copies)
    wanted = originals.get(centre.path, centre.path)
    for stack in stacks:
        for index, header in enumerate(stack.headers):
            if header.path == wanted:
                return stack, index
    reasons = [reason for path, reason in failures if path == centre.path]
    raise Rejected((reasons or [reason for _, reason in failures])[0])


def _load_png_neighbours(
    path: pathlib.Path, window: tuple[float, float] | None, overrides: reading.Overrides
) -> tuple[Volume, int]:
    before, after = (str(png.neighbour_path(path, offset)) for offset in (-1, 1))
    centre = str(path)
    paths = tuple(p for p in (before, centre, after) if p == centre or containers.is_file(p))
    series, _ = png.split_name(path)
    ref = SeriesRef("png", paths, series, len(paths), str(path.parent))
    return _load_png(ref, window, overrides), paths.index(centre)


def _load_png(
    ref: SeriesRef, window: tuple[float, float] | None, overrides: reading.Overrides
) -> Volume:
    planes, values = paged.Slices(len(ref.paths)), units.Values()
    names = tuple(search.relative_name(path, ref.root) for path in ref.paths)
    for path, name in zip(ref.paths, names, strict=True):
        try:
            planes.append(png.read_png(path, window, values))
        except Rejected as error:
            raise Rejected(f"{name}: {error}") from error
        if not planes.alike:
            raise Rejected(f"{name} has another size than the other slices of its series")
    if len(values):  # the window states the HU of 8-bit files
        values.check(overrides)
    uids = tuple(containers.content_id(path) for path in ref.paths)
    hu = planes.ordered(range(len(names)))
    return Volume(hu, (math.nan,) * 3, ref.key, names, uids)
