"""Triplets of CT volumes as records: unlabelled series, and the slices in a table."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from maknet_jax.ct import png, preprocess, pseudonym, reading, volumes
from maknet_jax.ct.search import SeriesRef
from maknet_jax.data import overview, records, shards, table
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, Rejected


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
) -> tuple[bytes, np.ndarray, np.ndarray]:
    """An encoded record, its labels and its label mask, for `shards.UnitResult`.

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


def make_series(unit: _Series) -> shards.UnitResult:
    """All triplets of an unlabelled volume, without overlap."""
    try:
        volume = volumes.load_series(unit.ref, overrides=unit.overrides)
    except Rejected as error:
        reason = png.reason_without_window(error)
        return shards.UnitResult(failures=((unit.ref.paths[0], reason),))
    series = pseudonym.pseudonym(unit.salt, volume.series)
    examples = []
    for centre, distance in volume.triplets():
        image, box = preprocess.make_triplet(volume.neighbours(centre), unit.size)
        meta = {"series": series, "slice": centre, "slices": len(volume.hu), "crop": box}
        meta["spacing"] = volumes.spacing_json((distance, *volume.spacing[1:]))
        name = f"{series}-{pseudonym.pseudonym(unit.salt, volume.uids[centre])}"
        examples.append(encode_with_labels(name, image, b"", b"", meta))
    if not examples:
        reason = f"no three consecutive slices among {len(volume.hu)}"
        return shards.UnitResult(failures=((unit.ref.paths[0], reason),))
    left_over = len(volume.hu) - 3 * len(examples)
    counters = overview.of_volume(volume.spacing, len(volume.hu))
    return shards.UnitResult(tuple(examples), counters=counters | {"slices left over": left_over})


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


def make_table_volume(unit: _TableVolume) -> shards.UnitResult:
    """The triplets around the slices in the rows of one file or folder."""
    try:
        volume, named = volumes.load_series_of(
            unit.path, png_window=unit.png_window, overrides=unit.overrides
        )
    except (Rejected, InputError) as error:
        return shards.UnitResult(failures=tuple((row.where, str(error)) for row in unit.rows))
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
    return shards.UnitResult(tuple(examples), tuple(failures), counters)
