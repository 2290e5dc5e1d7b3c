"""Plans cases, labels and splits for `maknet prepare segmentations`."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from maknet_jax.ct import reading
from maknet_jax.data import patient_splits, segmentation_cases, segmentations, table
from maknet_jax.data.patient_splits import SplitTable
from maknet_jax.data.segmentation_cases import Case, Cases
from maknet_jax.errors import InputError, NothingUsable

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
_META = "meta.csv"


@dataclasses.dataclass(frozen=True)
class SplitOptions:
    """How cases are split, by patient. The first of these that applies to a case is used.

    1. The folder: `test=openkbp/validation` puts all of its cases into one split.
    2. `table`, else the folder's own meta.csv if it has a column `split` and `shares` is None.
    3. `shares`: a hash of the patient and the seed; for cases that a table lacks, only if set.

    Attributes:
      table: a CSV, see `patient_splits`; None without a table.
      shares: split -> share, sum 1; None means `SHARES` if there is no table.
      seed: of the hash.
    """

    table: str | os.PathLike[str] | None = None
    shares: Mapping[str, float] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cases and labels of a data set.

    Attributes:
      members: (case, split) of each case to prepare.
      labels: label -> mask names, in column order.
      about: how they were chosen, for `dataset.json`.
      failures: (path, reason) of each file that cannot be used.
      missing: (case, reason) of each case that is skipped.
    """

    members: list[tuple[Case, str]]
    labels: dict[str, tuple[str, ...]]
    about: dict[str, Any]
    failures: list[tuple[str, str]]
    missing: list[tuple[str, str]]


def plan(
    folders: Sequence[str | os.PathLike[str]],
    label_table: str | os.PathLike[str] | None = None,
    *,
    rules: segmentations.Rules,
    splits: SplitOptions,
    workers: int = 1,
    overrides: reading.Overrides = reading.STRICT,
) -> Plan:
    """Finds the cases of all folders, their labels and their splits; reads headers only.

    Args:
      folders: paths, or `SPLIT=PATH`.
      label_table: see `segmentations.read_label_table`; None makes every mask a label.
      rules: how masks become labels.
      splits: how cases are split.
      workers: threads that read DICOM headers.
      overrides: what is read although it would be rejected.

    Raises:
      NothingUsable: no case can be used.
      InputError: no case, an invalid table or rule, one case name in two folders, or a patient in
        two splits.
    """
    masks_of = None if label_table is None else segmentations.read_label_table(label_table)
    split_table = (
        patient_splits.read_split_table(splits.table) if splits.table is not None else None
    )
    if splits.shares is not None:
        patient_splits.check_shares(splits.shares)
    all_cases = Cases()
    members: list[tuple[Case, str]] = []
    missing: list[tuple[str, str]] = []
    how: list[str] = []
    listed: dict[str, SplitTable] = {}
    for text in folders:
        fixed, folder = _fixed_split(text)
        cases = segmentation_cases.find_cases(folder, workers=workers, overrides=overrides)
        all_cases.cases += cases.cases
        all_cases.failures += cases.failures
        all_cases.unsegmented += cases.unsegmented
        known = split_table
        if fixed is None and split_table is None and splits.shares is None:
            meta = folder / _META
            usable = patient_splits.has_splits(meta)
            known = patient_splits.read_split_table(meta) if usable else None
        if known is not None:
            listed[known.path] = known
        for case in cases.cases:
            member, reason = _split(case, fixed, known, splits)
            if member is None:
                missing.append((case.name, reason))
                continue
            members.append(member)
            how.append(reason)
    names = collections.Counter(case.name for case in all_cases.cases)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"case {twice[0]} is in two folders: case names must be unique")
    if not members:
        raise NothingUsable(
            "no usable case" + f": {len(missing)} have no split" * bool(missing),
            [*all_cases.failures, *missing],
        )
    patient_splits.check_patients([(case.name, case.patient, split) for case, split in members])
    without_split = len(missing)
    keys = {key for case in all_cases.cases for key in (case.name, case.patient)}
    for known in listed.values():
        reason = f"listed in {known.path}, not found"
        missing += [(name, reason) for name in known.split_of if name not in keys]
    absent_cases = len(missing) - without_split
    missing += all_cases.unsegmented
    labels, absent = segmentations.choose_labels((case for case, _ in members), masks_of)
    segmentations.check_rules(rules, labels)
    patients: dict[str, set[str]] = {}
    for case, split in members:
        patients.setdefault(split, set()).add(case.patient)
    about = {
        "rules": {
            "min_area_mm2": rules.min_area,
            "every": rules.every,
            "missing_is_absent": rules.missing_is_absent,
            "unknown_below": list(rules.unknown_below),
        },
        "masks": {label: list(masks) for label, masks in labels.items()},
        "masks_without_case": absent,
        "cases": dict(collections.Counter(split for _, split in members)),
        "patients": {split: len(names) for split, names in patients.items()},
        "splits": dict(collections.Counter(how)),
        "cases_without_split": without_split,
        "cases_not_found": absent_cases,
        "series_without_segmentation": len(all_cases.unsegmented),
    }
    return Plan(members, labels, about, all_cases.failures, missing)


def _fixed_split(text: str | os.PathLike[str]) -> tuple[str | None, pathlib.Path]:
    """`test=PATH` -> ("test", PATH); any other path -> (None, PATH)."""
    split, equals, path = os.fspath(text).partition("=")
    if equals and split in table.SPLITS:
        return split, pathlib.Path(path)
    return None, pathlib.Path(text)


def _split(
    case: Case, fixed: str | None, known: SplitTable | None, options: SplitOptions
) -> tuple[tuple[Case, str] | None, str]:
    """((case with its patient, split), how it was decided), or (None, why it is skipped)."""
    if known is not None and case.name in known.patient_of:
        case = dataclasses.replace(case, patient=known.patient_of[case.name])
    if fixed is not None:
        return (case, fixed), "by folder"
    if known is not None:
        key = case.patient if known.by_patient else case.name
        if key in known.split_of:
            return (case, known.split_of[key]), f"by {pathlib.Path(known.path).name}"
        if options.shares is None:
            return None, f"not listed in {known.path}"
    shares = options.shares or SHARES
    split = patient_splits.hashed_split(case.patient, shares, options.seed)
    text = ",".join(f"{name}={share:g}" for name, share in shares.items())
    return (case, split), f"by a hash of the patient, {text}, seed {options.seed}"
