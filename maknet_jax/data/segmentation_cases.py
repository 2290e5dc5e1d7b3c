"""CT with organ masks on disk: the layouts that `maknet prepare segmentations` reads.

    CASE/ct.nii.gz   CASE/segmentations/ORGAN.nii.gz   one mask per organ (TotalSegmentator)
    CASE/ct.nii.gz   CASE/segmentation.nii.gz          one label map whose values have names
    any tree of DICOM: CT series and the SEG files that reference them (as downloaded from IDC)

The names of a label map's values come from `CASE/segmentation.json` or `.csv`, else from the same
file in the folder above the case, else from the label table in the map's header. The JSON object
maps values to names or names to values; the CSV has the columns `value` and `name`. `.nii` is read
like `.nii.gz`, and zip and tar archives like folders. Only headers are read here.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from maknet_jax import files
from maknet_jax.ct import containers, dicom_seg, nifti, reading, search
from maknet_jax.data import csv_rows
from maknet_jax.errors import InputError, Rejected

LAYOUTS = (
    "CASE/ct.nii.gz with CASE/segmentations/ORGAN.nii.gz or CASE/segmentation.nii.gz, or DICOM CT "
    "with DICOM SEG"
)
_ENDINGS = (".nii.gz", ".nii")
_MASKS = "segmentations"  # the folder of a case's masks


@dataclasses.dataclass(frozen=True)
class Mask:
    """The location of the mask of one organ.

    Attributes:
      kind: "file" (any value above 0 is the organ), "value" of a label map, or "segment" of a SEG.
      path: the file.
      number: the value or the segment number; 0 for a file.
    """

    kind: str
    path: str
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One CT volume with its masks.

    Attributes:
      name: the folder relative to the searched one, or the SeriesInstanceUID.
      patient: the PatientID of a DICOM case; else the name.
      ref: the CT.
      masks: (mask name, location) pairs in alphabetical order.
    """

    name: str
    patient: str
    ref: search.SeriesRef
    masks: tuple[tuple[str, Mask], ...]


@dataclasses.dataclass
class Cases:
    """The result of a search.

    Attributes:
      cases: in alphabetical order of their folders.
      failures: (path, reason) of each file that cannot be used.
      unsegmented: (path, reason) of each CT series without a segmentation.
    """

    cases: list[Case] = dataclasses.field(default_factory=list)
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    unsegmented: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def find_cases(
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    overrides: reading.Overrides = reading.STRICT,
) -> Cases:
    """Finds the cases of a folder tree in any of the layouts.

    Args:
      folder: the tree; it must not mix NIfTI cases and DICOM.
      workers: threads that read DICOM headers.
      overrides: what is read although it would be rejected.

    Raises:
      InputError: it is not a folder, has no case, or is the unconverted OpenKBP release.
    """
    root = pathlib.Path(folder)
    if not containers.is_folder(root):
        raise InputError(f"{root} is not a folder: expected {LAYOUTS}")
    result = Cases()
    seg_files: list[str] = []
    released = found_nifti = False
    case: str | None = None  # the last folder of a case that is in no other case
    unreadable: list[tuple[str, str]] = []
    for place, subfolders, names in containers.walk(root, unreadable):
        released |= "ct.csv" in names
        inside = case is not None and place.startswith(case)
        if _has_file(names, "ct"):
            subfolders[:] = [name for name in subfolders if name != _MASKS]
            _add_nifti_case(root, pathlib.Path(place), result)
            case, found_nifti = case if inside else place + os.sep, True
            continue
        if inside:  # of a case, only other cases inside it matter
            continue
        others = [
            (os.path.join(place, name), reason)
            for name in names
            if name.startswith("ct.") and (reason := search.other_format(name))
        ]
        found_nifti |= bool(others)
        result.failures += others
        if not others and _has_masks(place, subfolders, names):
            result.failures.append((place, "masks without a CT: expected ct.nii.gz beside them"))
        seg_files += filter(_is_seg, (os.path.join(place, name) for name in names))
    if seg_files and not found_nifti:
        _add_dicom_cases(root, seg_files, workers, overrides, result)
    elif seg_files:
        reason = "DICOM SEG beside NIfTI cases is not read: prepare DICOM from a separate folder"
        result.failures += [(path, reason) for path in seg_files]
    # The search for DICOM lists them, too.
    result.failures += [failure for failure in unreadable if failure not in result.failures]
    if not result.cases and not result.failures:
        convert = " (OpenKBP's release: run `maknet prepare openkbp` first)" if released else ""
        raise InputError(f"{root} has no case: expected {LAYOUTS}{convert}")
    return result


