"""CT series in files and folder trees, found by their headers."""

import collections
import concurrent.futures
import dataclasses
import errno
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeGuard

from maknet_jax import files
from maknet_jax.ct import (
    archives,
    containers,
    dicom,
    dicom_frames,
    dicom_pixels,
    dicomdir,
    nifti,
    own_outputs,
    png,
    reading,
)
from maknet_jax.ct.blocks import Block
from maknet_jax.ct.reading import content_id, one_line
from maknet_jax.ct.stacks import Stack, find_stacks, order_slices
from maknet_jax.errors import InputError, Rejected

_NIBABEL = "nibabel.save(nibabel.load(FILE), 'ct.nii.gz')"
_SIMPLE_ITK = "SimpleITK.WriteImage(SimpleITK.ReadImage(FILE), 'ct.nii.gz')"
_OTHER_FORMATS = {
    ".hdr": ("a pair of .hdr and .img", _NIBABEL),
    ".img": ("a pair of .hdr and .img", _NIBABEL),
    ".mha": ("MetaImage", _SIMPLE_ITK),
    ".mhd": ("MetaImage", _SIMPLE_ITK),
    ".nrrd": ("NRRD", _SIMPLE_ITK),
    ".nhdr": ("NRRD", _SIMPLE_ITK),
}
Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Headers: TypeAlias = list[dicom.Header] | OSError  # the result of `headers_of`
_BATCH = 4096  # maximum number of queued files, for archives of any size


@dataclasses.dataclass(frozen=True)
class SeriesRef:
    """The files of one series.

    Attributes:
      kind: "dicom", "nifti" or "png".
      paths: the files, head to feet.
      key: the SeriesInstanceUID, or a name relative to the root, see `find_series`.
      count: the number of slices.
      root: the folder that was searched.
      copies: the number of dropped copies of slices; they do not change the records.
      blocks: the division of a DICOM series by its headers; empty if unknown.
      spacing: mm along (y, x) by the headers of a DICOM series.
      encoded: whether its pixels are compressed, by the headers of a DICOM series.
    """

    kind: str
    paths: tuple[str, ...]
    key: str
    count: int
    root: str
    copies: int = dataclasses.field(default=0, repr=False)
    blocks: tuple[Block, ...] = dataclasses.field(default=(), repr=False, compare=False)
    spacing: tuple[float, ...] = dataclasses.field(default=(), repr=False, compare=False)
    encoded: bool = dataclasses.field(default=False, repr=False, compare=False)


@dataclasses.dataclass
class _Search:
    """The usable series and the (path, reason) pairs of one search."""

    root: str
    series: list[SeriesRef] = dataclasses.field(default_factory=list)
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(
        self, kind: str, paths: tuple[str, ...], key: str, count: int, copies: int = 0, **more: Any
    ) -> None:
        self.series.append(SeriesRef(kind, paths, key, count, self.root, copies, **more))


