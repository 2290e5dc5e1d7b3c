"""The statistics and thresholds of `domain` from features of training and tuning slices."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax import console
from maknet_jax.data.records import Example, ExampleSource
from maknet_jax.evaluation import domain
from maknet_jax.evaluation.domain import Domain
from maknet_jax.evaluation.evaluator import Evaluator

COMPONENTS = 64  # at most
CENTRES = 64  # at most
PATIENTS = 5  # the least number of patients whose slices a centre averages
FALSE_ALARMS = 0.01  # share of the tuning slices and series beyond the thresholds
SHRINKAGE = 0.05  # share of the mean variance in the covariance
MOST_SLICES = 20_000  # per split; larger splits are sampled
SEED = 0

_SLICES_PER_CENTRE = 32
_SLICES_PER_COMPONENT = 4
_PIECES = 10  # the least number of pieces of series from which a threshold is chosen
_ROUNDS, _ITERATIONS = 4, 10  # of the covariance; of k-means in each of them
_RIDGE = 0.1  # of the regression of changes, relative to unit variance
_NORMAL = 2.5758  # standard deviations; half of FALSE_ALARMS lies beyond, there are two rules
_BLOCK = 250  # consecutive slices of a sampled split
_DEEPLESION = re.compile(r"(\d{6}_\d\d_\d\d)[/_]\d+\.png$")


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """The features of slices, and where they are from.

    Attributes:
      features: float `[N, F]`.
      patients: `[N]`, names.
      series: `[N]`, names, unique over all patients.
      mm: `[N]`, position in the series, increasing towards the feet; nan if unknown.
    """

    features: np.ndarray
    patients: np.ndarray
    series: np.ndarray
    mm: np.ndarray

    def by_series(self) -> Iterator[np.ndarray]:
        """Yields the rows of each series in the order of their position."""
        for name in dict.fromkeys(self.series.tolist()):
            rows = np.flatnonzero(self.series == name)
            yield rows[np.argsort(self.mm[rows], kind="stable")]


def place(example: Example) -> tuple[str, str, float]:
    """(patient, series, mm) of a prepared slice; mm is nan where it is not recorded.

    Without a patient the series stands for it, and without a series the slice.
    """
    meta: dict[str, Any] = example.meta
    scan = _DEEPLESION.search(str(meta.get("file", "")))
    series = str(meta.get("case") or meta.get("series") or (scan and scan[1]) or example.id)
    patient = str(meta.get("patient") or (scan and scan[1][:6]) or series)
    number, spacing = meta.get("slice"), (meta.get("spacing") or [None])[0]
    known = number is not None and spacing is not None
    return patient, f"{patient}/{series}", number * spacing if known else np.nan


class Sample:
    """At most `MOST_SLICES` examples of a source, in blocks of consecutive ones."""

    def __init__(self, source: ExampleSource, most: int = MOST_SLICES) -> None:
        """Chooses the examples; all of them if there are at most `most`."""
        self._source = source
        count, blocks = len(source), max(1, most // _BLOCK)
        self._chosen: Sequence[int] = range(count)
        if count > most:
            starts = np.linspace(0, count - _BLOCK, blocks).astype(int)
            self._chosen = [int(start) + k for start in starts for k in range(_BLOCK)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._chosen[index]]

    def with_features(self, features: np.ndarray) -> Slices:
        """The features `[N, F]` of all examples with the places of the examples."""
        places = [place(self[number]) for number in range(len(self))]
        patients, series, mm = (np.array(column) for column in zip(*places, strict=True))
        return Slices(features, patients, series, mm.astype(np.float64))


def measure(
    sources: Sequence[ExampleSource],
    predict: Callable[..., Mapping[str, np.ndarray]],
    variables: object,
    *,
    components: int,
    drop_maxima: bool = False,
    **reading: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Computes the features of the training and the tuning slices, and fits the statistics.

    Args:
      sources: the training examples, and those that chose the thresholds of the labels.
      predict: see `Evaluator`; its outputs include `features` `[B, F]`.
      variables: the first argument of `predict`.
      components: see `fit`.
      drop_maxima: see `fit`.
      **reading: batch_size, process_index, process_count, threads and stop of `Evaluator`.

    Returns:
      (`Domain.arrays`, what they were computed from, as JSON); None where `fit` has none.
    """
    samples, slices = [Sample(source) for source in sources], []
    with console.progress("domain", sum(map(len, samples))) as advance:
        for sample in samples:
            evaluator = Evaluator(sample, predict, **reading)
            outputs = evaluator.outputs(variables, ("features",), advance)
            slices.append(sample.with_features(outputs["features"]))
    statistics = fit(*slices, components=components, drop_maxima=drop_maxima)
    if statistics is None:
        return None
    about: dict[str, Any] = {"false_alarms": FALSE_ALARMS}
    for name, each in zip(("training", "tuning"), slices, strict=True):
        about[f"{name}_slices"] = len(each.features)
        about[f"{name}_patients"] = len(set(each.patients.tolist()))
    about |= {"components": len(statistics.projection), "centres": len(statistics.centres)}
    about["judges"] = ["slices"]
    about["judges"] += ["series"] * (statistics.series_threshold is not None)
    about["judges"] += ["order"] * (statistics.order_threshold is not None)
    return statistics.arrays(), about


