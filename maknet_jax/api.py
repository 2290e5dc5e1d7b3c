"""The Python API: a trained network as an object.

The examples in this module run as tests, in a folder with a run and a CT series.

>>> import maknet_jax
>>> model = maknet_jax.load("runs/teacher")
>>> result = model.predict("scans/series")
>>> print(result)
1...: 12 slices, ... mm; shows ...
>>> maps = model.attribute(result, labels=[model.labels[0]])
>>> maps.maps.shape == (1, 1, model.size, model.size, 3)
True
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import jax
import numpy as np
import numpy.typing as npt

from maknet_jax import console, predict, scoring
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.attribution import perturbation
from maknet_jax.ct import arrays, reading, search
from maknet_jax.errors import InputError
from maknet_jax.evaluation import series_tables
from maknet_jax.evaluation.series import SeriesResult
from maknet_jax.explain.explanation import Explanation
from maknet_jax.explain.label_names import label_columns
from maknet_jax.explain.network import Network, make_network, network_name
from maknet_jax.explain.options import PathOptions
from maknet_jax.explain.ranking import best_slices, group_of, label_scores
from maknet_jax.runs import released, workdir
from maknet_jax.training import sharding

Source: TypeAlias = "search.Paths | np.ndarray"
Images: TypeAlias = "search.Paths | np.ndarray | Prediction"


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The predictions of a network for one or several series.

    Attributes:
      series: one result per series, in the order of the paths given, then of the files (a
        path may hold several series, or none): `labels` and `confidences` by slice, what it shows
        (`body_part`), the range of each label in slices and mm (`covers`), and `flags`.
      failures: (input, reason) for each input that could not be read.
    """

    series: tuple[SeriesResult, ...]
    failures: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """The number of slices of all series."""
        return sum(map(len, self.series))

    @property
    def labels(self) -> list[tuple[str, ...]]:
        """The predicted labels of each slice, by decreasing confidence; all series in order."""
        return [labels for series in self.series for labels in series.labels]

    @property
    def confidences(self) -> np.ndarray:
        """float32 `[N, K]` of all slices."""
        return np.concatenate([series.confidences for series in self.series])

    @property
    def features(self) -> np.ndarray | None:
        """float32 `[N, F]` of all slices; None unless `predict(..., features=True)`."""
        pooled = [series.features for series in self.series if series.features is not None]
        return np.concatenate(pooled) if pooled else None

    def table(self) -> list[dict[str, Any]]:
        """One dict per slice, for `pandas.DataFrame`: series, slice, z_mm, labels, flags, ..."""
        return [row for series in self.series for row in series.table()]

    def __str__(self) -> str:
        return "\n".join(
            series_tables.describe(
                series.overview(), [row for row in series.cover_rows() if row["label"]]
            )
            for series in self.series
        )


