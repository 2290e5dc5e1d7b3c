"""Triplets of CT volumes as records: unlabelled series, and the slices in a table."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from maknet_jax.ct import pieces, png, preprocess, pseudonym, reading, volumes
from maknet_jax.ct.search import SeriesRef
from maknet_jax.data import overview, records, table, unit_results
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, Rejected

PIECE = 16  # triplets, of 48 slices: the largest unit of work of a long series


# An unfinished data set resumes only if the `repr` of its units is unchanged: do not rename the
# classes or their fields.
@dataclasses.dataclass(frozen=True)
class _Series:
    ref: SeriesRef
    salt: str
    size: int
    count: int
    overrides: reading.Overrides

    @property
    def source(self) -> str:
        """The path of its input."""
        return self.ref.paths[0]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some consecutive slices of a series.

    Attributes:
      ref: the series with these slices only.
      first: the place of the first one in the series.
      unit: the series without its files.
      triplets: (middle slice in the series, mm between slices) of the triplets in the piece.
    """

    ref: SeriesRef
    first: int
    unit: _Series
    triplets: tuple[tuple[int, float], ...]

    @property
    def count(self) -> int:
        """The number of records."""
        return len(self.triplets)

    @property
    def source(self) -> str:
        """The path of its first file."""
        return self.ref.paths[0]


@dataclasses.dataclass(frozen=True)
class _TableVolume:
    path: str
    rows: tuple[table.Row, ...]
    labels: tuple[bytes, ...]
    label_masks: tuple[bytes, ...]
    png_window: tuple[float, float] | None
    size: int
    count: int
    overrides: reading.Overrides

    @property
    def source(self) -> str:
        """The path of its input."""
        return self.path


def encode_with_labels(
    record_id: str, image: np.ndarray, labels: bytes, label_mask: bytes, meta: dict[str, Any]
) -> unit_results.Encoded:
    """An encoded record, its labels and its label mask, for `unit_results.UnitResult`.

    Args:
      record_id: the id of the record.
      image: int16 [S, S, 3] in HU.
      labels: uint8 [K] as bytes.
      label_mask: uint8 [K] as bytes.
      meta: the source of the image.
    """
    vector = np.frombuffer(labels, np.uint8)
    mask = np.frombuffer(label_mask, np.uint8)
    return records.encode(records.Example(record_id, image, vector, mask, meta)), vector, mask


def plan_series(
    series: Iterable[SeriesRef], salt: str, size: int, overrides: reading.Overrides = reading.STRICT
) -> list[_Series]:
    """The units of `make_series`.

    Args:
      series: the series to cut.
      salt: the secret of the pseudonyms.
      size: the edge S of the images.
      overrides: what is read although it would be rejected.
    """
    return [
        _Series(ref, salt, size, len(preprocess.centres(ref.count, overlap=False)), overrides)
        for ref in series
    ]


def series_pieces(unit: _Series) -> Sequence[_Series | _Piece]:
    """Divides a long DICOM series into pieces of `PIECE` triplets."""
    triplets = volumes.triplets_of(unit.ref.blocks)
    if len(triplets) <= PIECE or not pieces.can_divide(unit.ref):
        return [unit]
    groups = [triplets[k : k + PIECE] for k in range(0, len(triplets), PIECE)]
    stops = [*(group[-1][0] + 2 for group in groups[:-1]), unit.ref.count]
    whole = dataclasses.replace(unit, ref=dataclasses.replace(unit.ref, paths=(), blocks=()))
    return [
        _Piece(
            dataclasses.replace(
                unit.ref, paths=unit.ref.paths[first:stop], count=stop - first, blocks=()
            ),
            first,
            whole,
            tuple(group),
        )
        for first, stop, group in zip([0, *stops], stops, groups, strict=False)
    ]


def make_series(unit: _Series | _Piece) -> unit_results.UnitResult:
    """All triplets of an unlabelled volume or of a piece of one, without overlap."""
    try:
        if isinstance(unit, _Piece):
            return _make_piece(unit)
        volume = volumes.load_series(unit.ref, overrides=unit.overrides)
    except Rejected as error:
        return _rejected(unit.source, error)
    examples = [
        _triplet(
            unit,
            preprocess.make_triplet(volume.neighbours(centre), unit.size),
            volume.uids[centre],
            slice=centre,
            slices=len(volume.hu),
            spacing=(distance, *volume.spacing[1:]),
        )
        for centre, distance in volume.triplets()
    ]
    result = _series_result(unit, len(examples), volume.spacing, len(volume.hu))
    return dataclasses.replace(result, examples=examples)


def join_series(
    unit: _Series, results: Sequence[unit_results.UnitResult], count: int
) -> unit_results.UnitResult:
    """The result of a series from those of its pieces: the checks of `make_series` as a whole.

    Args:
      unit: the series.
      results: of its pieces, in order.
      count: the number of their records.
    """
    for result in results:
        if result.failures:
            ((_, reason),) = result.failures
            return unit_results.UnitResult(failures=((unit.source, reason),))
    try:
        stack = pieces.check((result.evidence for result in results), unit.overrides)
        pieces.check_planned(unit.ref, stack)
    except Rejected as error:
        return _rejected(unit.source, error)
    spacing = (stack.distance, *stack.headers[0].standard_spacing)
    return _series_result(unit, count, spacing, len(stack.headers))


