"""CT series in folders of DICOM, NIfTI and PNG files: found by header, read as HU volumes."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import os
import pathlib

import numpy as np

from maknet_jax.ct import dicom, nifti, png
from maknet_jax.errors import InputError, Rejected

SAME_POSITION = 0.01  # mm
UNEVEN = 1.5  # neighbours this many times closer or farther than the median


@dataclasses.dataclass(frozen=True)
class Volume:
    """One CT series in the standard orientation.

    hu: int16 [Z, Y, X] in HU; slices run head to feet, rows anterior to posterior, columns from
      the patient's right to the left. Padding is what the file holds.
    spacing: mm between neighbours along (z, y, x); nan where unknown.
    series: the SeriesInstanceUID, or the name relative to the root.
    slices: a name for each slice: the file relative to the root; for NIfTI the index along the
      z axis of the file as stored.
    uids: for each slice the SOPInstanceUID, or one made from the digest of the file.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    series: str
    slices: tuple[str, ...]
    uids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SeriesRef:
    """Where one series lies. `kind` is "dicom", "nifti" or "png"; `paths` run head to feet."""

    kind: str
    paths: tuple[str, ...]
    key: str
    count: int
    root: str


def find_series(path, *, workers=1):
    """Finds all CT series in a file or a folder tree; only headers are read.

    Args:
      path: a file or a folder.
      workers: threads that read DICOM headers.

    Returns:
      (series in a fixed order, [(path, reason)] of the images that cannot be used). Files that
      do not claim to be images are passed over. Slices of one DICOM series that share a reason
      make one entry.

    Raises:
      InputError: the path does not exist.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a file or a folder of CT")
    root = path if path.is_dir() else path.parent
    headers, found, reasons, pictures = [], [], [], []
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        # In batches, so that an archive of any size never queues more than one.
        files = _walk(path)
        while batch := [file for file, _ in zip(files, range(4096), strict=False)]:
            dicom_like = []
            for file in batch:
                name = os.path.basename(file).lower()
                if name.endswith((".nii", ".nii.gz")):
                    try:
                        count = nifti.check_nifti(file)
                        key = _relative(file, root)
                        found.append(SeriesRef("nifti", (file,), key, count, str(root)))
                    except Rejected as error:
                        reasons.append((file, str(error)))
                elif name.endswith(".png"):
                    pictures.append(file)
                else:
                    dicom_like.append(file)
            for file, header in zip(dicom_like, pool.map(_sniff, dicom_like), strict=True):
                if isinstance(header, OSError):
                    reasons.append((file, f"cannot be read ({header.strerror})"))
                elif header is not None:
                    headers.append(header)
    _group_dicom(headers, root, found, reasons)
    _group_png(pictures, root, found, reasons)
    return sorted(found, key=lambda ref: (ref.paths[0], ref.key)), sorted(reasons)


def order_slices(headers):
    """Sorts the slices of one series from head to feet and checks that they make a stack.

    Returns:
      (headers in order, distance of neighbours in mm along the normal; nan for one slice)

    Raises:
      Rejected: what differs between slices, which two share a position, where one is missing.
    """
    first = headers[0]
    for header in headers:
        if header.problem:
            raise Rejected(f"{pathlib.Path(header.path).name}: {header.problem}")
        names = f"{pathlib.Path(first.path).name} and {pathlib.Path(header.path).name}"
        if header.shape != first.shape:
            raise Rejected(f"the matrix differs within the series: {names}")
        if header.frame != first.frame:
            raise Rejected(f"FrameOfReferenceUID differs within the series: {names}")
        if not np.allclose(header.orientation, first.orientation, rtol=0, atol=1e-3):
            raise Rejected(f"the orientation differs within the series: {names}")
        if not np.allclose(header.spacing, first.spacing, rtol=0, atol=1e-3, equal_nan=True):
            raise Rejected(f"PixelSpacing differs within the series: {names}")
        if header.position is None and len(headers) > 1:
            raise Rejected(f"{pathlib.Path(header.path).name}: no ImagePositionPatient")
    if len(headers) == 1:
        return list(headers), math.nan
    if len(headers) * first.shape[0] * first.shape[1] * 2 > nifti.LARGEST_SERIES:
        raise Rejected(f"{len(headers)} slices take more than {nifti.LARGEST_SERIES >> 30} GiB")
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    normal *= -np.sign(normal[2])  # towards the feet
    places = [float(normal @ header.position) for header in headers]
    # Paths break ties, so that the message about two slices at one place is always the same.
    ranks = sorted(range(len(headers)), key=lambda k: (round(places[k], 2), headers[k].path))
    headers = [headers[k] for k in ranks]
    places = [places[k] for k in ranks]
    gaps = np.diff(places)
    for k in np.flatnonzero(gaps < SAME_POSITION)[:1]:
        raise Rejected(
            f"two slices at one position ({places[k]:.2f} mm along the normal): "
            f"{pathlib.Path(headers[k].path).name} and {pathlib.Path(headers[k + 1].path).name}"
        )
    median = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    worst = int(np.argmax(np.maximum(gaps / median, median / gaps)))
    if max(gaps[worst] / median, median / gaps[worst]) > UNEVEN:
        raise Rejected(
            f"uneven slices: {gaps[worst]:.2f} mm between {pathlib.Path(headers[worst].path).name} "
            f"and {pathlib.Path(headers[worst + 1].path).name}, {median:.2f} mm elsewhere"
        )
    return headers, median


def load_series(ref, *, png_window=None):
    """Reads one series that `find_series` found; returns a Volume. Raises Rejected.

    Args:
      ref: a SeriesRef.
      png_window: (low, high) in HU of 8-bit PNGs.
    """
    try:
        if ref.kind == "dicom":
            return _load_dicom(ref)
        if ref.kind == "png":
            return _load_png(ref, png_window)
        hu, spacing, stored = nifti.read_nifti(ref.paths[0])
        digest = _digest(ref.paths[0])
    except OSError as error:  # the file went away, or may not be read
        raise Rejected(f"cannot be read ({error.strerror or error})") from error
    return Volume(hu, spacing, ref.key, stored, tuple(f"{digest}:{k}" for k in stored))


def load_series_of(path, *, png_window=None, around=1):
    """Reads what a path names, for people who list their own slices.

    Args:
      path: a DICOM or PNG file: its slice with the neighbours of its series in its folder, as far
        as they exist; a NIfTI file or a folder with exactly one series: all of it.
      png_window: (low, high) in HU of 8-bit PNGs.
      around: neighbours to either side; of a PNG always one.

    Returns:
      (Volume, index of the named slice in it; None for a whole volume).

    Raises:
      InputError: the path does not exist, or the folder holds no or several series.
      Rejected: the file or its series cannot be used.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a CT file or the folder of a series")
    name = path.name.lower()
    if path.is_dir() or name.endswith((".nii", ".nii.gz")):
        found, reasons = find_series(path)
        if len(found) == 1:
            return load_series(found[0], png_window=png_window), None
        if found:
            keys = ", ".join(ref.key for ref in found[:5]) + (", ..." if len(found) > 5 else "")
            raise InputError(f"{path} holds {len(found)} series ({keys}): name one file or folder")
        if reasons:
            raise Rejected(reasons[0][1])
        raise InputError(f"{path} holds no CT: DICOM, NIfTI and PNG are read")
    if name.endswith(".png"):
        centre = str(path)
        around = [str(png.neighbour_path(path, offset)) for offset in (-1, 1)]
        paths = [p for p in (around[0], centre, around[1]) if p == centre or os.path.exists(p)]
        series, _ = png.split_name(path)
        ref = SeriesRef("png", tuple(paths), series, len(paths), str(path.parent))
        return load_series(ref, png_window=png_window), paths.index(centre)
    return _load_dicom_neighbours(path, around)