def find_series(
    path: Paths,
    *,
    workers: int = 1,
    overrides: reading.Overrides = reading.STRICT,
    read_headers: Callable[[Sequence[str], reading.Overrides], Iterable[Headers]] | None = None,
) -> tuple[list[SeriesRef], list[tuple[str, str]]]:
    """Finds all CT series in a file or a folder tree; only headers are read.

    Links are followed, and zip and tar archives are folders. Hidden files, files that do not claim
    to be images, and pictures that this package has written are skipped.

    Args:
      path: a file, a folder, an archive, or a DICOMDIR, which lists the files to read; or several.
        Names are relative to the folder or to that of the file, or to the common folder of several.
        The key of the only NIfTI file in it begins with its name, as in patient-7/ct.nii.gz.
      workers: threads that read DICOM headers.
      overrides: what is read although it would be rejected.
      read_headers: `headers_of` for several files outside of archives, which replaces the threads.

    Returns:
      (series in the order of the paths given, then of their files; (path, reason) of each file,
      folder and archive that cannot be used). Slices of one DICOM series that share a reason make
      one entry.

    Raises:
      InputError: a path does not exist, or is not a file or a folder.
    """
    places = as_list(path)
    for place in places:
        if not containers.is_folder(place) and not containers.is_file(place):
            state = "is neither a file nor a folder" if os.path.lexists(place) else "does not exist"
            raise InputError(f"{place} {state}: pass a file or a folder of CT")
    search = _Search(_root(places))
    headers: list[dicom.Header] = []
    pictures = []
    read = functools.partial(headers_of, overrides=overrides)
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        paths = _files(places, search.failures)
        while batch := list(itertools.islice(paths, _BATCH)):
            others = []
            for file in containers.in_order(batch):
                name = os.path.basename(file).lower()
                if name.endswith((".nii", ".nii.gz")):
                    _add_nifti(file, search)
                elif name.endswith(".png"):
                    if not png.is_own_output(file):
                        pictures.append(file)
                else:
                    others.append(file)
            # A compressed tar is read in its order, by one thread; other processes would have to
            # open any archive again.
            in_turn = containers.in_archive if read_headers else containers.is_sequential
            one_by_one = [file for file in others if in_turn(file)]
            at_once = [file for file in others if not in_turn(file)]
            many = read_headers(at_once, overrides) if read_headers else pool.map(read, at_once)
            each = itertools.chain(map(read, one_by_one), many)
            for file, result in zip(one_by_one + at_once, each, strict=True):
                if isinstance(result, OSError):
                    search.failures.append((file, f"cannot be read ({result.strerror})"))
                elif not result and (reason := other_format(file)):
                    search.failures.append((file, reason))
                else:
                    headers += result
    _add_dicom(sorted(headers, key=lambda header: header.path), search)
    _add_png(sorted(pictures), search)
    _name_folder(search)
    roots = [os.path.abspath(place) for place in places]

    def order(ref: SeriesRef) -> tuple[int, str, str]:
        file = os.path.abspath(dicom_frames.split_path(ref.paths[0])[0])
        inside = [file == root or file.startswith(root + os.sep) for root in roots]
        return (*inside, True).index(True), ref.paths[0], ref.key

    return sorted(search.series, key=order), sorted(search.failures)


def is_path(source: object) -> TypeGuard[Paths]:
    """Whether something is a path, or a list with paths or without anything."""
    several = source if isinstance(source, (list, tuple)) else [source]
    return not several or any(isinstance(one, (str, os.PathLike)) for one in several)


def as_list(path: Paths) -> list[str]:
    """One or several paths as a list.

    Raises:
      InputError: there is none, or one of them is not a path.
    """
    several = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    for one in several:
        if not isinstance(one, (str, os.PathLike)):
            raise InputError(f"{type(one).__name__} in a list of paths: pass files and folders")
    if not several:
        raise InputError("an empty list of paths: pass a file or a folder of CT")
    return [str(pathlib.Path(one)) for one in several]


def other_format(path: str | os.PathLike[str]) -> str:
    """Why a volume in another format is not read, and how to convert it; "" for other files."""
    name = os.path.basename(path).lower().removesuffix(".gz")
    kind, convert = _OTHER_FORMATS.get(os.path.splitext(name)[1], ("", ""))
    return f"{kind} is not supported: convert it to NIfTI, as in {convert}" if kind else ""


def contents(path: Paths) -> str:
    """What files or folders without CT hold, such as "3 other files (2 .jpg, 1 .pdf)"."""
    names: list[str] = []
    for place in as_list(path):
        if containers.is_folder(place):
            names += [name for _, _, here in containers.walk(place, []) for name in here]
        else:
            names.append(place)
    kinds = collections.Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)
    common = ", ".join(f"{count} {files.printable(kind)}" for kind, count in kinds.most_common(5))
    return f"{len(names)} other files ({common})" if names else "no file"


