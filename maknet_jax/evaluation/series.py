"""The predictions of a network for a CT series, per slice and for the whole series."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from maknet_jax.ct import preprocess
from maknet_jax.ct.volumes import Volume
from maknet_jax.data.labels import Vocabulary
from maknet_jax.evaluation import protocol


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


@dataclasses.dataclass(frozen=True, eq=False)
class SeriesResult:
    """The labels of one series; slices run from head to feet.

    Attributes:
      id: of the series.
      slices: the name of each slice, see `Volume.slices`.
      z_mm: `[Z]`, mm below the first slice; nan where the spacing is unknown.
      names: the K label names.
      thresholds: `[K]`.
      confidences: float32 `[Z, K]`.
      predicted: bool `[Z, K]`: labels that reach their threshold, and parents of such labels.
      features: float32 `[Z, F]`, pooled features; None if they were not requested.
      read: read() returns the CT; it may read the files again.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
    """

    id: str
    slices: tuple[str, ...]
    z_mm: np.ndarray
    names: tuple[str, ...]
    thresholds: np.ndarray
    confidences: np.ndarray
    predicted: np.ndarray
    features: np.ndarray | None
    read: Callable[[], Volume] = dataclasses.field(repr=False)
    png_window: tuple[float, float] | None = None

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
            z_mm=volume.z_mm,
            names=vocabulary.names,
            thresholds=thresholds,
            confidences=confidences,
            predicted=predicted,
            **more,
        )

    def __len__(self) -> int:
        return len(self.slices)

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

    def table(self) -> list[dict[str, Any]]:
        """One dict per slice: series, slice, file, z_mm, labels, confidences."""
        return [
            {
                "series": self.id,
                "slice": number,
                "file": name,
                "z_mm": float(self.z_mm[number]),
                "labels": self.labels[number],
                "confidences": self.confidences[number, self.columns(number)].tolist(),
            }
            for number, name in enumerate(self.slices)
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