def slice_of(volume, name):
    """The index, head to feet, of the slice called `name`: a file, or an index as stored.

    Raises:
      InputError: there is no such slice.
    """
    try:
        return volume.slices.index(str(name))
    except ValueError:
        raise InputError(
            f"no slice {name} in {volume.series}: it has {volume.slices[0]} to {volume.slices[-1]}"
        ) from None


def _walk(path):
    """Yields the files of a tree in sorted order, hidden ones left out."""
    if not path.is_dir():
        yield str(path)
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            full = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(full):
                yield full


def _relative(path, root):
    return pathlib.PurePath(os.path.relpath(path, root)).as_posix()


def _digest(path):
    return "sha256:" + hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:32]


def _sniff(path):
    """The header of a DICOM file, None for any other file, or the OSError."""
    try:
        return dicom.read_header(path) if dicom.looks_like_dicom(path) else None
    except OSError as error:
        return error


def _series_groups(headers):
    """Headers by series; files without a SeriesInstanceUID belong together by folder.

    (Whether such files really make one stack is for `order_slices` to find out.)
    """
    groups = {}
    for header in headers:
        key = header.series or (os.path.dirname(header.path),)
        groups.setdefault(key, []).append(header)
    return groups


def _series_key(group):
    if group[0].series:
        return group[0].series
    uids = "\n".join(sorted(header.uid for header in group))
    return "sha256:" + hashlib.sha256(uids.encode()).hexdigest()[:32]