def fit(
    train: Slices, tuning: Slices, *, components: int = COMPONENTS, drop_maxima: bool = False
) -> Domain | None:
    """The statistics of the training slices, with thresholds from the tuning slices.

    Args:
      train: slices of the training data.
      tuning: slices of other patients.
      components: principal components, at most `COMPONENTS`.
      drop_maxima: ignore the first half of the features, which are maxima: without them, more of
        the changed slices of tuning patients are found.

    Returns:
      The statistics; None if there are fewer than `PATIENTS` training patients, or if all features
      are equal.
    """
    if len(set(train.patients.tolist())) < PATIENTS or not len(tuning.features):
        return None
    features = np.asarray(train.features, np.float64)
    mean = features.mean(axis=0)
    maxima = features.shape[1] // 2 * drop_maxima
    variances, axes = np.linalg.eigh(np.cov((features - mean)[:, maxima:], rowvar=False, bias=True))
    most = max(1, min(components, COMPONENTS, len(features) // _SLICES_PER_COMPONENT))
    used = np.flatnonzero(variances > 1e-9 * max(variances[-1], 1e-12))[::-1][:most]
    if not len(used) or variances[-1] <= 0:
        return None
    scaled = axes[:, used].T / np.sqrt(variances[used])[:, None]
    scaled = np.pad(scaled, ((0, 0), (maxima, 0)))
    rows = (features - mean) @ scaled.T
    centres, whitening = _centres(rows, train.patients)
    result = Domain(
        mean=mean,
        projection=whitening @ scaled,
        centres=centres,
        slice_threshold=np.inf,
        window_threshold=np.inf,
    )
    return _with_thresholds(_with_order(result, train), tuning)


def _centres(rows: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of clusters and their common covariance, by k-means in the metric of that covariance.

    Args:
      rows: `[N, P]`.
      patients: `[N]`.

    Returns:
      (whitened centres `[C, P]`, the whitening `[P, P]`).
    """
    count = max(1, min(CENTRES, len(rows) // _SLICES_PER_CENTRE))
    centres, whitening = _seeds(rows, count), np.eye(rows.shape[1])
    for _ in range(_ROUNDS):
        for _ in range(_ITERATIONS):
            member = _members(rows @ whitening.T, centres @ whitening.T, patients)
            centres = np.stack([rows[member == k].mean(axis=0) for k in np.unique(member)])
        member, _ = domain.nearest(rows @ whitening.T, centres @ whitening.T)
        whitening = _whitening(rows - centres[member])
    return centres @ whitening.T, whitening


def _seeds(rows: np.ndarray, count: int) -> np.ndarray:
    """The first centres, by k-means++: rows far from each other."""
    rng = np.random.default_rng(SEED)
    chosen = [int(rng.integers(len(rows)))]
    squares = ((rows - rows[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count and squares.sum() > 0:
        chosen.append(int(rng.choice(len(rows), p=squares / squares.sum())))
        squares = np.minimum(squares, ((rows - rows[chosen[-1]]) ** 2).sum(axis=1))
    return rows[chosen]


def _members(rows: np.ndarray, centres: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """`[N]`: the cluster of each row.

    A centre of few patients would reveal them: it is removed, and its slices join other clusters.
    """
    while True:
        member, _ = domain.nearest(rows, centres)
        large = [
            k for k in range(len(centres)) if len(np.unique(patients[member == k])) >= PATIENTS
        ]
        if len(large) == len(centres):
            return member
        if not large:
            return np.zeros(len(rows), int)
        centres = centres[large]


def _whitening(residuals: np.ndarray) -> np.ndarray:
    """W such that the residuals `[N, P]` times W.T have the unit covariance, after shrinkage."""
    covariance = residuals.T @ residuals / len(residuals)
    size = len(covariance)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / size * np.eye(size)
    return np.linalg.inv(np.linalg.cholesky(shrunk))


def _with_order(statistics: Domain, train: Slices) -> Domain:
    """Adds the expected change of the features from head to feet, by ridge regression."""
    rows, actual, explaining = statistics.project(train.features), [], []
    for each in train.by_series():
        mm = train.mm[each]
        if np.isfinite(mm).all():
            pairs = domain.neighbours(mm)
            actual.append(domain.changes(rows[each], mm, *pairs))
            explaining.append(domain.with_one(rows[each], *pairs))
    count = sum(map(len, actual))
    if count < _SLICES_PER_COMPONENT * rows.shape[1]:
        return statistics
    changes, middle = np.concatenate(actual), np.concatenate(explaining)
    ridge = _RIDGE * count * np.eye(middle.shape[1])
    change = np.linalg.solve(middle.T @ middle + ridge, middle.T @ changes)
    scale = ((changes - middle @ change) ** 2).mean(axis=0)
    scale = np.maximum(scale, 1e-6 * scale.max())
    return dataclasses.replace(statistics, change=change, change_scale=scale)


def _with_thresholds(statistics: Domain, tuning: Slices) -> Domain:
    """Adds the thresholds that `FALSE_ALARMS` of the tuning slices and series exceed."""
    single = statistics.distances(tuning.features)
    windows, distances, orders = [], [], []
    for each in tuning.by_series():
        mm = tuning.mm[each]
        if not np.isfinite(mm).all():
            continue
        means, counts = domain.window_means(single[each], mm)
        windows += means[counts >= domain.SMALLEST_WINDOW].tolist()
        for piece in _pieces(mm):
            distances.append(float(single[each[piece]].mean()))
            orders.append(statistics.order(tuning.features[each[piece]], mm[piece]))
    above = 1 - FALSE_ALARMS
    slice_threshold = float(np.quantile(single, above))
    known = [order for order in orders if order is not None]
    result = dataclasses.replace(
        statistics,
        slice_threshold=slice_threshold,
        window_threshold=float(np.quantile(windows, above)) if windows else slice_threshold,
    )
    if len(distances) >= _PIECES:
        limit = float(np.mean(distances) + _NORMAL * np.std(distances))
        result = dataclasses.replace(result, series_threshold=limit)
    if len(known) < _PIECES:
        return dataclasses.replace(result, change=None, change_scale=None)
    return dataclasses.replace(
        result, order_threshold=float(np.mean(known) - _NORMAL * np.std(known))
    )


def _pieces(mm: np.ndarray) -> list[np.ndarray]:
    """Cuts a series into pieces of at least `domain.PIECE` mm; a shorter series gives none."""
    count = int(np.ptp(mm) // domain.PIECE)
    if not count:
        return []
    part = np.minimum((mm - mm.min()) / np.ptp(mm) * count, count - 1).astype(int)
    pieces = (np.flatnonzero(part == k) for k in range(count))
    return [piece for piece in pieces if len(piece)]  # slices may be further apart than a piece
