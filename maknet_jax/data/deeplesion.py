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
# What the paper reports after dropping noisy rows (section 2), and what the label files hold.
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
_WINDOW = 200  # labelled lesions in which the numbering is checked on its own
_TOLERATED = 0.01  # contradictions with the official split; base 1 has none in the real files


@dataclasses.dataclass(frozen=True)
class Lesion:
    """One row of `DL_info.csv`.

    `row` counts from 0; `box` is (x1, y1, x2, y2) in pixels; `location` the normalised x, y, z;
    `spacing` (x, y, z) in mm; `official_split` one of `SPLITS`; `lesion_idx` only where the file
    brings that column.
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
        """The public name, `PPPPPP_SS_RR_NNN`."""
        return self.file_name.removesuffix(".png").replace("/", "_")


def read_info(path: str | os.PathLike) -> list[Lesion]:
    """Reads `DL_info.csv` in its order: 18 columns, extra columns and float ages are fine.

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
        raise InputError(f"{path} does not exist: DL_info.csv comes with DeepLesion") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV table: {error}") from None


def find_image(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The file of a slice in `folder`, which may be nested or flat; None where it is not there."""
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
        raise ValueError(f"{cell!r} should be a whole number")
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
    """LesaNet's text-mined labels: for each lesion its split and names.

    `split`, `relevant` and `uncertain` are dicts keyed by lesion number.
    """

    terms: tuple[str, ...]
    split: dict[int, str]
    relevant: dict[int, tuple[str, ...]]
    uncertain: dict[int, tuple[str, ...]]


def read_mined_labels(path: str | os.PathLike) -> MinedLabels:
    """Reads LesaNet's `text_mined_labels_171_and_split.json`.

    Raises:
      InputError: the file is missing or of another form.
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
    """Reads LesaNet's `hand_labeled_test_set.json`: a dict lesion number -> label names."""
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
        raise InputError(f"{path} is no JSON file: {error}") from None


@dataclasses.dataclass(frozen=True)
class Numbering:
    """How lesion numbers map to rows, and one line that says why it is believed.

    `base` is the number of the first row, None where the column lesion_idx numbers the rows.
    """

    lesions: dict[int, Lesion]
    reason: str
    base: int | None = None


def number_lesions(rows: Sequence[Lesion], mined: MinedLabels) -> Numbering:
    """Decides which row each lesion number of `mined` means.

    LesaNet numbers the rows of the full DL_info.csv; its readme says from 0, its files say from 1.
    A wrong base moves every label to its neighbour without any error, so the base is taken from
    the data: LesaNet's val and test lesions lie in the official val and test splits and no train
    lesion lies in the official test split, in every stretch of the file; and chests lie above
    abdomens above pelvises. (A row that is lost after the last change of split is not noticed: it
    moves the labels of that last stretch only.)

    Args:
      rows: the lesions of `read_info`, in the file's order.
      mined: `MinedLabels`.

    Returns:
      `Numbering`.

    Raises:
      InputError: neither 0 nor 1 fits (a partial or reordered file, or other label files), or the
        column lesion_idx names a number twice or contradicts the split.
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
            raise InputError(f"lesion_idx {row.lesion_idx} stands in several rows of DL_info")
    labelled = [(row, mined.split[n]) for n, row in lesions.items() if n in mined.split]
    if misfit := _split_misfit(labelled):
        raise InputError(f"the column lesion_idx of DL_info is wrong ({misfit}): rows count from 1")
    return Numbering(lesions, "numbered by the column lesion_idx")


def _misfit(rows: Sequence[Lesion], mined: MinedLabels, base: int) -> str | None:
    """None where `base` fits, else the reason why not."""
    patients = [row.patient for row in rows]
    if patients != sorted(patients):
        return "rows are not in the original order (Patient_index goes down)"
    labelled = [(row, mined.split[row.row + base]) for row in rows if row.row + base in mined.split]
    if len(labelled) < 20:
        return f"only {len(labelled)} of these rows have labels, 20 are needed to tell"
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
    """None where the (row, split) pairs agree with the official split, else the reason."""
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
    """A lesion with the names that a split gives it (not yet closed under parents).

    `unknown` are names that evaluation leaves out: neither right nor wrong.
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

    Training takes relevant and uncertain labels, val and test only relevant ones: so the counts of
    the label files come out as 17,705 / 1,686 / 1,640 / 490, the paper's before noisy rows. Labels
    that are uncertain in val and test count as unknown there, as in LesaNet's evaluation.

    Args:
      numbering: `Numbering`.
      mined: `MinedLabels`.
      hand: dict of `read_hand_labels`, or None.
      vocabulary: the labels to keep; a lesion without any of them is left out.
      uncertain_unknown: also lists uncertain training labels as unknown, so that the labels they
        imply can be left out of the loss.

    Returns:
      (lesions, counts): a list of `LabelledLesion` in order of split and number, and a dict
      split -> {labelled, without_row, noisy, kept}.
    """
    known = set(vocabulary.names)
    wanted: dict[str, list[tuple[int, tuple[str, ...], tuple[str, ...]]]]
    wanted = {name: [] for name in (*SPLITS, "hand")}
    for number, split in sorted(mined.split.items()):
        names, unknown = mined.relevant[number], mined.uncertain[number]
        if split == "train":
            names, unknown = names + unknown, unknown if uncertain_unknown else ()
        wanted[split].append((number, names, unknown))
    for number, names in sorted((hand or {}).items()):
        wanted["hand"].append((number, names, ()))
    lesions: list[LabelledLesion] = []
    counts = {}
    for split, entries in wanted.items():
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
