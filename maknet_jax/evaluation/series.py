"""The predictions of a network for a CT series, per slice and for the whole series."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from maknet_jax.ct import preprocess
from maknet_jax.ct.volumes import Volume
from maknet_jax.data.labels import Vocabulary
from maknet_jax.evaluation import body_parts, protocol
from maknet_jax.evaluation.domain import Verdict

# Flags of a series or a slice, as in the tables -> their meaning.
FLAGS = {
    "phantom": "the network was trained on a generated phantom, not on patients",
    "tag": "the tag BodyPartExamined contradicts what is seen",
    "outside": "unlike the training data (another body region, scanner or direction): labels are "
    "unreliable",
    "order": "does not run from head to feet as the training data: upside down, turned or flipped",
}
OF_NETWORK = ("phantom",)  # flags of all series, because of the network
OUTSIDE = "outside the domain"  # the audit of such a series
SEEN = 0.05  # share of the slices in which the labels of a region make it a part of the series


@dataclasses.dataclass(frozen=True)
class Cover:
    """The range of slices in which a label is predicted.

    Attributes:
      label: its name.
      first_slice: number of the first slice, counted from the head.
      last_slice: number of the last one; slices in between may lack the label.
      slices: number of slices with the label.
      mean_confidence: over these slices.
      first_mm: position of the first slice, in mm below the first slice of the series; nan if
        unknown.
      last_mm: position of the last one.
    """

    label: str
    first_slice: int
    last_slice: int
    slices: int
    mean_confidence: float
    first_mm: float
    last_mm: float

    @property
    def body_part(self) -> body_parts.BodyPart:
        """The label in DICOM's terms."""
        return body_parts.of_label(self.label)


