"""DeepLesion's table of key slices and LesaNet's labels for them.

DeepLesion: Yan et al., J. Med. Imaging 5(3), 2018. Labels: Yan et al., arXiv:1904.04661 (LesaNet).
"""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Container, Iterable, Sequence
from typing import Any

from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError

SPLITS = ("train", "val", "test")
# Lesions per split in the paper (section 2), after dropping noisy rows.
PAPER_COUNTS = {"train": 17697, "val": 1686, "test": 1638, "hand": 490}

_REQUIRED = (
    "File_name",
    "Patient_index",
    "Study_index",
    "Series_ID",
    "Key_slice_index",
    "Bounding_boxes",
    "Normalized_lesion_location",
    "Possibly_noisy",
    "Spacing_mm_px_",
    "Train_Val_Test",
)
_WINDOW = 200  # the numbering is checked separately in each run of this many labelled lesions
_TOLERATED = 0.01  # share that may contradict the official split; 0 in the real files at base 1


@dataclasses.dataclass(frozen=True)
class Lesion:
    """One row of `DL_info.csv`.

    Attributes:
      row: index of the row, from 0.
      file_name: of the key slice, as written: `PPPPPP_SS_RR_NNN.png` or nested.
      patient, study, series, key_slice: DeepLesion's indices.
      box: (x1, y1, x2, y2) in pixels, counted from 1.
      location: normalised (x, y, z).
      spacing: (x, y, z) in mm.
      noisy: marked `Possibly_noisy`.
      official_split: one of `SPLITS`.
      lesion_idx: the lesion number, None unless the file has that column.
    """

    row: int
    file_name: str
    patient: int
    study: int
    series: int
    key_slice: int
    box: tuple[float, ...]
    location: tuple[float, ...]
    spacing: tuple[float, ...]
    noisy: bool
    official_split: str
    lesion_idx: int | None

    @property
    def slice_id(self) -> str:
        """DeepLesion's name of the slice, `PPPPPP_SS_RR_NNN`."""
        return self.file_name.removesuffix(".png").replace("/", "_")


def read_info(path: str | os.PathLike) -> list[Lesion]:
    """Reads `DL_info.csv` in file order; extra columns and float ages are accepted.

    Raises:
      InputError: the file or a column is missing, or a cell cannot be read.
    """
    path = pathlib.Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [column for column in _REQUIRED if column not in header]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}: is it DL_info.csv?")
            return [_lesion(path, number, row) for number, row in enumerate(reader)]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: pass the DL_info.csv of DeepLesion") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV table: {error}") from None


