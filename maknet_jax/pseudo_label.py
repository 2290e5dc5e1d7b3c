"""`maknet pseudo-label`: a teacher labels unlabelled images (paper, section 4.2).

The paper states the rule (the 15 most confident labels, confidence above 0.5, exclusive relations).
It does not specify two details, which are our choice: images without any pseudo-label are dropped,
and the teacher is the checkpoint with the best validation AUC.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from maknet_jax import console, files
from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.data.pseudo_label_rule import Rule, add_up
from maknet_jax.errors import InputError
from maknet_jax.evaluation import metrics
from maknet_jax.figures import charts
from maknet_jax.runs import workdir
from maknet_jax.runs.claim import claim, raise_any
from maknet_jax.training import sharding, transfer

# May change on resume: a moved teacher or data set keeps its digest or fingerprint.
MAY_CHANGE = ("teacher", "records")
_THRESHOLDS = "thresholds.json"  # label -> threshold, with `precision`
T = TypeVar("T")


def pseudo_label(
    folder: pathlib.Path | str,
    data: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    split: str = "unlabelled",
    top: int = 15,
    threshold: float = 0.5,
    precision: float | None = None,
    soft: bool = False,
    checkpoint: str = "best",
    batch_size: int | None = None,
    truth: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> dict:
    """Labels the images of a prepared data set; resumes shard by shard if interrupted.

    Noise is off. Every process labels its own shards on its own devices; processes wait for each
    other only at the end. With the same kind of device and batch size per device, the label shards
    are reproduced bit for bit. Otherwise confidences differ in the last digits of the teacher's
    precision, and labels can differ only for images that are counted as `close`.

    Args:
      folder: the workdir of the teacher, a bundle or a released name.
      data: the prepared data set with the images.
      out: the folder to write; see `data/pseudo_labels.py`.
      split: the split of the data set.
      top: maximum number of labels per image.
      threshold: a label's confidence must exceed it.
      precision: choose a threshold per label: the lowest with this precision on the teacher's
        validation images, see `pseudo_labels.thresholds_for_precision`; they are stored in
        `thresholds.json`. `threshold` then applies to labels that no validation image has.
      soft: students learn the confidences of the selected labels instead of 1.
      checkpoint: "best" or "last" of the teacher.
      batch_size: images per step of this process, rounded up to its devices; None takes the
        teacher's.
      truth: the split has labels; they are hidden from students and compared with the
        pseudo-labels.
      devices: the devices of this process; None takes all of them.

    Returns:
      The content of `pseudo.json`.

    Raises:
      InputError: the images have another size than the teacher's, `out` holds labels of another
        teacher or rule, or `precision` is given and the teacher's validation images are not there.
    """
    out, devices = pathlib.Path(out), devices or jax.local_devices()
    check_rule(top, threshold, precision)
    run = workdir.open_run(folder, checkpoint_name=checkpoint, devices=devices)
    dataset = records.open_dataset(data)
    records.check_size(dataset, run.size, "the teacher")
    if not dataset.split(split)["count"]:
        raise InputError(f"split {split!r} of {dataset.path} is empty: choose another split")
    if truth and dataset.vocabulary.names != run.vocabulary.names:
        raise InputError(
            f"{dataset.path} has other labels than {folder}: omit --truth, or choose data with "
            "the labels of the teacher"
        )
    weights = jax.tree.map(np.asarray, run.variables)
    result = {
        "format": pseudo_labels.FORMAT,
        "teacher": run.address,
        "teacher_digest": transfer.digest(weights["params"], weights.get("batch_stats", {})),
        "teacher_step": run.step,
        "records": dataset.address,
        "fingerprint": dataset.fingerprint,
        "split": split,
        "top": top,
        "threshold": threshold,
        "precision": precision,
        "soft": soft,
        "truth": truth,
        "labels": list(run.vocabulary.names),
    }
    main = jax.process_index() == 0
    if precision is not None and not (out / _THRESHOLDS).is_file():
        _validation_images(run)  # before anything is written
    with claim(
        out,
        {"claim.json": result},
        command="maknet pseudo-label",
        option="--out",
        may_change=MAY_CHANGE,
    ):
        shards = dataset.split(split)["shards"]
        firsts = np.concatenate([[0], np.cumsum([shard["count"] for shard in shards])])
        mine = range(jax.process_index(), len(shards), jax.process_count())
        todo = [number for number in mine if not _is_done(out, shards[number])]
        total = sum(shards[number]["count"] for number in todo)
        batch = sharding.round_up_to_devices(batch_size or run.batch_size, len(devices))
        close = pseudo_labels.CLOSE[np.dtype(run.model.dtype).name]
        with console.Log(out / "log.jsonl" if main else None) as log:
            limits: float | np.ndarray = threshold
            if precision is not None:
                if not sharding.exchange((out / _THRESHOLDS).is_file())[0]:
                    _write_thresholds(run, out, precision, threshold, batch)
                limits = _read_thresholds(out, run.vocabulary.names, precision, log)
            rule = Rule(run.vocabulary, top=top, threshold=limits, close=close, truth=truth)
            if len(todo) < len(mine):
                log.say(
                    f"resuming: {len(mine) - len(todo)} of {len(mine)} shards are already labelled"
                )
            with console.progress("pseudo-label", total) as advance:
                scored = _confidences(run, dataset, shards, todo, batch, advance)
                for number, confidences, labels, mask in scored:
                    rows, counts = rule.apply(firsts[number], confidences, labels, mask)
                    name = _shard_name(shards[number])
                    counts["sha256"] = pseudo_labels.write_rows(out / name, rows)
                    # A shard is done once its counts are written.
                    files.write_json(out / _counts_name(shards[number]), counts)
            sharding.wait_for_all("pseudo-labelled")
            if main:
                parts = [files.read_json(out / _counts_name(shard)) for shard in shards]
                result |= add_up(parts)
                result["shards"] = [
                    {"file": _shard_name(shard), "images": shard["count"], "sha256": part["sha256"]}
                    for shard, part in zip(shards, parts, strict=True)
                ]
                _write_tables(out, result, log)
                files.write_json(out / "pseudo.json", result)
                log.say(
                    f"{result['kept']:,} of {result['images']:,} images have "
                    f"{result['labels_given']:,} pseudo-labels; {result['dropped']:,} images "
                    f"without any are dropped; the labels of {result['close']:,} images would "
                    f"change if confidences changed by {close}",
                    event="pseudo-labelled",
                )
            sharding.wait_for_all("summed up")
    return files.read_json(out / "pseudo.json")


def check_rule(top: int, threshold: float, precision: float | None = None) -> None:
    """Checks the rule that selects pseudo-labels.

    Raises:
      InputError: no label can be selected with these values.
    """
    if top < 1:
        raise InputError(f"top {top}, the maximum number of labels per image, should be at least 1")
    if not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold} should be 0 or above and below 1")
    if precision is not None and not 0 < precision <= 1:
        raise InputError(f"precision {precision} should be above 0 and at most 1")


def _validation_images(run: workdir.Run) -> records.Dataset:
    """The data set with the teacher's validation split, from which thresholds are chosen.

    Raises:
      InputError: the teacher is a bundle, or the images have changed or have no such split.
    """
    if run.is_bundle:
        raise InputError(
            f"{run.source} is a bundle, without validation images to estimate a precision on: "
            "take the workdir of the teacher, or choose a threshold instead"
        )
    dataset = records.open_dataset(run.data_path)
    if dataset.fingerprint != run.dataset.get("fingerprint"):
        raise InputError(
            f"{dataset.path} is not the data of the teacher, on whose split {run.val_split!r} a "
            "precision is estimated: restore it, or choose a threshold instead"
        )
    if not dataset.split(run.val_split)["count"]:
        raise InputError(
            f"split {run.val_split!r} of {dataset.path} is empty, so that no precision can be "
            "estimated: choose a threshold instead"
        )
    return dataset


def _write_thresholds(
    run: workdir.Run, out: pathlib.Path, precision: float, default: float, batch_size: int
) -> None:
    """Chooses the thresholds per label; the first process writes `thresholds.json`.

    Args:
      run: the teacher.
      out: the output folder.
      precision: see `pseudo_label`.
      default: see `pseudo_labels.thresholds_for_precision`.
      batch_size: images per step.

    Raises:
      InputError: on all processes: a record is damaged.
    """
    problem = ""
    if jax.process_index() == 0:
        try:
            dataset = _validation_images(run)
            shards = dataset.split(run.val_split)["shards"]
            with console.progress("thresholds", sum(shard["count"] for shard in shards)) as advance:
                scored = _confidences(run, dataset, shards, range(len(shards)), batch_size, advance)
                columns = zip(*(arrays for _, *arrays in scored), strict=True)
                confidences, labels, mask = map(np.concatenate, columns)
        except InputError as error:
            problem = str(error)
        else:
            chosen = pseudo_labels.thresholds_for_precision(
                confidences, labels, mask > 0, precision=precision, default=default
            )
            named = dict(zip(run.vocabulary.names, chosen.tolist(), strict=True))
            files.write_json(out / _THRESHOLDS, named)
    raise_any(problem)


def _read_thresholds(
    out: pathlib.Path, names: Sequence[str], precision: float, log: console.Log
) -> np.ndarray:
    """The thresholds in `thresholds.json`, float32 `[K]`.

    Raises:
      InputError: it is damaged.
    """
    path = out / _THRESHOLDS
    try:
        stored = files.read_json(path)
        limits = [float(stored[name]) for name in names]
    except (KeyError, TypeError, ValueError, OSError):
        raise InputError(f"{path} is damaged: choose another --out and start again") from None
    never = [name for name, limit in zip(names, limits, strict=True) if limit == 1]
    log.say(
        f"thresholds for a precision of {precision:g}: {min(limits):.3f} to {max(limits):.3f}"
        + (f"; never given: {', '.join(never)}" if never else "")
    )
    return np.array(limits, np.float32)


def _shard_name(shard: dict) -> str:
    return pathlib.Path(shard["file"]).stem + ".npy"


def _counts_name(shard: dict) -> pathlib.Path:
    return pathlib.Path("made") / (pathlib.Path(shard["file"]).stem + ".json")


def _is_done(out: pathlib.Path, shard: dict) -> bool:
    if not (out / _counts_name(shard)).exists():
        return False
    try:
        digest = files.read_json(out / _counts_name(shard))["sha256"]
        pseudo_labels.read_rows(out / _shard_name(shard), digest)
    except (InputError, KeyError, TypeError):  # deleted or damaged after the counts were written
        return False
    return True


def _confidences(
    run: workdir.Run,
    dataset: records.Dataset,
    shards: Sequence[dict],
    todo: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Scores whole shards with noise off; each step runs while the previous one is collected.

    Yields:
      (shard number, confidences, labels, label mask), the arrays `[images of the shard, K]`; labels
      and mask are empty where the data set has none.
    """
    if not todo:
        return
    reader = pipeline.ordered_batches(
        dataset.shards([shards[number] for number in todo]),
        batch_size=batch_size,
        threads=run.threads,
    )
    remaining = list(todo)
    rows: list[np.ndarray] = []
    for batch, logits in _one_ahead((batch, run.score(batch)) for batch in reader):
        real = batch["weight"] > 0
        new = [metrics.sigmoid(np.asarray(logits)), batch["labels"], batch["label_mask"]]
        new = [column[real] for column in new]
        rows = [np.concatenate(pair) for pair in zip(rows, new, strict=True)] if rows else new
        advance(int(real.sum()))
        while remaining and len(rows[0]) >= shards[remaining[0]]["count"]:
            number = remaining.pop(0)
            count = shards[number]["count"]
            confidences, labels, mask = (column[:count] for column in rows)
            rows = [column[count:] for column in rows]
            yield number, confidences, labels, mask


def _one_ahead(started: Iterable[T]) -> Iterator[T]:
    """Yields each item after drawing the next one, so that its computation is already running."""
    items = iter(started)
    for current in items:
        for following in items:
            yield current
            current = following
        yield current


def _write_tables(out: pathlib.Path, result: dict, log: console.Log) -> None:
    """Writes counts.csv, sweep.csv and histogram.png, and logs the agreement with the truth."""
    rows = sorted(zip(result["label_counts"], result["labels"], strict=True), reverse=True)
    console.write_table(out / "counts.csv", ("label", "images"), [row[::-1] for row in rows])
    names = list(result["sweep"][0])
    sweep = [[entry[name] for name in names] for entry in result["sweep"]]
    console.write_table(out / "sweep.csv", names, sweep)
    charts.write_histograms(out / "histogram.png", rows, result["confidences"])
    if "judged" in result and result["judged"]["given"]:
        judged = result["judged"]
        log.say(
            f"compared with the true labels: {judged['right']:,} of {judged['given']:,} "
            f"pseudo-labels are correct (precision {judged['precision']:.3f}, recall "
            f"{judged['recall'] or 0:.3f})"
        )