def find_nifti_case(root: pathlib.Path, name: str) -> Case:
    """The NIfTI case of that name (`Case.name`) of a folder tree.

    Raises:
      Rejected: there is no such case, or it cannot be used.
    """
    folder = root if root.name == name and _nifti_file(root, "ct") else root / name
    if _nifti_file(folder, "ct") is None:
        raise Rejected(f"no case {name} under {root}: expected {folder}/ct.nii.gz")
    result = Cases()
    _add_nifti_case(root, folder, result)
    if result.failures:
        raise Rejected(": ".join(result.failures[0]))
    return result.cases[0]


def _is_seg(path: str) -> bool:
    try:
        return dicom_seg.is_segmentation(path)
    except OSError:
        return False


def _has_file(names: Sequence[str], stem: str) -> bool:
    """Whether one of the names is `stem`.nii.gz or `stem`.nii."""
    return any(f"{stem}{end}" in names for end in _ENDINGS)


def _has_masks(place: str, subfolders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a folder has a label map or masks."""
    if _has_file(names, "segmentation"):
        return True
    try:
        masks = containers.list_folder(os.path.join(place, _MASKS)) if _MASKS in subfolders else []
    except OSError:  # the search lists it
        return False
    return any(name.endswith(_ENDINGS) for name in masks)


def _nifti_file(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    """The file `stem`.nii.gz or `stem`.nii, if there is one.

    Raises:
      Rejected: there are both.
    """
    return _only([path for end in _ENDINGS if containers.is_file(path := folder / f"{stem}{end}")])


def _only(paths: Sequence[pathlib.Path]) -> pathlib.Path | None:
    if len(paths) > 1:
        raise Rejected(f"both {paths[0].name} and {paths[1].name} exist: remove one")
    return paths[0] if paths else None


def _add_nifti_case(root: pathlib.Path, folder: pathlib.Path, result: Cases) -> None:
    relative = folder.name if folder == root else folder.relative_to(root).as_posix()
    name = files.printable(relative)
    masks_folder, ct = folder / _MASKS, None
    try:
        ct = _nifti_file(folder, "ct")
        if ct is None:
            raise Rejected("no ct.nii.gz")
        count = nifti.check_nifti(ct)
        label_map = _nifti_file(folder, "segmentation")
        if containers.is_folder(masks_folder) == (label_map is not None):
            problem = "both" if label_map else "neither"
            raise Rejected(
                f"{problem} of segmentations/ and segmentation.nii.gz exist: expected exactly one"
            )
        masks = _label_map(label_map, root) if label_map else _mask_files(masks_folder)
        ref = search.SeriesRef("nifti", (str(ct),), name, count, str(root))
        result.cases.append(Case(name, name, ref, tuple(sorted(masks.items()))))
    except Rejected as error:
        result.failures.append((str(ct or folder), str(error)))


def _mask_files(folder: pathlib.Path) -> dict[str, Mask]:
    unreadable: list[tuple[str, str]] = []
    _, subfolders, names = next(containers.walk(folder, unreadable), ("", [], []))
    # A mask that cannot be read is not one that is missing, which may count as absent.
    unreadable += [(name, "a folder, not a file") for name in subfolders]
    for place, problem in unreadable:
        if place.endswith(_ENDINGS) or place == str(folder):
            raise Rejected(f"mask {os.path.basename(place)}: {problem}")
    masks: dict[str, Mask] = {}
    for path in map(folder.joinpath, names):
        if reason := search.other_format(path):
            raise Rejected(f"mask {path.name}: {reason}")
        end = next((end for end in _ENDINGS if path.name.endswith(end)), None)
        if end is None:
            continue
        name = files.printable(path.name.removesuffix(end))
        if name in masks:
            raise Rejected(f"two masks of {name}: {path.name} and {masks[name].path}")
        masks[name] = Mask("file", str(path))
    return masks


def _label_map(path: pathlib.Path, root: pathlib.Path) -> dict[str, Mask]:
    folders = [path.parent] if path.parent == root else [path.parent, path.parent.parent]
    named = ([folder / f"segmentation{end}" for end in (".json", ".csv")] for folder in folders)
    existing = [_only([*filter(containers.is_file, pair)]) for pair in named]
    table = next(filter(None, existing), None)
    names = _read_names(table) if table else nifti.read_label_names(path)
    names = {value: files.printable(name) for value, name in names.items() if value != 0 and name}
    if not names:
        raise Rejected(
            f"no names of the values of {path.name}: write segmentation.json or segmentation.csv "
            "beside it (its header has no label table)"
        )
    if len(set(names.values())) < len(names):
        raise Rejected(f"two values of {path.name} have the same name")
    return {name: Mask("value", str(path), value) for value, name in names.items()}


def _read_names(path: pathlib.Path) -> dict[int, str]:
    """Value -> name, from JSON or CSV.

    Raises:
      Rejected: the table is invalid.
    """
    try:
        content = containers.read_file(path)
        if path.suffix == ".json":
            table = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_Pairs)
            if not isinstance(table, _Pairs):
                raise ValueError("not an object")
            pairs = list(map(_named_value, table))
        else:
            rows = csv_rows.read_rows(path, content)
            pairs = [(int(row["value"]), row["name"]) for _, row in rows.cells]
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a value has two names")
        return names
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {reading.one_line(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InputError) as error:
        raise Rejected(
            f"{path} does not name values: expected JSON such as {{"
            f'"1": "liver"}} or a CSV with the columns value, name ({error})'
        ) from None


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object, repeated keys included."""


def _named_value(pair: tuple[str, Any]) -> tuple[int, str]:
    """A pair of {"1": "liver"}, or of {"liver": 1} as in nnU-Net."""
    key, value = pair
    if type(value) is int and not key.strip().isdecimal():  # not True
        return value, key.strip()
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is neither a value nor a name")
    return int(key), value.strip()


def _add_dicom_cases(
    root: pathlib.Path,
    seg_files: Sequence[str],
    workers: int,
    overrides: reading.Overrides,
    result: Cases,
) -> None:
    dicom_seg.require_highdicom()  # before reading the headers of a whole archive
    series, failures = search.find_series(root, workers=workers, overrides=overrides)
    segmentations = set(seg_files)
    result.failures += [failure for failure in failures if failure[0] not in segmentations]
    by_series: dict[str, list[dicom_seg.SegHeader]] = {}
    for path in seg_files:
        try:
            header = dicom_seg.read_header(path)
        except Rejected as error:
            result.failures.append((path, str(error)))
        else:
            by_series.setdefault(header.series, []).append(header)
    for ref in series:
        headers = by_series.pop(ref.key, [])
        if ref.kind != "dicom" or not headers:
            result.unsegmented.append((ref.paths[0], f"no segmentation of {ref.key}"))
            continue
        try:
            masks = dict(_segments(headers))
            patients = {header.patient for header in headers}
            if len(patients) != 1:
                raise Rejected(f"segmentations of {len(patients)} patients: {sorted(patients)}")
        except Rejected as error:
            result.failures.append((ref.paths[0], str(error)))
            continue
        patient = patients.pop() or ref.key
        result.cases.append(Case(ref.key, patient, ref, tuple(sorted(masks.items()))))
    for key, headers in by_series.items():
        reason = f"its CT series {key} is not under {root} or cannot be read"
        result.failures += [(header.path, reason) for header in headers]


def _segments(headers: Iterable[dicom_seg.SegHeader]) -> Iterator[tuple[str, Mask]]:
    paths: dict[str, str] = {}
    for header in headers:
        for number, name in header.segments:
            if name in paths:
                raise Rejected(f"two segmentations of {name}: {paths[name]} and {header.path}")
            paths[name] = header.path
            yield name, Mask("segment", header.path, number)