def headers_of(path: str, overrides: reading.Overrides = reading.STRICT) -> Headers:
    """The headers of a DICOM file, none for any other file, or the error that reading raised."""
    try:
        return dicom.read_headers(path, overrides) if dicom.looks_like_dicom(path) else []
    except OSError as error:
        return error
    except archives.DAMAGED as error:  # of an archive
        return OSError(errno.EIO, f"damaged archive: {one_line(error)}")


def group_by_series(headers: Iterable[dicom.Header]) -> list[list[dicom.Header]]:
    """Groups headers by series; files without a SeriesInstanceUID are grouped by folder.

    `find_stacks` divides a group into stacks.
    """
    groups: dict[str | tuple[str], list[dicom.Header]] = {}
    for header in headers:
        key = header.series or (os.path.dirname(header.path),)
        groups.setdefault(key, []).append(header)
    return list(groups.values())


def series_key(group: Sequence[dicom.Header]) -> str:
    """The SeriesInstanceUID of a group, or an id computed from the UIDs of its slices."""
    if group[0].series:
        return files.printable(group[0].series)
    return content_id("\n".join(sorted(header.uid for header in group)).encode())


def relative_name(path: str, root: str) -> str:
    """`path` relative to `root`, with forward slashes; what cannot be printed is escaped."""
    return files.printable(pathlib.PurePath(os.path.relpath(path, root)).as_posix())


def _root(places: Sequence[str]) -> str:
    """The folder that names are relative to."""
    folders = [
        place if containers.is_folder(place) else os.path.dirname(place) or "." for place in places
    ]
    if len(places) == 1:
        return folders[0]
    try:
        return os.path.commonpath(map(os.path.abspath, folders))
    except ValueError:  # on different drives
        return "."


def _files(places: Sequence[str], failures: list[tuple[str, str]]) -> Iterator[str]:
    """Yields the files of all places; one that is in several of them once.

    A folder that is named in several ways, such as by a link, keeps the first name,
    because the files of a folder may be one series.
    """
    each = (_walk(place, containers.is_folder(place), failures) for place in places)
    if len(places) == 1:
        yield from next(each)
        return
    seen: set[tuple[str, str]] = set()
    folders: dict[str, str] = {}  # real path -> the first name
    real_path = functools.lru_cache(os.path.realpath)
    for file in itertools.chain.from_iterable(each):
        folder, name = os.path.split(file)
        whole = real_path(folder)
        if (whole, name) not in seen:
            seen.add((whole, name))
            yield os.path.join(folders.setdefault(whole, folder), name)


def _walk(path: str, folder: bool, failures: list[tuple[str, str]]) -> Iterator[str]:
    """Yields the files of a tree in sorted order, or those that a DICOMDIR lists."""
    if folder:
        for place, folders, names in containers.walk(path, failures):
            if place != path and own_outputs.is_output_folder(place, names):
                folders.clear()
            else:
                yield from (os.path.join(place, name) for name in names)
    elif dicomdir.is_dicomdir(path):
        yield from dicomdir.listed_files(path, failures)
    else:
        yield path


def _add_nifti(path: str, search: _Search) -> None:
    try:
        count = nifti.check_nifti(path)
    except Rejected as error:
        search.failures.append((path, str(error)))
    else:
        search.add("nifti", (path,), relative_name(path, search.root), count)


def _name_folder(search: _Search) -> None:
    """Adds the name of the root to the key of the only NIfTI file in it: ct.nii.gz says little."""
    folder = os.path.basename(os.path.abspath(search.root))
    alone = [ref for ref in search.series if ref.kind == "nifti" and "/" not in ref.key]
    if folder and len(alone) == 1:
        place, key = search.series.index(alone[0]), f"{files.printable(folder)}/{alone[0].key}"
        search.series[place] = dataclasses.replace(alone[0], key=key)


