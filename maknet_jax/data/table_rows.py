"""The rows of a table of labelled slices, and checks across them.

They find volumes in two splits, and labels that look like typos.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

from maknet_jax import console
from maknet_jax.ct import containers, png, search

_SEPARATORS = ";,"
_LINES = 5  # line numbers named in a warning
_SHORTEST = 4  # letters of a label that may be a misspelling of another one
_RARE = 0.1  # of the rows of the other label


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table; `line` is its line number in the file, the header being line 1.

    `unknown` are the labels that were not assessed.
    """

    line: int
    path: str
    labels: tuple[str, ...]
    split: str
    slice: str
    patient: str
    unknown: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The name of this row in `failures.csv`."""
        return f"line {self.line}: {self.path}" + (f" slice {self.slice}" if self.slice else "")


def volume_in_two_splits(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """Two rows without a patient that put one volume into two splits; None if there are none."""
    rows = [row for row in rows if not row.patient]
    if len({row.split for row in rows}) < 2:
        return None
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        other = first.setdefault(volume_of(row.path), row)
        if other.split != row.split:
            return other, row
    return None


def volume_of(path: str) -> tuple[str, ...]:
    """The identity of the volume to which a file or a folder belongs.

    A DICOM series by its SeriesInstanceUID, PNGs by their folder and the name before the number,
    anything else by its path.
    """
    if containers.is_folder(path):
        files = (
            os.path.join(folder, name)
            for folder, _, names in containers.walk(path, [])
            for name in names
        )
        for file in files:
            if file.lower().endswith(".png") or _series(file):
                return volume_of(file)
    if path.lower().endswith(".png"):
        series, number = png.split_name(path)
        folder = os.path.realpath(os.path.dirname(path))
        return ("png", folder, series if number is not None else os.path.basename(path))
    if series := _series(path):
        return ("dicom", series)
    return ("path", os.path.realpath(path))


def _series(path: str) -> str:
    """The SeriesInstanceUID of a DICOM file, or its folder if it has none; "" for other files."""
    if not containers.is_file(path) or path.lower().endswith((".nii", ".nii.gz")):
        return ""
    headers = search.headers_of(path)
    if not isinstance(headers, list) or not headers:
        return ""
    if headers[0].problem and not headers[0].series:
        return ""
    return headers[0].series or os.path.realpath(os.path.dirname(path))


def warnings(rows: Sequence[Row]) -> Iterator[str]:
    """Yields one line for each doubt about the labels, with the number of rows."""
    counts = collections.Counter(name for row in rows for name in row.labels)
    yield from _joined(counts)
    yield from _spellings(counts)
    empty = [
        row.line for row in rows if not (row.labels or row.unknown or row.split == "unlabelled")
    ]
    if empty:
        yield (
            f"{len(empty)} of {len(rows)} rows have no label ({_lines(empty)}): all labels are "
            "absent there; list those that were not assessed in a column unknown"
        )


def _joined(counts: Mapping[str, int]) -> Iterator[str]:
    """Labels that contain another separator, and whose parts are labels too."""
    parts = {
        name: [part.strip() for part in name.replace(mark, "\0").split("\0") if part.strip()]
        for name in counts
        for mark in _SEPARATORS
        if mark in name
    }
    known = collections.Counter(itertools.chain(counts, *parts.values()))
    for name, pieces in parts.items():
        present = [piece for piece in pieces if known[piece] > 1]
        if len(pieces) > 1 and present:
            yield (
                f"label {name!r} ({console.plural(counts[name], 'row')}) contains {present[0]!r}, "
                "which is a label too: separate labels by |"
            )


def _spellings(counts: Mapping[str, int]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for name in sorted(counts):
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    for names in groups.values():
        if len(names) > 1:
            listed = ", ".join(
                f"{name!r} ({console.plural(counts[name], 'row')})" for name in names
            )
            yield f"labels {listed} differ only in case or spaces: use one spelling"
    # Labels that differ by one letter share the name without it, or without one on each side.
    shortened: dict[tuple[int, str], list[str]] = {}
    pairs: set[tuple[str, str]] = set()
    for name in groups:
        for k in range(len(name)):
            key = k, name[:k] + name[k + 1 :]
            pairs |= {(other, name) for other in shortened.get(key, [])}
            shortened.setdefault(key, []).append(name)
        pairs |= {(name[:k] + name[k + 1 :], name) for k in range(len(name))}
    for one, other in sorted(pairs):
        if one not in groups or other not in groups or min(len(one), len(other)) < _SHORTEST:
            continue
        if any(letter.isdigit() for letter in _differing(one, other)):
            continue
        rare, common = sorted((groups[one][0], groups[other][0]), key=lambda name: counts[name])
        if counts[rare] <= max(1, _RARE * counts[common]):
            yield (
                f"label {rare!r} ({console.plural(counts[rare], 'row')}) differs from {common!r} "
                f"({console.plural(counts[common], 'row')}) by one letter: check its spelling"
            )


def _differing(one: str, other: str) -> str:
    """The letters in which two names that differ by one letter differ."""
    start = len(os.path.commonprefix([one, other]))
    end = len(os.path.commonprefix([one[start:][::-1], other[start:][::-1]]))
    return one[start : len(one) - end] + other[start : len(other) - end]


def _lines(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:_LINES])) + ", ..." * (len(numbers) > _LINES)
    return f"line{'s' * (len(numbers) > 1)} {listed}"