def _group_dicom(headers, root, found, reasons):
    bad = {}
    for header in headers:
        if header.problem:
            key = header.series or header.path
            bad.setdefault((key, header.problem), []).append(header.path)
    for (key, problem), paths in bad.items():
        more = f" ({len(paths)} files of series {key})" if len(paths) > 1 else ""
        reasons.append((paths[0], problem + more))
    for group in _series_groups([header for header in headers if not header.problem]).values():
        key = _series_key(group)
        try:
            ordered, _ = order_slices(group)
        except Rejected as error:
            reasons.append((group[0].path, f"series {key}: {error}"))
        else:
            paths = tuple(header.path for header in ordered)
            found.append(SeriesRef("dicom", paths, key, len(paths), str(root)))


def _group_png(paths, root, found, reasons):
    """Groups PNGs by folder and name; a gap in the indices begins a new series."""
    groups = {}
    for path in paths:
        series, index = png.split_name(path)
        folder = os.path.dirname(path)
        groups.setdefault((folder, series, index is None), []).append((index, path))
    for (folder, series, unnumbered), items in groups.items():
        parent = _relative(folder, root)
        nested = series == os.path.basename(os.path.abspath(folder))
        base = series if parent == "." else parent if nested else f"{parent}/{series}"
        if unnumbered:
            path = items[0][1]
            found.append(SeriesRef("png", (path,), base, 1, str(root)))
            continue
        items.sort()
        indices = [index for index, _ in items]
        if len(set(indices)) < len(indices):
            double = next(a for a, b in zip(indices, indices[1:], strict=False) if a == b)
            reasons.append((items[0][1], f"series {base}: two files have the index {double}"))
            continue
        starts = [k for k, index in enumerate(indices) if k == 0 or index != indices[k - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(items)], strict=True):
            run = tuple(path for _, path in items[start:end])
            key = f"{base}:{indices[start]}-{indices[end - 1]}"
            found.append(SeriesRef("png", run, key, len(run), str(root)))


def _load_dicom(ref, distance=None):
    """Reads the files of `ref`; `distance` is given where they are part of a checked series."""
    headers, planes = [], {}
    for path in ref.paths:
        try:
            header, planes[path] = dicom.read_slice(path)
        except Rejected as error:
            raise Rejected(f"{_relative(path, ref.root)}: {error}") from error
        headers.append(header)
    ordered, gap = order_slices(headers)
    return Volume(
        np.stack([planes.pop(header.path) for header in ordered]),
        (gap if distance is None else distance, *dicom.spacing_of(ordered[0])),
        ref.key,
        tuple(_relative(header.path, ref.root) for header in ordered),
        tuple(header.uid for header in ordered),
    )


@functools.lru_cache(maxsize=2)
def _folder_headers(folder, _changed):
    """The headers of the DICOM files right in a folder; kept, as its slices are asked in turn."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    paths = [os.path.join(folder, name) for name in names]
    headers = [_sniff(path) for path in paths if os.path.isfile(path)]
    return [header for header in headers if isinstance(header, dicom.Header)]


def _load_dicom_neighbours(path, around):
    headers = _folder_headers(str(path.parent), os.stat(path.parent).st_mtime_ns)
    own = next((header for header in headers if header.path == str(path)), None)
    if own is None:
        raise Rejected("not a CT image: DICOM, NIfTI and PNG are read")
    if own.problem:
        raise Rejected(own.problem)
    good = [header for header in headers if not header.problem]
    group = next(g for g in _series_groups(good).values() if own in g)
    ordered, distance = order_slices(group)
    index = ordered.index(own)
    first = max(0, index - around)
    chosen = tuple(header.path for header in ordered[first : index + around + 1])
    ref = SeriesRef("dicom", chosen, _series_key(group), len(chosen), str(path.parent))
    return _load_dicom(ref, distance), index - first


def _load_png(ref, window):
    planes = []
    for path in ref.paths:
        try:
            planes.append(png.read_png(path, window))
        except Rejected as error:
            raise Rejected(f"{_relative(path, ref.root)}: {error}") from error
        if planes[-1].shape != planes[0].shape:
            raise Rejected(f"the size of {_relative(path, ref.root)} differs within its series")
    names = tuple(_relative(path, ref.root) for path in ref.paths)
    uids = tuple(_digest(path) for path in ref.paths)
    return Volume(np.stack(planes), (math.nan,) * 3, ref.key, names, uids)