class Model:
    """A trained network, opened by `load`.

    Attributes:
      run: the opened workdir or bundle.
    """

    def __init__(self, run: workdir.Run) -> None:
        self.run = run

    def __repr__(self) -> str:
        run = self.run
        return (
            f"<{run.model_name} of {released.shown_name(run.source)}: {len(self.labels)} labels, "
            f"{self.size} x {self.size}, {run.name} checkpoint, step {run.step}>"
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names in column order."""
        return self.run.vocabulary.names

    @property
    def thresholds(self) -> np.ndarray:
        """float `[K]`; a label is predicted if its confidence reaches its threshold."""
        return self.run.thresholds

    @property
    def size(self) -> int:
        """The edge S of its images in pixels."""
        return self.run.size

    def predict(
        self,
        source: Source,
        *,
        affine: npt.ArrayLike | None = None,
        spacing: Sequence[float] | None = None,
        orientation: str | None = None,
        png_window: tuple[float, float] | None = None,
        batch_size: int = 16,
        features: bool = False,
        assume_hu: bool = False,
        allow_lossy: bool = False,
    ) -> Prediction:
        """Predicts the labels of every slice.

        >>> import numpy as np
        >>> hu = np.random.default_rng(0).integers(-1000, 300, (4, 48, 48))
        >>> result = model.predict(hu, spacing=(5, 0.8, 0.8), orientation="IPL")
        >>> [row["z_mm"] for row in result.table()]
        [0.0, 5.0, 10.0, 15.0]
        >>> model.predict(hu)
        Traceback (most recent call last):
        ...
        maknet_jax.errors.InputError: an array of shape (4, 48, 48) with no geometry: pass ...

        Args:
          source: a file or a folder of DICOM, NIfTI or PNG with any number of series, or a list of
            them; or one volume as an array of HU with three axes in any order.
          affine: of an array: `[4, 4]`, from indices to RAS in mm, as in nibabel.
          spacing: of an array, instead of the affine: mm along each axis.
          orientation: with `spacing`: three letters, the direction in which each axis increases.
            "LPS" axes run to the left, to posterior and to superior; "IPL" has slices first, from
            head to feet, then rows and columns as radiologists view them.
          png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
          batch_size: slices per step.
          features: also return the pooled features.
          assume_hu: read values as HU even if they do not look like it.
          allow_lossy: read DICOM with lossy compression.

        Raises:
          InputError: an array has no geometry, or nothing can be read.
        """
        overrides = reading.Overrides(assume_hu, allow_lossy)
        if search.is_path(source):
            if affine is not None or spacing is not None or orientation is not None:
                raise InputError(
                    f"{source} stores its own geometry: omit affine, spacing and orientation"
                )
            series, failures = predict.find_inputs(source, overrides)
            each = predict.predict_series(
                self.run,
                series,
                failures,
                batch_size=batch_size,
                png_window=png_window,
                features=features,
                overrides=overrides,
            )
            return Prediction(tuple(result for result, _ in each), tuple(failures))
        volume = arrays.volume_of_array(
            cast(np.ndarray, source),
            affine=affine,
            spacing=spacing,
            orientation=orientation,
            overrides=overrides,
        )
        result = predict.predict_volume(self.run, volume, batch_size, features=features)
        return Prediction((result,))

    def logits(self, images: Images, *, batch_size: int = 16) -> np.ndarray:
        """Logits float32 `[N, K]`; the confidences are their sigmoid.

        Args:
          images: int16 HU `[N, S, S, 3]` as in prepared records; or a prediction, whose slices are
            read again; or files and folders as in `predict`, whose rejected inputs are logged.
          batch_size: images per step.

        Raises:
          InputError: the images have another form, or nothing can be read.
        """
        return self._apply(images, batch_size)[0]

    def features(self, images: Images, *, batch_size: int = 16) -> np.ndarray:
        """Pooled features float32 `[N, F]`, the classifier's input; arguments as in `logits`.

        >>> model.features(np.full((2, model.size, model.size, 3), -1000, np.int16)).shape[0]
        2
        """
        return self._apply(images, batch_size)[1]

    def _apply(self, images: Images, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        if self.run.model.takes_box:
            raise InputError(
                f"{self.run.model_name} needs a lesion's box in addition to the image: use `maknet "
                "retrieve` and `maknet evaluate`"
            )
        batch_size = sharding.round_up_to_devices(batch_size, self.run.mesh.size)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self._batches(images, batch_size):
            rows = np.zeros((batch_size, *batch.shape[1:]), np.int16)
            rows[: len(batch)] = batch
            logits, pooled = self.run.score_with_features({"image": rows})
            parts.append((np.asarray(logits)[: len(batch)], np.asarray(pooled)[: len(batch)]))
        return np.concatenate([part[0] for part in parts]), np.concatenate([p[1] for p in parts])

    def _predicted(self, images: Images) -> "np.ndarray | Prediction":
        """The prediction of files and folders; arrays and predictions as they are."""
        if not search.is_path(images):
            return cast("np.ndarray | Prediction", images)
        result = self.predict(images)
        if result.failures:
            file, reason = result.failures[0]
            console.Log().say(f"rejected: {len(result.failures)} inputs; {file}: {reason}")
        return result

    def _batches(self, images: Images, batch_size: int) -> Iterator[np.ndarray]:
        """Yields int16 `[at most batch_size, S, S, 3]`."""
        images = self._predicted(images)
        if isinstance(images, Prediction):
            for series in images.series:
                rest = series.images(range(len(series)), self.size)
                while batch := list(itertools.islice(rest, batch_size)):
                    yield np.stack(batch)
            return
        images = self._checked(images)
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]

    def _checked(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        shape = (self.size, self.size, 3)
        if images.ndim != 4 or images.shape[1:] != shape or not len(images):
            raise InputError(
                f"images of shape {images.shape} should be [N, {self.size}, {self.size}, 3], three "
                "slices as channels: for a whole CT call model.predict(hu, affine=...) first"
            )
        if images.dtype.kind not in "iu" or images.min() < -32768 or images.max() > 32767:
            raise InputError(f"images of dtype {images.dtype} should be int16 HU, before windowing")
        return images.astype(np.int16)

    @functools.cached_property
    def _network(self) -> Network:
        return make_network(self.run, network_name(self.run))

    def attribute(
        self,
        images: Images,
        labels: Sequence[str] | None = None,
        *,
        top: int = 5,
        limit: int | None = None,
        **path: Any,
    ) -> Explanation:
        """Integrated Gradients of labels.

        Args:
          images: int16 HU `[B, S, S, 3]`; or a prediction, or files and folders as in `predict`, of
            which the slice with the highest confidence for each label is explained (without
            `labels`, the most confident slice).
          labels: explain these; None explains the `top` most confident labels of each image.
          top: number of labels if `labels` is None.
          limit: the number of slices to explain instead, those of different series first, as in
            `maknet attribute --limit`; see `explain.ranking.best_slices`.
          **path: fields of `explain.options.PathOptions`: steps, method, baseline, output, refine,
            batch_size.

        Raises:
          InputError: a label or an option is unknown.
        """
        try:
            options = PathOptions(**path)
        except TypeError:
            known = ", ".join(field.name for field in dataclasses.fields(PathOptions))
            raise InputError(f"options {', '.join(path)}: choose from {known}") from None
        ig.check(options.method, options.steps, options.refinements, options.output)
        columns = label_columns(self.run, labels)
        hu, ids, flags = self._chosen(self._predicted(images), columns, limit)
        network, devices = self._network, self.run.mesh.size
        batch_size = sharding.round_up_to_devices(options.batch_size or devices, devices)
        labelled: list[tuple[str, ...]] = []
        parts: list[ig.Attribution] = []
        with console.progress("attribute", len(hu)) as advance:
            advance(0, note="compiling")
            for start in range(0, len(hu), batch_size):
                rows = hu[start : start + batch_size]
                batch = np.concatenate([rows, rows[-1:].repeat(batch_size - len(rows), axis=0)])
                base = np.stack(
                    [perturbation.make_baseline(one, options.baseline) for one in batch]
                )
                put, black = network.put(batch), network.put(base)
                targets = np.argsort(-network.confidences(put), axis=1, kind="stable")[:, :top]
                if columns:
                    targets = np.tile(np.asarray(columns, np.int64), (batch_size, 1))
                parts.append(network.attribute(put, targets, black, options))
                labelled += [tuple(self.labels[k] for k in row) for row in targets[: len(rows)]]
                advance(len(rows), note="")
        names = ("maps", "relative", "flagged", "start", "end")
        fields = {n: np.concatenate([getattr(p, n) for p in parts])[: len(hu)] for n in names}
        return Explanation(images=hu, ids=ids, labels=tuple(labelled), flags=flags, **fields)

    def _chosen(
        self, images: "np.ndarray | Prediction", columns: Sequence[int], limit: int | None
    ) -> tuple[np.ndarray, tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """(int16 HU `[B, S, S, 3]`, ids, flags) of the images that are explained."""
        if not isinstance(images, Prediction):
            hu = self._checked(images)[:limit]
            flags = scoring.network_flags(self.run)
            return hu, tuple(str(row) for row in range(len(hu))), (flags,) * len(hu)
        scores, reached = label_scores(images.confidences, self.thresholds, columns)
        groups = [
            group_of(f"{series.id}:{number}", {"series": series.id})
            for series in images.series
            for number in range(len(series))
        ]
        chosen = best_slices(scores, reached, groups, limit)
        triplets: list[np.ndarray] = []
        ids: list[str] = []
        doubts: list[tuple[str, ...]] = []
        first = 0  # the number of the series' first slice among all
        for series in images.series:
            numbers = [number - first for number in chosen if 0 <= number - first < len(series)]
            if numbers:
                triplets += series.images(numbers, self.size)
                ids += [f"{series.id}:{number}" for number in numbers]
                doubts += map(series.flags_of, numbers)
            first += len(series)
        return np.stack(triplets), tuple(ids), tuple(doubts)


def load(
    source: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    devices: Sequence[jax.Device] | None = None,
) -> Model:
    """Opens a trained network.

    >>> model = load("runs/teacher")
    >>> model.size, len(model.labels) == len(model.thresholds)
    (32, True)

    Args:
      source: a workdir of `maknet train`, a bundle (folder or .zip) of `maknet export`, or the name
        of a released model.
      checkpoint: "best" or "last" of a workdir.
      devices: the devices to compute on; None takes those of this process.

    Raises:
      InputError: `source` is none of these, or is damaged.
    """
    devices = devices or jax.local_devices()
    return Model(workdir.open_run(source, checkpoint_name=checkpoint, devices=devices))
