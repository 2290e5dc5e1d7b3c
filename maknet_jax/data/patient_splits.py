"""Splits by patient: from a table, or by a seeded hash of the patient.

The table is a CSV, comma or semicolon separated, with the columns `split` and `case` (or
`image_id`, as in TotalSegmentator's meta.csv), and optionally `patient`; or `patient` and `split`
alone.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from maknet_jax import files
from maknet_jax.ct import containers
from maknet_jax.data import csv_rows, table
from maknet_jax.errors import InputError

_CASE_COLUMNS = ("case", "image_id")


@dataclasses.dataclass(frozen=True)
class SplitTable:
    """A table of splits.

    Attributes:
      path: the file.
      split_of: case or patient -> split.
      patient_of: case -> patient, where the table has both columns.
      by_patient: whether `split_of` is keyed by patient.
    """

    path: str
    split_of: dict[str, str]
    patient_of: dict[str, str]
    by_patient: bool


def read_split_table(path: str | os.PathLike[str]) -> SplitTable:
    """Reads a table of splits.

    Raises:
      InputError: the table or a column is missing, a split is unknown, or a case is listed twice
        with different splits or patients.
    """
    path = pathlib.Path(path)
    try:
        columns, rows, _ = csv_rows.read_rows(path, containers.read_file(path))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} is not a file: pass a CSV with the columns case, split") from None
    case = next((name for name in _CASE_COLUMNS if name in columns), None)
    key = case or ("patient" if "patient" in columns else None)
    if key is None or "split" not in columns:
        raise InputError(
            f"{path} has the columns {', '.join(columns)}: expected split and one of case, "
            "image_id, patient"
        )
    split_of: dict[str, str] = {}
    patient_of: dict[str, str] = {}
    for line, cells in rows:
        # `console.write_table` writes the apostrophe, for example into cases.csv.
        name, split = re.sub("^'(?=[=+@-])", "", cells[key]), cells["split"]
        if not name or split not in table.SPLITS:
            raise InputError(
                f"{path} line {line}: {key} {name!r}, split {split!r}: both are "
                f"required, and the split is one of {', '.join(table.SPLITS)}"
            )
        if split_of.setdefault(name, split) != split:
            raise InputError(f"{path} line {line}: {name} is in two splits")
        patient = cells.get("patient") if case else None
        if patient and patient_of.setdefault(name, patient) != patient:
            raise InputError(
                f"{path} line {line}: {name} is of two patients, {patient_of[name]} and {patient}"
            )
    return SplitTable(str(path), split_of, patient_of, by_patient=case is None)


def has_splits(path: str | os.PathLike[str]) -> bool:
    """Whether a file such as TotalSegmentator's meta.csv exists and has a column `split`."""
    path = pathlib.Path(path)
    if not containers.is_file(path):
        return False
    with containers.open_file(path) as file:
        header = file.readline().decode("utf-8-sig", "replace")
    try:
        return "split" in csv_rows.read_rows(path, header.encode()).columns
    except InputError:  # some other table
        return False


def check_shares(shares: Mapping[str, float]) -> None:
    """Checks the shares of the splits.

    Raises:
      InputError: an unknown split, a share out of range, or a sum other than 1.
    """
    known = all(name in table.SPLITS for name in shares)
    positive = all(0 < share <= 1 for share in shares.values())
    if not (shares and known and positive and math.isclose(sum(shares.values()), 1, abs_tol=1e-6)):
        text = ",".join(f"{name}={share:g}" for name, share in shares.items())
        raise InputError(
            f"shares {text}: expected splits of {', '.join(table.SPLITS)} and a sum of 1, as in "
            "train=0.8,val=0.1,test=0.1"
        )


def hashed_split(patient: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a patient, which depends only on the patient, the shares and the seed.

    Adding or removing patients does not change the split of others. The shares hold on average.
    """
    digest = hashlib.sha256(files.printable(f"{seed}:{patient}").encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    end = 0.0
    for split, share in shares.items():
        end += share
        if place < end:
            return split
    return list(shares)[-1]  # rounding


def check_patients(members: Sequence[tuple[str, str, str]]) -> None:
    """Checks that no patient is in two splits.

    Args:
      members: (case, patient, split) of every case.

    Raises:
      InputError: a patient is in two splits.
    """
    first: dict[str, tuple[str, str]] = {}
    for case, patient, split in members:
        other, where = first.setdefault(patient, (case, split))
        if where != split:
            raise InputError(
                f"patient {patient} is in {where} (case {other}) and {split} (case {case}): put "
                "each patient into one split"
            )