def _add_dicom(headers: Sequence[dicom.Header], search: _Search) -> None:
    rejected: dict[tuple[str, str], list[str]] = {}
    for header in headers:
        if header.problem:
            key = header.series or header.path
            rejected.setdefault((key, header.problem), []).append(header.path)
    for (key, problem), paths in rejected.items():
        more = f" ({len(paths)} files of series {key})" if len(paths) > 1 else ""
        search.failures.append((paths[0], problem + more))
    keys: set[str] = set()
    for group in group_by_series(header for header in headers if not header.problem):
        key = series_key(group)
        if key in keys:  # a copied folder of slices without a SeriesInstanceUID
            _add_copies(key, len(group), search)
            continue
        keys.add(key)
        stacks, failures = find_stacks(group)
        search.failures += [(path, f"series {key}: {reason}") for path, reason in failures]
        for number, stack in enumerate(stacks, start=1):
            ordered = tuple(header.path for header in stack.headers)
            name = f"{key}:{number}" if len(stacks) > 1 else key
            search.add("dicom", ordered, name, len(ordered), len(stack.copies), **_layout(stack))


def _add_copies(key: str, count: int, search: _Search) -> None:
    """Counts copies of the slices of a series at its first stack, if it is usable."""
    for place, ref in enumerate(search.series):
        if ref.kind == "dicom" and ref.key in (key, f"{key}:1"):
            search.series[place] = dataclasses.replace(ref, copies=ref.copies + count)


def _layout(stack: Stack) -> dict[str, Any]:
    """What reading the series in order will give; empty if it will be rejected."""
    try:
        again = order_slices(stack.headers)
    except Rejected:
        return {}
    first = again.headers[0]
    encoded = first.syntax not in dicom_pixels.NATIVE
    return {"blocks": again.blocks, "spacing": first.standard_spacing, "encoded": encoded}


def _add_png(paths: Sequence[str], search: _Search) -> None:
    """Groups PNGs by folder and name; a gap in the indices starts a new series."""
    numbered: dict[tuple[str, str], list[tuple[int, str]]] = {}
    unnumbered: dict[tuple[str, str], str] = {}
    for path in paths:
        series, index = png.split_name(path)
        place = os.path.dirname(path), series
        if index is None:
            unnumbered.setdefault(place, path)
        else:
            numbered.setdefault(place, []).append((index, path))
    for (folder, series), path in unnumbered.items():
        search.add("png", (path,), _png_key(folder, series, search.root), 1)
    for (folder, series), items in numbered.items():
        base = _png_key(folder, series, search.root)
        items, copies = _without_copies(sorted(items))
        indices = [index for index, _ in items]
        if len(set(indices)) < len(indices):
            double = next(a for a, b in zip(indices, indices[1:], strict=False) if a == b)
            search.failures.append(
                (items[0][1], f"series {base}: two files have the index {double}")
            )
            continue
        starts = [k for k, index in enumerate(indices) if k == 0 or index != indices[k - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(items)], strict=True):
            run = tuple(path for _, path in items[start:end])
            key = f"{base}:{indices[start]}-{indices[end - 1]}"
            search.add("png", run, key, len(run), copies if start == 0 else 0)


def _without_copies(items: Sequence[tuple[int, str]]) -> tuple[list[tuple[int, str]], int]:
    """(sorted (index, path) pairs without copies of a file at the same index, their number)."""
    kept: list[tuple[int, str]] = []
    for index, path in items:
        if not (kept and kept[-1][0] == index and _equal(kept[-1][1], path)):
            kept.append((index, path))
    return kept, len(items) - len(kept)


def _equal(one: str, other: str) -> bool:
    try:
        return containers.read_file(one) == containers.read_file(other)
    except OSError:
        return False


def _png_key(folder: str, series: str, root: str) -> str:
    parent = relative_name(folder, root)
    if parent == ".":
        return series
    nested = series == os.path.basename(os.path.abspath(folder))
    return parent if nested else f"{parent}/{series}"
