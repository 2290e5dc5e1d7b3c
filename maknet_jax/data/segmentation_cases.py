"""CT with organ masks on disk: the layouts that `maknet prepare segmentations` reads.

    CASE/ct.nii.gz   CASE/segmentations/ORGAN.nii.gz   one mask per organ (TotalSegmentator)
    CASE/ct.nii.gz   CASE/segmentation.nii.gz          one label map whose values have names
    any tree of DICOM: CT series and the SEG files that reference them (as downloaded from IDC)

The names of a label map's values come from `CASE/segmentation.json` or `.csv`, else from the same
file in the folder above the case, else from the label table in the map's header. The JSON object
maps values to names or names to values; the CSV has the columns `value` and `name`. `.nii` is read
like `.nii.gz`, and zip and tar archives like folders. Only headers are read here.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from maknet_jax import files
from maknet_jax.ct import containers, dicom_seg, nifti, reading, search
from maknet_jax.errors import InputError, Rejected

LAYOUTS = (
    "CASE/ct.nii.gz with CASE/segmentations/ORGAN.nii.gz or CASE/segmentation.nii.gz, or DICOM CT "
    "with DICOM SEG"
)
_ENDINGS = (".nii.gz", ".nii")


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
    released = False
    unreadable: list[tuple[str, str]] = []
    for place, subfolders, names in containers.walk(root, unreadable):
        released |= "ct.csv" in names
        ct = _nifti_file(pathlib.Path(place), "ct")
        if ct is not None:
            subfolders.clear()
            _add_nifti_case(root, pathlib.Path(place), ct, result)
            continue
        result.failures += [
            (os.path.join(place, name), reason)
            for name in names
            if name.startswith("ct.") and (reason := search.other_format(name))
        ]
        seg_files += filter(_is_seg, (os.path.join(place, name) for name in names))
    found_nifti = bool(result.cases or result.failures)
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
    ct = _nifti_file(folder, "ct")
    if ct is None:
        raise Rejected(f"no case {name} under {root}: expected {folder}/ct.nii.gz")
    result = Cases()
    _add_nifti_case(root, folder, ct, result)
    if result.failures:
        raise Rejected(": ".join(result.failures[0]))
    return result.cases[0]


def _is_seg(path: str) -> bool:
    try:
        return dicom_seg.is_segmentation(path)
    except OSError:
        return False


def _nifti_file(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    return next((p for end in _ENDINGS if containers.is_file(p := folder / f"{stem}{end}")), None)


def _add_nifti_case(
    root: pathlib.Path, folder: pathlib.Path, ct: pathlib.Path, result: Cases
) -> None:
    relative = folder.name if folder == root else folder.relative_to(root).as_posix()
    name = files.printable(relative)
    masks_folder, label_map = folder / "segmentations", _nifti_file(folder, "segmentation")
    try:
        count = nifti.check_nifti(ct)
        if containers.is_folder(masks_folder) == (label_map is not None):
            problem = "both" if label_map else "neither"
            raise Rejected(
                f"{problem} of segmentations/ and segmentation.nii.gz exist: expected exactly one"
            )
        masks = _label_map(label_map, root) if label_map else _mask_files(masks_folder)
        ref = search.SeriesRef("nifti", (str(ct),), name, count, str(root))
        result.cases.append(Case(name, name, ref, tuple(sorted(masks.items()))))
    except Rejected as error:
        result.failures.append((str(ct), str(error)))


def _mask_files(folder: pathlib.Path) -> dict[str, Mask]:
    masks: dict[str, Mask] = {}
    for path in map(folder.joinpath, containers.list_folder(folder)):
        if reason := search.other_format(path):
            raise Rejected(f"mask {path.name}: {reason}")
        end = next((end for end in _ENDINGS if path.name.endswith(end)), None)
        if end is None:
            continue
        name = path.name.removesuffix(end)
        if name in masks:
            raise Rejected(f"two masks of {name}: {path.name} and {masks[name].path}")
        masks[name] = Mask("file", str(path))
    return masks


def _label_map(path: pathlib.Path, root: pathlib.Path) -> dict[str, Mask]:
    folders = [path.parent] if path.parent == root else [path.parent, path.parent.parent]
    named = [folder / f"segmentation{end}" for folder in folders for end in (".json", ".csv")]
    table = next(filter(containers.is_file, named), None)
    names = _read_names(table) if table else nifti.read_label_names(path)
    names = {value: name for value, name in names.items() if value != 0 and name}
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
        text = containers.read_file(path).decode("utf-8-sig")
        if path.suffix == ".json":
            pairs: Iterable[tuple[Any, Any]] = json.loads(text).items()
            # {"1": "liver"}, or {"liver": 1} as in nnU-Net.
            return dict(
                (int(value), str(key)) if isinstance(value, int) else (int(key), str(value))
                for key, value in pairs
            )
        rows = list(csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True))
        return {int(row["value"]): row["name"].strip() for row in rows}
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise Rejected(
            f"{path} does not name values: expected JSON such as {{"
            f'"1": "liver"}} or a CSV with the columns value, name ({error})'
        ) from None


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