def find_image(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The file of a slice in a nested or flat `folder`, or None if it is missing."""
    flat = name.replace("/", "_")
    nested = pathlib.PurePath(*flat.rsplit("_", 1))
    return next((path for path in (folder / nested, folder / flat) if path.is_file()), None)


def _lesion(path: pathlib.Path, number: int, row: dict[str, str]) -> Lesion:
    try:
        return Lesion(
            row=number,
            file_name=row["File_name"],
            patient=_whole(row["Patient_index"]),
            study=_whole(row["Study_index"]),
            series=_whole(row["Series_ID"]),
            key_slice=_whole(row["Key_slice_index"]),
            box=_numbers(row["Bounding_boxes"], 4),
            location=_numbers(row["Normalized_lesion_location"], 3),
            spacing=_numbers(row["Spacing_mm_px_"], 3),
            noisy=_whole(row["Possibly_noisy"]) != 0,
            official_split=SPLITS[_choice(_whole(row["Train_Val_Test"]), (1, 2, 3)) - 1],
            lesion_idx=_whole(row["lesion_idx"]) if row.get("lesion_idx") else None,
        )
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} line {number + 2} cannot be read: {error}") from None


def _whole(cell: str) -> int:
    value = float(cell)
    if value != int(value):
        raise ValueError(f"{cell!r} should be an integer")
    return int(value)


def _choice(value: int, allowed: Container[int]) -> int:
    if value not in allowed:
        raise ValueError(f"{value} should be one of {allowed}")
    return value


def _numbers(cell: str, count: int) -> tuple[float, ...]:
    values = tuple(float(part) for part in cell.split(","))
    if len(values) != count:
        raise ValueError(f"{cell!r} should be {count} numbers")
    return values


@dataclasses.dataclass(frozen=True)
class MinedLabels:
    """LesaNet's text-mined labels.

    Attributes:
      terms: all label names in column order.
      split, relevant, uncertain: lesion number -> split, and label names.
    """

    terms: tuple[str, ...]
    split: dict[int, str]
    relevant: dict[int, tuple[str, ...]]
    uncertain: dict[int, tuple[str, ...]]


def read_mined_labels(path: str | os.PathLike) -> MinedLabels:
    """Reads LesaNet's `text_mined_labels_171_and_split.json`.

    Raises:
      InputError: the file is missing or has a different format.
    """
    content = _read_json(path)
    split: dict[int, str] = {}
    relevant: dict[int, tuple[str, ...]] = {}
    uncertain: dict[int, tuple[str, ...]] = {}
    try:
        terms = tuple(content["term_list"])
        for name in SPLITS:
            numbers = content[f"{name}_lesion_idxs"]
            for number in numbers:
                if split.setdefault(number, name) != name:
                    raise InputError(f"{path}: lesion {number} is in {split[number]} and {name}")
            for kind, target in (("relevant", relevant), ("uncertain", uncertain)):
                lists = content[f"{name}_{kind}_labels"]
                if len(lists) != len(numbers):
                    raise InputError(
                        f"{path}: {name}_{kind}_labels has {len(lists)} entries for "
                        f"{len(numbers)} lesions"
                    )
                for number, indices in zip(numbers, lists, strict=True):
                    target[number] = tuple(dict.fromkeys(terms[index] for index in indices))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not LesaNet's label file: {error!r}") from None
    return MinedLabels(terms, split, relevant, uncertain)


def read_hand_labels(path: str | os.PathLike) -> dict[int, tuple[str, ...]]:
    """Reads LesaNet's `hand_labeled_test_set.json`: lesion number -> label names."""
    content = _read_json(path)
    try:
        return {int(row["lesion_idx"]): tuple(row["expanded_terms"]) for row in content}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not LesaNet's hand-labelled set: {error!r}") from None


def _read_json(path: str | os.PathLike) -> Any:
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: see data/README.md") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None


@dataclasses.dataclass(frozen=True)
class Numbering:
    """The row of each lesion number.

    Attributes:
      lesions: lesion number -> row.
      reason: one line: the numbering and the evidence for it.
      base: the number of the first row; None if the column lesion_idx numbers the rows.
    """

    lesions: dict[int, Lesion]
    reason: str
    base: int | None = None


def number_lesions(rows: Sequence[Lesion], mined: MinedLabels) -> Numbering:
    """Finds the row that each lesion number of `mined` refers to.

    LesaNet numbers the rows of the full DL_info.csv: from 0 according to its readme, from 1
    according to its files. A wrong base silently moves every label to the next lesion, so the base
    is inferred from the data. Throughout the file, LesaNet's val and test lesions must be in the
    official val and test splits, and no train lesion in the official test split; on average, chest
    lesions must be above abdominal ones, and those above pelvic ones. (A row missing after the last
    change of split is not detected; it shifts only the labels that follow it.)

    Args:
      rows: see `read_info`, in file order.
      mined: LesaNet's labels.

    Raises:
      InputError: neither 0 nor 1 fits (a partial or reordered file, or different label files), or
        the column lesion_idx repeats a number or contradicts the official split.
    """
    if any(row.lesion_idx is not None for row in rows):
        return _numbered_by_column(rows, mined)
    verdicts = {base: _misfit(rows, mined, base) for base in (1, 0)}
    fitting = [base for base, misfit in verdicts.items() if misfit is None]
    if len(fitting) != 1:
        why = "; ".join(f"from {base}: {misfit or 'fits'}" for base, misfit in verdicts.items())
        raise InputError(
            f"lesion numbers cannot be matched to the {len(rows)} rows of DL_info ({why}): use the "
            "full DL_info.csv in its original order, or add a column lesion_idx"
        )
    base = fitting[0]
    shared = sum(row.row + base in mined.split for row in rows)
    reason = (
        f"numbered from {base}: {shared} labelled lesions agree with the official split and with "
        f"the order of body parts along z; from {1 - base}: {verdicts[1 - base]}"
    )
    return Numbering({row.row + base: row for row in rows}, reason, base)


def _numbered_by_column(rows: Iterable[Lesion], mined: MinedLabels) -> Numbering:
    lesions: dict[int, Lesion] = {}
    for row in rows:
        if row.lesion_idx is not None and lesions.setdefault(row.lesion_idx, row) is not row:
            raise InputError(f"lesion_idx {row.lesion_idx} occurs in several rows of DL_info")
    labelled = [(row, mined.split[n]) for n, row in lesions.items() if n in mined.split]
    if misfit := _split_misfit(labelled):
        raise InputError(f"the column lesion_idx of DL_info is wrong ({misfit}): rows count from 1")
    return Numbering(lesions, "numbered by the column lesion_idx")


def _misfit(rows: Sequence[Lesion], mined: MinedLabels, base: int) -> str | None:
    """None if `base` fits, else the reason why it does not."""
    patients = [row.patient for row in rows]
    if patients != sorted(patients):
        return "rows are not in the original order (Patient_index decreases)"
    labelled = [(row, mined.split[row.row + base]) for row in rows if row.row + base in mined.split]
    if len(labelled) < 20:
        return f"only {len(labelled)} of these rows have labels, at least 20 are needed"
    if misfit := _split_misfit(labelled):
        return misfit
    depth = {}
    for region in ("chest", "abdomen", "pelvis"):
        z = [r.location[2] for r, _ in labelled if region in mined.relevant[r.row + base]]
        if len(z) >= 5:
            depth[region] = sum(z) / len(z)
    if list(depth.values()) != sorted(depth.values()):
        order = ", ".join(f"{region} {z:.2f}" for region, z in depth.items())
        return f"body parts are out of order along z ({order})"
    return None


def _split_misfit(labelled: Sequence[tuple[Lesion, str]]) -> str | None:
    """None if the (row, split) pairs agree with the official split, else the reason."""
    for start in range(0, len(labelled), _WINDOW):
        part = labelled[start : start + _WINDOW]
        wrong = sum(
            split != row.official_split and (split, row.official_split) != ("train", "val")
            for row, split in part
        )
        if wrong > max(1, _TOLERATED * len(part)):
            return (
                f"{wrong} of {len(part)} lesions from row {part[0][0].row + 1} on contradict the "
                "official split"
            )
    return None


@dataclasses.dataclass(frozen=True)
class LabelledLesion:
    """A lesion with its labels in one split, without added ancestors.

    Attributes:
      split: one of `SPLITS`, or hand.
      lesion_idx: the lesion number.
      lesion: its row of DL_info.csv.
      names: positive labels.
      unknown: masked labels, neither positive nor negative.
    """

    split: str
    lesion_idx: int
    lesion: Lesion
    names: tuple[str, ...]
    unknown: tuple[str, ...]


def label_lesions(
    numbering: Numbering,
    mined: MinedLabels,
    hand: dict[int, tuple[str, ...]] | None,
    vocabulary: Vocabulary,
    *,
    uncertain_unknown: bool = False,
) -> tuple[list[LabelledLesion], dict[str, dict[str, int]]]:
    """Joins rows and labels (paper, sections 2 and 4.2).

    Relevant and uncertain labels are positive in training, relevant labels alone in val and test.
    The label files then give 17,705 / 1,686 / 1,640 / 490 lesions, which are the paper's counts
    before noisy rows are dropped. In val and test uncertain labels are unknown, as in LesaNet's
    evaluation.

    Args:
      numbering: see `number_lesions`.
      mined: LesaNet's text-mined labels.
      hand: see `read_hand_labels`, or None.
      vocabulary: the labels to keep; a lesion with none of them is dropped.
      uncertain_unknown: list uncertain labels as unknown in training, too, so that the caller can
        mask their ancestors (LesaNet masks only their direct parents).

    Returns:
      (lesions, counts): sorted by split and lesion number, and split -> {labelled, without_row,
      noisy, kept}.
    """
    known = set(vocabulary.names)
    by_split: dict[str, list[tuple[int, tuple[str, ...], tuple[str, ...]]]]
    by_split = {name: [] for name in (*SPLITS, "hand")}
    for number, split in sorted(mined.split.items()):
        names, unknown = mined.relevant[number], mined.uncertain[number]
        if split == "train":
            names, unknown = names + unknown, unknown if uncertain_unknown else ()
        by_split[split].append((number, names, unknown))
    for number, names in sorted((hand or {}).items()):
        by_split["hand"].append((number, names, ()))
    lesions: list[LabelledLesion] = []
    counts = {}
    for split, entries in by_split.items():
        entries = [entry for entry in entries if known & set(entry[1])]
        present = [entry for entry in entries if entry[0] in numbering.lesions]
        clean = [
            LabelledLesion(split, number, numbering.lesions[number], names, unknown)
            for number, names, unknown in present
            if not numbering.lesions[number].noisy
        ]
        lesions.extend(clean)
        counts[split] = {
            "labelled": len(entries),
            "without_row": len(entries) - len(present),
            "noisy": len(present) - len(clean),
            "kept": len(clean),
        }
    return lesions, counts