@dataclasses.dataclass(frozen=True, eq=False)
class SeriesResult:
    """The labels of one series; slices run from head to feet.

    Attributes:
      id: of the series.
      slices: the name of each slice, see `Volume.slices`.
      uids: the SOPInstanceUID of each slice, see `Volume.uids`.
      z_mm: `[Z]`, mm below the first slice; nan where the spacing is unknown.
      position_mm: `[Z]`, the scanner's z, see `Volume.position_mm`; nan where it is unknown.
      names: the K label names.
      thresholds: `[K]`.
      confidences: float32 `[Z, K]`.
      predicted: bool `[Z, K]`: labels that reach their threshold, and parents of such labels.
      tag: BodyPartExamined of the file; "" without it.
      file: of all slices, see `Volume.file`; "" where each slice has its own.
      features: float32 `[Z, F]`, pooled features; None if they were not requested.
      read: read() returns the CT; it may read the files again.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
      run_flags: names of `FLAGS` that hold for the whole series because of its network.
      verdict: comparison with the training data; None if the network has no statistics.
    """

    id: str
    slices: tuple[str, ...]
    uids: tuple[str, ...]
    z_mm: np.ndarray
    position_mm: np.ndarray
    names: tuple[str, ...]
    thresholds: np.ndarray
    confidences: np.ndarray
    predicted: np.ndarray
    tag: str
    file: str
    features: np.ndarray | None
    read: Callable[[], Volume] = dataclasses.field(repr=False)
    png_window: tuple[float, float] | None = None
    run_flags: tuple[str, ...] = ()
    verdict: Verdict | None = None

    @classmethod
    def of_scores(
        cls,
        volume: Volume,
        vocabulary: Vocabulary,
        thresholds: np.ndarray,
        confidences: np.ndarray,
        **more: Any,
    ) -> "SeriesResult":
        """The result of a volume with confidences `[Z, K]`; `more` are the remaining fields."""
        predicted = protocol.add_parents(
            protocol.predict(confidences, thresholds), vocabulary.parents
        )
        return cls(
            id=volume.series,
            slices=volume.slices,
            uids=volume.uids,
            z_mm=volume.z_mm,
            position_mm=volume.position_mm,
            names=vocabulary.names,
            thresholds=thresholds,
            confidences=confidences,
            predicted=predicted,
            tag=volume.body_part,
            file=volume.file,
            **more,
        )

    def __len__(self) -> int:
        return len(self.slices)

    def file_of(self, number: int) -> str:
        """The file of a slice."""
        return self.file or self.slices[number]

    def uid_of(self, number: int) -> str:
        """The SOPInstanceUID of a slice, or its pseudonym; "" if the file has none."""
        uid = self.uids[number]
        return "" if self.file or uid.startswith("sha256:") else uid

    def columns(self, number: int) -> list[int]:
        """The predicted columns of a slice by decreasing confidence."""
        predicted = np.flatnonzero(self.predicted[number])
        return sorted(predicted.tolist(), key=lambda k: -self.confidences[number, k])

    @functools.cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """The predicted labels of each slice by decreasing confidence."""
        return [tuple(self.names[k] for k in self.columns(number)) for number in range(len(self))]

    @functools.cached_property
    def covers(self) -> list[Cover]:
        """The range of each predicted label, sorted by first and last slice."""
        covers = []
        for column, name in enumerate(self.names):
            slices = np.flatnonzero(self.predicted[:, column])
            if len(slices):
                first, last = int(slices[0]), int(slices[-1])
                mean = float(self.confidences[slices, column].mean())
                place = (float(self.z_mm[first]), float(self.z_mm[last]))
                covers.append(Cover(name, first, last, len(slices), mean, *place))
        return sorted(covers, key=lambda cover: (cover.first_slice, cover.last_slice))

    @property
    def outside(self) -> bool:
        """Whether the series, or each of its slices, is outside the domain of the network."""
        verdict = self.verdict
        return verdict is not None and bool(verdict.series_outside or verdict.outside.all())

    @functools.cached_property
    def body_part(self) -> body_parts.BodyPart:
        """The regions of the body that the series shows, in DICOM's terms.

        A region is seen if labels of organs that lie in it alone are predicted in at least `SEEN`
        of the slices. Slices outside the domain do not count, and a series outside shows nothing.
        """
        shows = {region: np.zeros(len(self), bool) for region in body_parts.REGIONS}
        if self.outside:
            return body_parts.BodyPart()
        inside = True if self.verdict is None else ~self.verdict.outside
        for column, name in enumerate(self.names):
            for region in body_parts.of_label(name).regions:
                shows[region] |= self.predicted[:, column] & inside
        return body_parts.of_regions(
            region for region, rows in shows.items() if rows.any() and rows.mean() >= SEEN
        )

    @functools.cached_property
    def audit(self) -> str:
        """How the tag agrees with `body_part`, see `body_parts.audit`; `OUTSIDE` if outside."""
        if self.outside:
            return OUTSIDE
        known = {region for name in self.names for region in body_parts.of_label(name).regions}
        return body_parts.audit(self.tag, frozenset(self.body_part.regions), frozenset(known))

    @functools.cached_property
    def flags(self) -> tuple[str, ...]:
        """Names of `FLAGS` that hold for the series."""
        holds = {
            "tag": self.audit == "contradicts",
            "outside": self.outside,
            "order": self.verdict is not None and self.verdict.out_of_order and not self.outside,
        }
        return (*self.run_flags, *(name for name, value in holds.items() if value))

    @functools.cached_property
    def slice_flags(self) -> dict[int, tuple[str, ...]]:
        """Number of each slice that has flags of its own -> their names."""
        outside = [] if self.verdict is None else np.flatnonzero(self.verdict.outside).tolist()
        return {number: ("outside",) for number in outside}

    def flags_of(self, number: int) -> tuple[str, ...]:
        """The flags of the series and those of a slice."""
        return tuple(dict.fromkeys((*self.flags, *self.slice_flags.get(number, ()))))

    def slice_rows(self) -> Iterator[dict[str, Any]]:
        """Yields one dict per slice and predicted label, by decreasing confidence in each slice.

        A slice without a predicted label has one row with the label "".
        """
        for number in range(len(self)):
            place = {"series": self.id, "slice": number, "z_mm": _number(self.z_mm[number], 3)}
            source: dict[str, Any] = {
                "file": self.file_of(number),
                "sop_instance_uid": self.uid_of(number),
                "position_mm": _number(self.position_mm[number], 3),
                "distance": None,
                "distance_threshold": None,
            }
            if (verdict := self.verdict) is not None and verdict.thresholds is not None:
                source["distance"] = _number(verdict.distances[number], 3)
                source["distance_threshold"] = _number(verdict.thresholds[number], 3)
            source["flags"] = list(self.flags_of(number))
            for k in self.columns(number):
                scores = {
                    "label": self.names[k],
                    "confidence": _number(self.confidences[number, k]),
                    "threshold": float(self.thresholds[k]),
                }
                yield place | scores | source
            if not self.predicted[number].any():
                yield place | {"label": "", "confidence": None, "threshold": None} | source

    def cover_rows(self) -> Iterator[dict[str, Any]]:
        """Yields one dict per predicted label of the series; one with the label "" without any."""
        last = len(self) - 1
        empty = Cover("", 0, last, 0, math.nan, float(self.z_mm[0]), float(self.z_mm[last]))
        for cover in self.covers or [empty]:
            part = cover.body_part
            yield {
                "series": self.id,
                "label": cover.label,
                "first_slice": cover.first_slice,
                "last_slice": cover.last_slice,
                "first_mm": _number(cover.first_mm, 3),
                "last_mm": _number(cover.last_mm, 3),
                "slices": cover.slices,
                "mean_confidence": _number(cover.mean_confidence),
                "body_part_examined": part.term,
                "laterality": part.laterality,
                "sct_code": part.code,
                "sct_meaning": part.meaning,
                "flags": list(self.flags),
                **self._numbers(),
            }

    def overview(self) -> dict[str, Any]:
        """What the series is and shows, for tables and JSON."""
        part = self.body_part
        return {
            "series": self.id,
            "file": self.file_of(0),
            "slices": len(self),
            "mm": _number(self.z_mm[-1], 3),
            "body_part_examined": part.term,
            "sct_code": part.code,
            "sct_meaning": part.meaning,
            "tag": self.tag,
            "audit": self.audit,
            "flags": list(self.flags),
            "flagged_slices": len(self.slice_flags),
            **self._numbers(),
        }

    def _numbers(self) -> dict[str, float | None]:
        """The distance and the order of the series and their thresholds, see `Verdict`."""
        if self.verdict is None:
            names = ("distance", "distance_threshold", "order", "order_threshold")
            return dict.fromkeys(names)
        return self.verdict.numbers()

    def to_json(self) -> dict[str, Any]:
        """Everything that the tables hold, and all confidences, for JSON."""
        return self.overview() | {
            "slices": list(self.slices),
            "uids": list(self.uids),
            "z_mm": [_number(mm, 3) for mm in self.z_mm],
            "position_mm": [_number(mm, 3) for mm in self.position_mm],
            "labels": [list(labels) for labels in self.labels],
            "confidences": np.round(self.confidences.astype(float), 4).tolist(),
            "covers": [row for row in self.cover_rows() if row["label"]],
            "slice_flags": {str(number): list(flags) for number, flags in self.slice_flags.items()},
            "domain": None if self.verdict is None else self.verdict.to_json(),
        }

    def table(self) -> list[dict[str, Any]]:
        """One dict per slice: series, slice, file, uid, z_mm, position_mm, labels, confidences,
        flags.
        """
        return [
            {
                "series": self.id,
                "slice": number,
                "file": self.file_of(number),
                "uid": self.uid_of(number),
                "z_mm": float(self.z_mm[number]),
                "position_mm": float(self.position_mm[number]),
                "labels": self.labels[number],
                "confidences": self.confidences[number, self.columns(number)].tolist(),
                "flags": self.flags_of(number),
            }
            for number in range(len(self))
        ]

    def images(self, numbers: Iterable[int], size: int) -> Iterator[np.ndarray]:
        """Yields the input of the network for some slices: int16 HU `[size, size, 3]` each.

        The CT is read once.
        """
        volume = self.read()
        threshold = preprocess.body_threshold(volume.hu, self.png_window)
        for number in numbers:
            around = volume.neighbours(number)
            yield preprocess.make_triplet(around, size, threshold=threshold)[0]


def count_flags(flags: Iterable[Iterable[str]]) -> dict[str, int]:
    """Flag -> the number of series or images for which it holds, in the order of `FLAGS`."""
    counts = collections.Counter(name for names in flags for name in names)
    return {name: counts[name] for name in FLAGS if counts[name]}


def describe_flags(counts: Mapping[str, int], total: str) -> list[str]:
    """One line for each flag: on how many of `total`, such as "3 series", and its meaning."""
    return [f"flag {name} on {count} of {total}: {FLAGS[name]}" for name, count in counts.items()]


def _number(value: float, digits: int = 4) -> float | None:
    """A number for JSON: rounded, None for nan."""
    return None if math.isnan(value) else round(float(value), digits)
