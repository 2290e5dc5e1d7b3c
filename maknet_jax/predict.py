"""`maknet predict`: any folder of CT -> body parts per slice and per series."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from maknet_jax import console, files
from maknet_jax.ct import preprocess, search, volumes
from maknet_jax.errors import InputError
from maknet_jax.evaluation import metrics
from maknet_jax.evaluation.series import SeriesResult
from maknet_jax.figures.charts import write_label_chart
from maknet_jax.runs import workdir
from maknet_jax.training import sharding

SLICE_COLUMNS = ("series", "slice", "file", "labels", "confidences", "thresholds")
SERIES_COLUMNS = ("series", "label", "first_slice", "last_slice", "slices", "mean_confidence")
MIN_CHART_SLICES = 3  # a chart of a shorter series shows nothing


def predict(
    folder: str | pathlib.Path,
    path: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    png_window: tuple[float, float] | None = None,
    checkpoint: str = "best",
    batch_size: int = 16,
    as_json: bool = False,
    charts: bool = False,
    features: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Predicts the labels of every slice of every CT series under `path`.

    Each slice is the middle of a triplet with its neighbours; at the ends the edge slice is
    repeated. A label is predicted if its confidence reaches its threshold (chosen in training) or
    if it is a parent of a predicted label. Labels are listed by decreasing confidence.

    Args:
      folder: the workdir of `maknet train`, a bundle or a released name.
      path: a file or a folder of DICOM, NIfTI or PNG.
      out: the CSV of slices. `STEM.series.csv`, `STEM.summary.json` and `STEM.log.jsonl` are
        written beside it, and `STEM.failures.csv` if inputs were rejected. One unreadable slice
        rejects its whole series.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
      checkpoint: "best" or "last".
      batch_size: slices per step.
      as_json: also write `STEM.json` with all confidences.
      charts: draw `STEM.NNN.png` for each series: its labels from head to feet.
      features: an .npz file for the pooled features of all slices: `features` float32 `[N, F]` and
        `ids`, SERIES:SLICE each.

    Returns:
      The summary: counts, files, and for each series the range of slices of each label.

    Raises:
      InputError: `out` is not a CSV file, or no series could be read.
    """
    out = pathlib.Path(out)
    if out.suffix != ".csv" or out.is_dir():
        raise InputError(f"--out {out} should be a file whose name ends in .csv")
    if features is not None and pathlib.Path(features).suffix != ".npz":
        raise InputError(f"--features {features} should be a file whose name ends in .npz")
    series, failures = search.find_series(path)
    if not series:
        reason = f": {failures[0][0]}: {failures[0][1]}" if failures else ""
        raise InputError(f"{path} holds no readable series of DICOM, NIfTI or PNG{reason}")
    run = workdir.open_run(folder, checkpoint_name=checkpoint)
    slice_rows: list[tuple] = []
    series_rows: list[tuple] = []
    confidences: list[dict[str, Any]] = []
    chart_files: list[pathlib.Path] = []
    feature_rows: list[np.ndarray] = []
    feature_ids: list[str] = []
    series_count = 0
    with console.progress("predict", sum(ref.count for ref in series)) as advance:
        for _, volume in volumes.load_all(series, failures, png_window=png_window):
            result = predict_volume(
                run, volume, batch_size, png_window, advance, features=features is not None
            )
            slice_rows += _slice_rows(result)
            series_rows += _series_rows(result)
            if result.features is not None:
                feature_rows.append(result.features)
                feature_ids += [f"{result.id}:{number}" for number in range(len(result))]
            if charts and len(result) >= MIN_CHART_SLICES:
                chart = out.with_suffix(f".{series_count:03d}.png")
                title = f"{result.id}: {run.source.name}, step {run.step}"
                write_label_chart(
                    chart, result.confidences, result.predicted, result.names, title=title
                )
                chart_files.append(chart)
            series_count += 1
            if as_json:
                names = {"series": result.id, "slices": list(result.slices)}
                rounded = np.round(result.confidences, 4).tolist()
                confidences.append(names | {"confidences": rounded})
    if not slice_rows:
        raise InputError(f"{path} holds no readable series: {failures[0][0]}: {failures[0][1]}")
    console.write_table(out, SLICE_COLUMNS, slice_rows)
    console.write_table(out.with_suffix(".series.csv"), SERIES_COLUMNS, series_rows)
    written = [out, out.with_suffix(".series.csv"), *chart_files]
    if as_json:
        labels = {"labels": run.vocabulary.names, "thresholds": run.thresholds.tolist()}
        files.write_json(out.with_suffix(".json"), labels | {"series": confidences})
        written.append(out.with_suffix(".json"))
    if features is not None:
        with files.write_whole(features, "wb") as file:
            np.savez(file, features=np.concatenate(feature_rows), ids=np.array(feature_ids))
        written.append(pathlib.Path(features))
    failures_file = out.with_suffix(".failures.csv")
    console.write_failures(failures_file, failures)
    summary = {
        "workdir": str(folder),
        "checkpoint": run.name,
        "step": run.step,
        "trained_on": run.trained_on,
        "series": series_count,
        "slices": len(slice_rows),
        "copies": sum(ref.copies for ref in series),
        "failures": len(failures),
        "failures_file": str(failures_file) if failures else None,
        "files": [str(file) for file in written],
        "covers": [dict(zip(SERIES_COLUMNS, row, strict=True)) for row in series_rows],
    }
    files.write_json(out.with_suffix(".summary.json"), summary)
    with console.Log(out.with_suffix(".log.jsonl")) as log:
        log.event(event="predicted", **{k: v for k, v in summary.items() if k != "covers"})
    return summary


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
    confidences, pooled = _score(run, volume, batch_size, png_window, advance, features=features)
    return SeriesResult.of_scores(
        volume,
        run.vocabulary,
        run.thresholds,
        confidences,
        features=pooled,
        read=read or (lambda: volume),
        png_window=png_window,
    )


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
            logits = run.predict(run.variables, {"image": images})["logits"][: len(centres)]
        scores.append(metrics.sigmoid(logits))
        advance(len(centres))
    return np.concatenate(scores), np.concatenate(pooled) if features else None


def _slice_rows(result: SeriesResult) -> Iterator[tuple]:
    """Yields the `SLICE_COLUMNS` of each slice."""
    for number, name in enumerate(result.slices):
        columns = result.columns(number)
        yield (
            result.id,
            number,
            name,
            "|".join(result.labels[number]),
            "|".join(f"{result.confidences[number, k]:.3f}" for k in columns),
            "|".join(f"{result.thresholds[k]:.1f}" for k in columns),
        )


def _series_rows(result: SeriesResult) -> list[tuple]:
    """The `SERIES_COLUMNS` of each predicted label, sorted by its first slice."""
    return [
        (
            result.id,
            cover.label,
            cover.first_slice,
            cover.last_slice,
            cover.slices,
            round(cover.mean_confidence, 4),
        )
        for cover in result.covers
    ]
