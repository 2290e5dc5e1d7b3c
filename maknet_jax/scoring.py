"""Confidences of the slices of a volume, computed here or by the workers of a Dask cluster."""

import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maknet_jax import console
from maknet_jax.ct import paged, preprocess, pseudonym, reading, search, volumes
from maknet_jax.data import cluster, worker_pool
from maknet_jax.errors import InputError, NothingUsable, Rejected
from maknet_jax.evaluation import metrics
from maknet_jax.evaluation.domain import Domain
from maknet_jax.evaluation.series import SeriesResult
from maknet_jax.figures import picture
from maknet_jax.runs import workdir
from maknet_jax.training import sharding

View = tuple[np.ndarray, tuple[float, float]]  # see `picture.coronal`

_one_at_a_time = threading.Lock()  # the threads of a worker share its devices


@dataclasses.dataclass(frozen=True)
class Model:
    """A network that the workers of a cluster open by themselves.

    Attributes:
      source: the absolute path of a workdir or a bundle, or the name of a released one.
      checkpoint: "best" or "last".
      step: of the checkpoint, which must not change while the command runs.
    """

    source: str
    checkpoint: str
    step: int

    @classmethod
    def of_run(cls, run: workdir.Run, source: str | os.PathLike[str]) -> "Model":
        """The model of an open run; `source` is what it was opened with."""
        exists = pathlib.Path(source).exists()
        return cls(os.path.abspath(source) if exists else str(source), run.name, run.step)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One series; the fields are those of `on_cluster`."""

    ref: search.SeriesRef
    model: Model
    batch_size: int
    png_window: tuple[float, float] | None
    features: bool
    hidden: pseudonym.Pseudonyms | None
    overrides: reading.Overrides
    views: bool

    @property
    def source(self) -> str:
        """The path of its first file."""
        return self.ref.paths[0]


def on_cluster(
    scheduler: str,
    model: Model,
    series: Sequence[search.SeriesRef],
    failures: list[tuple[str, str]],
    *,
    batch_size: int,
    png_window: tuple[float, float] | None,
    features: bool,
    hidden: pseudonym.Pseudonyms | None,
    overrides: reading.Overrides,
    views: bool,
) -> Iterator[tuple[SeriesResult, View | None]]:
    """Yields the labels of each series in order, as `predict.predict_series` does.

    Args:
      scheduler: the address of a Dask scheduler.
      model: the trained network.
      series: see `predict.find_inputs`.
      failures: rejected series are appended as (first file, reason).
      batch_size: slices per step.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
      features: also return the pooled features.
      hidden: replaces the names of series and slices; None keeps them.
      overrides: what is read although it would be rejected.
      views: also return the view of each series from the front; else None.

    Raises:
      NothingUsable: none could be read.
      InputError: a series kills its workers, or see `cluster.Cluster`.
    """
    units = [
        _Unit(ref, model, batch_size, png_window, features, hidden, overrides, views)
        for ref in series
    ]
    read_any = False
    with (
        console.progress("predict", sum(ref.count for ref in series)) as advance,
        cluster.start(1, scheduler, module=__name__) as pool,
    ):

        def died(unit: _Unit, how: str) -> Any:
            raise worker_pool.death(pool, unit.source, how)

        scored = pool.map(_score_series, units, alone=lambda unit: False, died=died)
        for unit, (result, view, reason) in zip(units, scored, strict=True):
            advance(unit.ref.count)
            if result is None:
                failures.append((unit.source, reason))
            else:
                yield result, view
                read_any = True
    if not read_any:
        raise NothingUsable(f"none of the {len(series)} series can be read", failures)


def _score_series(unit: _Unit) -> tuple[SeriesResult | None, View | None, str]:
    """(result, view, "") or (None, None, why the series cannot be read), on a worker."""
    options: dict[str, Any] = {"png_window": unit.png_window, "overrides": unit.overrides}
    try:
        volume = volumes.load_series(unit.ref, **options)
    except Rejected as error:
        return None, None, str(error)
    volume = unit.hidden.volume(volume) if unit.hidden else volume
    with _one_at_a_time:
        result = predict_volume(
            _opened(unit.model),
            volume,
            unit.batch_size,
            unit.png_window,
            features=unit.features,
            read=functools.partial(volumes.load_series, unit.ref, **options),
        )
    return result, picture.coronal(volume.hu, volume.spacing) if unit.views else None, ""


@functools.lru_cache(maxsize=1)
def _opened(model: Model) -> workdir.Run:
    run = workdir.open_run(model.source, checkpoint_name=model.checkpoint)
    if run.step != model.step:
        raise InputError(
            f"{model.source} has changed: its {model.checkpoint} checkpoint is of step {run.step}, "
            f"expected {model.step}: run the command again"
        )
    return run


def network_flags(run: workdir.Run) -> tuple[str, ...]:
    """The names of `series.FLAGS` that hold for every series because of the network."""
    return ("phantom",) if run.data_kind == "phantom" else ()


def predict_volume(
    run: workdir.Run,
    volume: volumes.Volume,
    batch_size: int = 16,
    png_window: tuple[float, float] | None = None,
    advance: Callable[[int], None] = lambda count: None,
    *,
    features: bool = False,
    read: Callable[[], volumes.Volume] | None = None,
) -> SeriesResult:
    """The labels of all slices of a volume.

    Args:
      run: the trained network.
      volume: the CT, from head to feet.
      batch_size: slices per step; rounded up to a multiple of the devices.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
      advance: called with the number of slices after each batch.
      features: also return the pooled features.
      read: reads the volume again, so that the result need not keep it; if None, it keeps it.
    """
    needed = features or run.domain is not None
    confidences, pooled = _score(run, volume, batch_size, png_window, advance, features=needed)
    result = SeriesResult.of_scores(
        volume,
        run.vocabulary,
        run.thresholds,
        confidences,
        features=pooled if features else None,
        read=read or (lambda: volume),
        png_window=png_window,
        run_flags=network_flags(run),
    )
    if run.domain is None or pooled is None:
        return result
    statistics = Domain.from_arrays(run.domain.arrays, pooled.shape[1])
    return dataclasses.replace(result, verdict=statistics.judge(pooled, result.z_mm))


def score_volume(
    run: workdir.Run,
    volume: volumes.Volume,
    batch_size: int = 16,
    png_window: tuple[float, float] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Confidences of all slices of a volume: float32 `[Z, K]`; for the arguments see above."""
    return _score(run, volume, batch_size, png_window, advance, features=False)[0]


def _score(
    run: workdir.Run,
    volume: volumes.Volume,
    batch_size: int,
    png_window: tuple[float, float] | None,
    advance: Callable[[int], None],
    *,
    features: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(confidences `[Z, K]`, features `[Z, F]` or None) of all slices of a volume."""
    size = run.size
    threshold = preprocess.body_threshold(volume.hu, png_window)
    batch_size = sharding.round_up_to_devices(batch_size, run.mesh.size)
    scores, pooled = [], []
    for start in range(0, len(volume.hu), batch_size):
        centres = range(start, min(start + batch_size, len(volume.hu)))
        images = np.zeros((batch_size, size, size, 3), np.int16)
        for row, centre in enumerate(centres):
            around = volume.neighbours(centre)
            images[row], _ = preprocess.make_triplet(around, size, threshold=threshold)
        if features:
            both = run.score_with_features({"image": images})
            logits, rows = (np.asarray(each)[: len(centres)] for each in both)
            pooled.append(rows)
        else:
            logits = run.predict(run.prepared, {"image": images})["logits"][: len(centres)]
        paged.release(volume.hu)
        scores.append(metrics.sigmoid(logits))
        advance(len(centres))
    return np.concatenate(scores), np.concatenate(pooled) if features else None
