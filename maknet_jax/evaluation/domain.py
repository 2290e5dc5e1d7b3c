"""Out-of-domain scores: how far the pooled features of CT are from those of the training data.

The features of a slice (with global concatenate pooling, only the means) are projected on at most
64 principal components. The distance of a slice is the logarithm of the squared Mahalanobis
distance to the nearest of several centres, with one covariance for all (Lee et al.,
arXiv:1807.03888; centres from k-means replace their classes, because a slice has several labels and
some are unknown). Three rules compare with thresholds that were chosen on the tuning patients, see
`domain_fit`:

- A slice is outside the domain if the mean distance of the slices within `WINDOW` mm is too large.
- A series is outside if the mean distance of all of its slices is too large.
- A series is out of order if its features do not change from head to feet as those of the training
  data do: it is upside down, turned or flipped. Series shorter than `PIECE` mm are not judged.

The statistics hold no features of single patients: each centre averages slices of at least
`domain_fit.PATIENTS` patients. Mirror images (left and right swapped) are not found: the pooled
features of a head and of its mirror image are alike.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from maknet_jax.errors import InputError

WINDOW = 20.0  # mm on either side of a slice
PIECE = 80.0  # mm; thresholds of series were chosen on pieces of this length
SPACING = 3.0  # mm between slices; assumed where it is unknown
STEP = 8.0  # mm between the two slices whose features are compared
SMALLEST_WINDOW = 3  # slices; smaller windows have the threshold of single slices

_REQUIRED = ("mean", "projection", "centres", "slice_threshold", "window_threshold")
_ORDER = ("change", "change_scale", "order_threshold")


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """How a series compares with the training data.

    Attributes:
      distances: float `[Z]`: of each slice, averaged over its window.
      outside: bool `[Z]`, slices outside the domain.
      distance: the mean distance of all slices.
      order: correlation of the changes of the features from head to feet with the expected ones, -1
        to 1; None for a series that is too short.
      series_outside: the series is outside the domain.
      out_of_order: the series is inside the domain, but its features do not change from head to
        feet as expected.
      thresholds: float `[Z]`, the largest distance of each slice inside the domain; None in results
        of unknown thresholds.
      threshold: the largest distance of a series inside the domain; None if there is none.
      order_threshold: the smallest order of a series that runs as expected; None if there is none.
    """

    distances: np.ndarray
    outside: np.ndarray
    distance: float
    order: float | None
    series_outside: bool
    out_of_order: bool
    thresholds: np.ndarray | None = None
    threshold: float | None = None
    order_threshold: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All numbers, rounded."""
        return {
            "distances": np.round(self.distances, 3).tolist(),
            "outside": np.flatnonzero(self.outside).tolist(),
            "thresholds": [] if self.thresholds is None else np.round(self.thresholds, 3).tolist(),
            **self.numbers(),
            "series_outside": self.series_outside,
            "out_of_order": self.out_of_order,
        }

    def numbers(self) -> dict[str, float | None]:
        """The numbers of the series and their thresholds, rounded; None where there is none."""
        values = {
            "distance": self.distance,
            "distance_threshold": self.threshold,
            "order": self.order,
            "order_threshold": self.order_threshold,
        }
        return {name: None if value is None else round(value, 3) for name, value in values.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
    """Statistics of the features of the training data.

    Attributes:
      mean: `[F]`, of the features.
      projection: `[P, F]`; distances of the projected features are Mahalanobis distances.
      centres: `[C, P]`, projected.
      slice_threshold: largest distance of a slice without neighbours.
      window_threshold: largest mean distance of the slices in a window.
      series_threshold: largest mean distance of a series; None if there were too few to choose it.
      change: `[P + 1, P]`: the change of the projected features per mm towards the feet is [1,
        projected features] @ change; None if too few neighbouring slices were known.
      change_scale: `[P]`, variance of the changes; weights the components.
      order_threshold: smallest order of a series.
    """

    mean: np.ndarray
    projection: np.ndarray
    centres: np.ndarray
    slice_threshold: float
    window_threshold: float
    series_threshold: float | None = None
    change: np.ndarray | None = None
    change_scale: np.ndarray | None = None
    order_threshold: float | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics as float32 arrays by name, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: np.atleast_1d(np.asarray(value, np.float32))
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], features: int | None = None) -> "Domain":
        """The inverse of `arrays`.

        Args:
          arrays: the statistics.
          features: the number of features F of the network; None skips the check.

        Raises:
          InputError: an array is missing, unknown, not finite or of the wrong shape.
        """
        wanted = [*_REQUIRED, *(_ORDER if any(name in arrays for name in _ORDER) else ())]
        known = [field.name for field in dataclasses.fields(cls)]
        for name in (*wanted, *arrays):
            if name not in arrays or name not in known:
                problem = "is missing" if name in known else "is unknown"
                raise InputError(f"out-of-domain statistics are damaged: {name!r} {problem}")
        if np.ndim(arrays["projection"]) != 2 or np.ndim(arrays["centres"]) != 2:
            raise InputError("out-of-domain statistics are damaged: projection or centres")
        components, width = np.shape(arrays["projection"])
        shapes = {
            "mean": (features or width,),
            "projection": (components, features or width),
            "centres": (len(arrays["centres"]) or 1, components),
            "change": (components + 1, components),
            "change_scale": (components,),
        }
        for name, array in arrays.items():
            shape = shapes.get(name, (1,))
            if np.shape(array) != shape or not np.isfinite(array).all():
                raise InputError(
                    f"out-of-domain statistics are damaged: {name} is {np.shape(array)}, "
                    f"expected {shape} and finite values"
                )
        if (np.asarray(arrays.get("change_scale", 0.0)) < 0).any():
            raise InputError("out-of-domain statistics are damaged: change_scale is below 0")
        values = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        limits = {name: float(values[name][0]) for name in values if name.endswith("threshold")}
        return cls(
            mean=values["mean"],
            projection=values["projection"],
            centres=values["centres"],
            slice_threshold=limits["slice_threshold"],
            window_threshold=limits["window_threshold"],
            series_threshold=limits.get("series_threshold"),
            change=values.get("change"),
            change_scale=values.get("change_scale"),
            order_threshold=limits.get("order_threshold"),
        )

    def project(self, features: np.ndarray) -> np.ndarray:
        """Features `[N, F]` -> float64 `[N, P]`."""
        return (np.asarray(features, np.float64) - self.mean) @ self.projection.T

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Features `[N, F]` -> `[N]`, the distance of each slice without its neighbours."""
        return nearest(self.project(features), self.centres)[1]

    def order(self, features: np.ndarray, mm: np.ndarray) -> float | None:
        """The order of a series, see `Verdict`; None where it cannot be judged.

        Args:
          features: `[Z, F]`.
          mm: `[Z]`, position of each slice; increases towards the feet.
        """
        first, second = neighbours(mm)
        if self.change is None or self.change_scale is None or len(first) < SMALLEST_WINDOW:
            return None
        rows = self.project(features)
        actual, expected = (
            values / np.sqrt(self.change_scale)
            for values in (
                changes(rows, mm, first, second),
                with_one(rows, first, second) @ self.change,
            )
        )
        norm = np.sqrt((actual**2).sum() * (expected**2).sum())
        return float((actual * expected).sum() / norm) if norm > 0 else 0.0

    def judge(self, features: np.ndarray, mm: np.ndarray) -> Verdict:
        """Compares a series with the training data.

        Args:
          features: `[Z, F]`, pooled, of the slices from head to feet.
          mm: `[Z]`, position of each slice below the first; nan where the spacing is unknown.
        """
        mm = np.asarray(mm, np.float64)
        if not np.isfinite(mm).all():
            mm = np.arange(len(mm)) * SPACING
        single = self.distances(features)
        averaged, counts = window_means(single, mm)
        limits = np.where(counts < SMALLEST_WINDOW, self.slice_threshold, self.window_threshold)
        distance, order = float(single.mean()), None
        limit = self.series_threshold
        if np.ptp(mm) < PIECE:  # no longer than a window
            limit = self.slice_threshold if len(mm) < SMALLEST_WINDOW else self.window_threshold
        elif self.order_threshold is not None:
            order = self.order(features, mm)
        outside = limit is not None and distance > limit
        return Verdict(
            distances=averaged,
            outside=averaged > limits,
            distance=distance,
            order=order,
            series_outside=outside,
            out_of_order=(
                not outside and order is not None and order < (self.order_threshold or 0.0)
            ),
            thresholds=limits,
            threshold=limit,
            order_threshold=None if order is None else self.order_threshold,
        )


def nearest(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the nearest centre, logarithm of its squared distance), each `[N]`.

    Args:
      rows: `[N, P]`.
      centres: `[C, P]`.
    """
    norms = (rows**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    squares = norms - 2 * rows @ centres.T
    # A slice at a centre has distance 0, whose logarithm must stay finite.
    return squares.argmin(axis=1), np.log(np.maximum(squares.min(axis=1), 1e-9))


def window_means(values: np.ndarray, mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean over the slices within `WINDOW` mm of each slice, their number), each `[Z]`."""
    inside = np.abs(mm[:, None] - mm[None]) <= WINDOW + 1e-6
    counts = inside.sum(axis=1)
    return inside @ values / counts, counts


def neighbours(mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of pairs of slices of a series that are about `STEP` mm apart, half to twice that.

    Args:
      mm: `[Z]`, in increasing order.
    """
    gaps = np.abs(mm[None] - mm[:, None] - STEP)
    second = gaps.argmin(axis=1)
    apart = mm[second] - mm
    first = np.flatnonzero((apart >= STEP / 2) & (apart <= STEP * 2))
    return first, second[first]


def changes(rows: np.ndarray, mm: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Change per mm from the first to the second slice of each pair: `[M, P]`."""
    return (rows[second] - rows[first]) / (mm[second] - mm[first])[:, None]


def with_one(rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean of both slices of each pair, and a column of ones before it: `[M, P + 1]`."""
    middle = (rows[first] + rows[second]) / 2
    return np.concatenate([np.ones((len(middle), 1)), middle], axis=1)
