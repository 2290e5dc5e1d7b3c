"""Slices of known order in the body: their files, labels, folds and rank correlation.

For body_order.py, which describes the names of the files and the labels.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Sequence

import numpy as np
from scipy import stats

from maknet_jax.ct import search
from maknet_jax.errors import InputError

THRESHOLDS = 19  # labels: beyond 5 %, 10 %, ..., 95 % of the body
NAME = re.compile(r"(\d+)_score_-?\d+(?:\.\d+)?_(\d+)_.*\.png", re.IGNORECASE)
PATIENT = re.compile(r"(\d{6})_\d{2}_\d{2}")  # in names of DeepLesion's files and folders
COLUMNS = ("path", "labels", "split", "slice", "patient")

Row = tuple[str, str, str, int | str, str]  # see COLUMNS


@dataclasses.dataclass(frozen=True)
class Slice:
    """A PNG with the rank and the patient in its name."""

    path: pathlib.Path
    rank: int
    patient: str


def png_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """The PNGs directly in a folder, sorted by name.

    Raises:
      InputError: there is none.
    """
    folder = pathlib.Path(folder).absolute()
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in entries if re.fullmatch(r"[^.].*\.png", path.name, re.IGNORECASE)]
    if not paths:
        raise InputError(f"{folder} has no PNG: pass a folder of slices")
    return paths


def read_slices(folder: str | pathlib.Path) -> list[Slice]:
    """The slices of a folder, sorted from neck to thigh.

    Raises:
      InputError: a name has no rank, or all have the same.
    """
    slices = []
    for path in png_files(folder):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise InputError(
                f"{path} has no rank in its name: "
                "rename it to RANK_score_SCORE_PATIENT_STUDY_SERIES_SLICE.png"
            )
        slices.append(Slice(path, int(match[1]), match[2]))
    if len({one.rank for one in slices}) < 2:
        raise InputError(f"{folder} has only one rank: at least two are needed")
    return sorted(slices, key=lambda one: one.rank)


def places(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The order of N numbers as floats `[N]` from 0 (lowest) to 1 (highest); ties share a place."""
    ranks = stats.rankdata(values)
    return (ranks - ranks.min()) / (ranks.max() - ranks.min())


def cumulative_labels(place: float) -> str:
    """The labels of a place from 0 to 1, joined by "|": the thresholds that it lies beyond."""
    marks = [number / (THRESHOLDS + 1) for number in range(1, THRESHOLDS + 1)]
    return "|".join(f"beyond {100 * mark:02.0f} %" for mark in marks if place > mark)


def labelled_rows(slices: Sequence[Slice], split: str = "train") -> list[Row]:
    """Rows for `prepare table` of slices of known order."""
    names = [cumulative_labels(place) for place in places([one.rank for one in slices])]
    return [
        (str(one.path), name, split, "", one.patient)
        for one, name in zip(slices, names, strict=True)
    ]


def unlabelled_rows(paths: Sequence[str | pathlib.Path], patients: Collection[str]) -> list[Row]:
    """Rows for `prepare table` of all CT slices under `paths`, except those of `patients`."""
    rows: list[Row] = []
    for path in paths:
        for ref in search.find_series(path)[0]:
            if ref.kind == "nifti":
                slices: list[tuple[str, int | str]] = [
                    (str(ref.paths[0]), number) for number in range(ref.count)
                ]
            else:
                slices = [(str(file), "") for file in ref.paths]
            for file, number in slices:
                match = PATIENT.search(file)
                if match is None or match[1] not in patients:
                    rows.append((str(pathlib.Path(file).absolute()), "", "unlabelled", number, ""))
    return rows


def make_folds(slices: Sequence[Slice], count: int, seed: int) -> np.ndarray:
    """The fold of each slice `[N]`; a patient is in one fold, and every fold spans the body."""
    rng = np.random.default_rng(seed)
    fold_of: dict[str, int] = {}
    remaining: list[int] = []
    for one in slices:
        if one.patient not in fold_of:
            remaining = remaining or rng.permutation(count).tolist()
            fold_of[one.patient] = remaining.pop()
    return np.array([fold_of[one.patient] for one in slices])


def correlation(
    positions: Sequence[float] | np.ndarray, ranks: Sequence[float] | np.ndarray
) -> float | None:
    """Spearman's rank correlation; None if it is undefined."""
    value = stats.spearmanr(positions, ranks).statistic if len(set(positions)) > 1 else np.nan
    return None if np.isnan(value) else float(value)


def correlation_interval(
    positions: np.ndarray, ranks: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of `correlation` by a bootstrap over slices."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = rng.integers(len(ranks), size=len(ranks))
        values.append(correlation(positions[drawn], ranks[drawn]))
    low, high = np.percentile([value for value in values if value is not None], [2.5, 97.5])
    return float(low), float(high)