def _make_piece(unit: _Piece) -> unit_results.UnitResult:
    middles = {centre - unit.first for centre, _ in unit.triplets}
    recent: collections.deque[np.ndarray] = collections.deque(maxlen=3)
    images: list[tuple[np.ndarray, preprocess.Box]] = []
    places = itertools.count(-1)  # of the middle of `recent` in the piece

    def add(plane: np.ndarray) -> None:
        recent.append(plane)
        if next(places) in middles:
            images.append(preprocess.make_triplet(list(recent), unit.unit.size))

    evidence = pieces.read_slices(unit.ref, add, unit.unit.overrides)
    examples = tuple(
        _triplet(
            unit.unit,
            image,
            evidence.headers[centre - unit.first].uid,
            slice=centre,
            slices=unit.unit.ref.count,
            spacing=(distance, *unit.ref.spacing),
        )
        for image, (centre, distance) in zip(images, unit.triplets, strict=True)
    )
    return unit_results.UnitResult(examples, evidence=evidence)


def _triplet(
    unit: _Series,
    cut: tuple[np.ndarray, preprocess.Box],
    uid: str,
    *,
    spacing: Sequence[float],
    **place: int,
) -> unit_results.Encoded:
    image, box = cut
    series = pseudonym.pseudonym(unit.salt, unit.ref.key)
    meta = {"series": series, **place, "crop": box, "spacing": volumes.spacing_json(spacing)}
    name = f"{series}-{pseudonym.pseudonym(unit.salt, uid)}"
    return encode_with_labels(name, image, b"", b"", meta)


def _series_result(
    unit: _Series, count: int, spacing: Sequence[float], slices: int
) -> unit_results.UnitResult:
    """The result of a series, without its records."""
    if not count:
        return _rejected(unit.source, Rejected(f"no three consecutive slices among {slices}"))
    counters = overview.of_volume(spacing, slices)
    counters["slices left over"] = slices - 3 * count
    return unit_results.UnitResult(counters=counters)


def _rejected(path: str, error: Rejected) -> unit_results.UnitResult:
    return unit_results.UnitResult(failures=((path, png.reason_without_window(error)),))


DIVISION = unit_results.Division(series_pieces, join_series)


def plan_table(
    rows: Sequence[table.Row],
    vocabulary: Vocabulary,
    png_window: tuple[float, float] | None,
    size: int,
    overrides: reading.Overrides = reading.STRICT,
) -> dict[str, list[_TableVolume]]:
    """The units of `make_table_volume` by split: rows that share a file or folder make one unit.

    Args:
      rows: the rows of the table.
      vocabulary: the labels in column order.
      png_window: (low, high) in HU of 8-bit PNGs.
      size: the edge S of the images.
      overrides: what is read although it would be rejected.
    """
    groups: dict[tuple[str, str], list[table.Row]] = {}
    for row in rows:
        groups.setdefault((row.split, row.path), []).append(row)
    splits: dict[str, list[_TableVolume]] = {}
    for (split, path), members in groups.items():
        vectors = tuple(vocabulary.vector(row.labels).tobytes() for row in members)
        masks = tuple((1 - vocabulary.vector(row.unknown)).tobytes() for row in members)
        unit = _TableVolume(
            path, tuple(members), vectors, masks, png_window, size, len(members), overrides
        )
        splits.setdefault(split, []).append(unit)
    return splits


def make_table_volume(unit: _TableVolume) -> unit_results.UnitResult:
    """The triplets around the slices in the rows of one file or folder."""
    try:
        volume, named = volumes.load_series_of(
            unit.path, png_window=unit.png_window, overrides=unit.overrides
        )
    except (Rejected, InputError) as error:
        return unit_results.UnitResult(failures=tuple((row.where, str(error)) for row in unit.rows))
    threshold = preprocess.body_threshold(volume.hu, unit.png_window)
    examples, failures = [], []
    for row, vector, mask in zip(unit.rows, unit.labels, unit.label_masks, strict=True):
        try:
            centre = table.slice_index(row, volume, named)
        except InputError as error:
            failures.append((row.where, str(error)))
            continue
        image, box = preprocess.make_triplet(
            volume.neighbours(centre), unit.size, threshold=threshold
        )
        meta = {"line": row.line, "slice": centre, "slices": len(volume.hu), "crop": box}
        examples.append(encode_with_labels(f"line-{row.line:06d}", image, vector, mask, meta))
    whole = len(volume.hu) if named is None else None
    counters = overview.of_volume(volume.spacing, whole)
    return unit_results.UnitResult(tuple(examples), tuple(failures), counters)
