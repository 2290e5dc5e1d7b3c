"""`maknet predict`: any folder of CT -> body parts per slice and per series."""

import functools
import pathlib

import numpy as np

from maknet_jax import console, files
from maknet_jax.ct import preprocess, search, volumes
from maknet_jax.ct.read_ahead import read_ahead
from maknet_jax.errors import InputError, Rejected
from maknet_jax.evaluation import metrics, protocol
from maknet_jax.figures.charts import write_label_chart
from maknet_jax.runs import workdir
from maknet_jax.training import sharding

SLICE_COLUMNS = ("series", "slice", "file", "labels", "confidences", "thresholds")
SERIES_COLUMNS = ("series", "label", "first_slice", "last_slice", "slices", "mean_confidence")


def predict(
    folder,
    path,
    out,
    *,
    png_window=None,
    checkpoint="best",
    batch_size=16,
    as_json=False,
    charts=False,
):
    """Labels every slice of every CT series under `path`.

    Each slice is the middle of a triplet with its neighbours; at the ends the edge is repeated.
    Labels are those whose confidence reaches their threshold (chosen in training), and their
    parents, the most confident first.

    Args:
      folder: the workdir of `maknet train`.
      path: a file or a folder of DICOM, NIfTI or PNG.
      out: the CSV of slices; `STEM.series.csv`, `STEM.summary.json`, `STEM.log.jsonl` and, where
        inputs could not be read, `STEM.failures.csv` stand beside it. One slice that cannot be read
        takes its series with it: its neighbours would not be neighbours.
      png_window: (low, high) HU of 8-bit PNGs.
      checkpoint: "best" or "last".
      batch_size: slices a step.
      as_json: write `STEM.json` with all confidences too.
      charts: draw `STEM.NNN.png` for each series: its labels from head to feet.

    Returns:
      The summary: counts, files, and the series with what they cover.

    Raises:
      InputError: nothing could be labelled.
    """
    out = pathlib.Path(out)
    if out.suffix != ".csv" or out.is_dir():
        raise InputError(f"--out {out} should be a file that ends in .csv: others take its stem")
    found, failures = search.find_series(path)
    if not found:
        reason = f": {failures[0][0]}: {failures[0][1]}" if failures else ""
        raise InputError(f"no series in {path} can be read (DICOM, NIfTI or PNG){reason}")
    run = workdir.open_run(folder, checkpoint_name=checkpoint)
    slices, covers, full, pictures, done = [], [], [], [], 0
    load = functools.partial(volumes.load_series, png_window=png_window)
    with console.progress("predict", sum(ref.count for ref in found)) as advance:
        for ref, content in read_ahead(load, found):
            try:
                volume = content.result()
            except Rejected as error:
                failures.append((ref.paths[0], str(error)))
                continue
            scores = score_volume(run, volume, batch_size, png_window, advance)
            chosen = choose(run, scores)
            slices += _slice_rows(run, volume, scores, chosen)
            covers += _cover(run, volume, scores, chosen)
            if charts and len(scores) > 2:  # along fewer slices there is nothing to see
                pictures.append(out.with_suffix(f".{done:03d}.png"))
                title = f"{volume.series}: {pathlib.Path(folder).name}, step {run.step}"
                write_label_chart(pictures[-1], scores, chosen, run.vocabulary.names, title=title)
            done += 1
            if as_json:
                confidences = np.round(scores, 4).tolist()
                names = {"series": volume.series, "slices": list(volume.slices)}
                full.append(names | {"confidences": confidences})
    if not slices:
        raise InputError(f"no series in {path} could be read: {failures[0][1]}")
    console.write_table(out, SLICE_COLUMNS, slices)
    console.write_table(out.with_suffix(".series.csv"), SERIES_COLUMNS, covers)
    written = [out, out.with_suffix(".series.csv"), *pictures]
    if as_json:
        about = {"labels": run.vocabulary.names, "thresholds": run.thresholds.tolist()}
        files.write_json(out.with_suffix(".json"), {**about, "series": full})
        written.append(out.with_suffix(".json"))
    failures_file = out.with_suffix(".failures.csv")
    console.write_failures(failures_file, failures)
    summary = {
        "workdir": str(folder),
        "checkpoint": run.name,
        "step": run.step,
        "series": done,
        "slices": len(slices),
        "failures": len(failures),
        "failures_file": str(failures_file) if failures else None,
        "files": [str(file) for file in written],
        "covers": [dict(zip(SERIES_COLUMNS, row, strict=True)) for row in covers],
    }
    files.write_json(out.with_suffix(".summary.json"), summary)
    with console.Log(out.with_suffix(".log.jsonl")) as log:
        log.event(event="predicted", **{k: v for k, v in summary.items() if k != "covers"})
    return summary


def score_volume(run, volume, batch_size=16, png_window=None, advance=lambda count: None):
    """Confidences of all slices of a volume: float32 `[Z, K]`.

    Args:
      run: a `workdir.Run`.
      volume: a `volumes.Volume`.
      batch_size: slices a step; rounded up to the devices.
      png_window: (low, high) in HU of 8-bit pictures.
      advance: advance(count) after each batch.
    """
    size = run.size
    threshold = preprocess.body_threshold(volume.hu, png_window)
    batch_size = sharding.round_up_to_devices(batch_size)
    scores = []
    for start in range(0, len(volume.hu), batch_size):
        centres = range(start, min(start + batch_size, len(volume.hu)))
        images = np.zeros((batch_size, size, size, 3), np.int16)
        for row, centre in enumerate(centres):
            around = preprocess.neighbours(volume.hu, centre)
            images[row], _ = preprocess.make_triplet(around, size, threshold=threshold)
        logits = run.predict(run.variables, {"image": images})["logits"][: len(centres)]
        scores.append(metrics.sigmoid(logits))
        advance(len(centres))
    return np.concatenate(scores)


def choose(run, scores):
    """Which labels are given: bool `[Z, K]`, at their thresholds and with their parents."""
    predicted = protocol.predict(scores, run.thresholds)
    return protocol.add_parents(predicted, run.vocabulary.parents)


def _slice_rows(run, volume, scores, chosen):
    names = run.vocabulary.names
    for number, name in enumerate(volume.slices):
        given = sorted(np.flatnonzero(chosen[number]), key=lambda k: -scores[number, k])
        yield (
            volume.series,
            number,
            name,
            "|".join(names[k] for k in given),
            "|".join(f"{scores[number, k]:.3f}" for k in given),
            "|".join(f"{run.thresholds[k]:.1f}" for k in given),
        )


def _cover(run, volume, scores, chosen):
    """For each label of a series: the slices between which it lies, from the head on."""
    rows = []
    for column, name in enumerate(run.vocabulary.names):
        at = np.flatnonzero(chosen[:, column])
        if len(at):
            mean = float(scores[at, column].mean())
            rows.append((volume.series, name, int(at[0]), int(at[-1]), len(at), round(mean, 4)))
    return sorted(rows, key=lambda row: (row[2], row[3]))
