"""`maknet pseudo-label`: a teacher labels images that nobody labelled (paper, section 4.2)."""

import pathlib

import jax
import numpy as np

from maknet_jax import console, files
from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.errors import InputError
from maknet_jax.figures import charts
from maknet_jax.runs import workdir
from maknet_jax.runs.claim import claim
from maknet_jax.training import sharding, transfer

# May change on resume: a moved teacher or data set keeps its digest or fingerprint.
MAY_CHANGE = ("teacher", "records")
# Thresholds of the sweep: what each of them would keep is counted beside the one that was used.
SWEEP = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))


def pseudo_label(
    folder,
    data,
    out,
    *,
    split="unlabelled",
    top=15,
    threshold=0.5,
    soft=False,
    checkpoint="best",
    batch_size=None,
    truth=False,
    devices=None,
):
    """Labels the images of a prepared data set; resumable, shard by shard.

    Noise is off. Every process labels its own shards on its own devices, so that hosts never wait
    for each other; the last one to finish is waited for. The bytes of the label shards are the same
    for one kind of device and one batch a device; elsewhere confidences differ in the last digits
    of the precision that the teacher computes in, and labels only of images that are counted as
    `close`.

    Args:
      folder: the workdir of the teacher.
      data: the prepared data set with the images.
      out: the folder to write; see `data/pseudo_labels.py`.
      split: of the data set.
      top: labels an image at most.
      threshold: what a confidence must exceed.
      soft: students learn the confidences of the kept labels instead of 1.
      checkpoint: "best" or "last" of the teacher.
      batch_size: images a step of this process; None takes the teacher's, over its devices.
      truth: the split has labels: they are held back and the pseudo-labels are judged by them.
      devices: of this process; None takes all of them.

    Returns:
      The content of `pseudo.json`.

    Raises:
      InputError: the images do not fit the teacher, or `out` holds labels of another teacher or
        rule.
    """
    out, devices = pathlib.Path(out), devices or jax.local_devices()
    check_rule(top, threshold)
    run = workdir.open_run(folder, checkpoint_name=checkpoint, devices=devices)
    dataset = records.open_dataset(data)
    if dataset.size != run.size:
        raise InputError(
            f"{dataset.path} was prepared with --size {dataset.size}, the teacher with {run.size}"
        )
    if not dataset.split(split)["count"]:
        raise InputError(f"split {split!r} of {dataset.path} is empty")
    if truth and dataset.vocabulary.names != run.vocabulary.names:
        raise InputError(f"{dataset.path} has other labels than {folder}: no truth to judge by")
    given = jax.tree.map(np.asarray, run.variables)
    about = {
        "format": pseudo_labels.FORMAT,
        "teacher": str(pathlib.Path(folder).absolute()),
        "teacher_digest": transfer.digest(given["params"], given.get("batch_stats", {})),
        "teacher_step": run.step,
        "records": str(dataset.path.absolute()),
        "fingerprint": dataset.fingerprint,
        "split": split,
        "top": top,
        "threshold": threshold,
        "soft": soft,
        "truth": truth,
        "labels": list(run.vocabulary.names),
    }
    main = jax.process_index() == 0
    claim(
        out,
        {"claim.json": about},
        command="maknet pseudo-label",
        option="--out",
        may_change=MAY_CHANGE,
    )
    shards = dataset.split(split)["shards"]
    firsts = np.concatenate([[0], np.cumsum([shard["count"] for shard in shards])])
    mine = range(jax.process_index(), len(shards), jax.process_count())
    todo = [number for number in mine if not _is_made(out, shards[number])]
    total = sum(shards[number]["count"] for number in todo)
    batch = sharding.round_up_to_devices(batch_size or run.batch_size, len(devices))
    close = pseudo_labels.CLOSE[np.dtype(run.model.dtype).name]
    tallies = _Tally(run.vocabulary, top=top, threshold=threshold, truth=truth, close=close)
    with console.Log(out / "log.jsonl" if main else None) as log:
        if len(todo) < len(mine):
            log.say(f"{len(mine) - len(todo)} of {len(mine)} shards are labelled already")
        with console.progress("pseudo-label", total) as advance:
            finished = _confidences(run, dataset, shards, todo, batch, advance)
            for number, confidences, labels, mask in finished:
                rows, counted = tallies.judge(firsts[number], confidences, labels, mask)
                name = _shard_name(shards[number])
                counted["sha256"] = pseudo_labels.write_rows(out / name, rows)
                files.write_json(out / _made(shards[number]), counted)  # the shard counts from here
        sharding.wait_for_all("pseudo-labelled")
        if main:
            about |= _sum([files.read_json(out / _made(shard)) for shard in shards], shards)
            _show(out, about, log)
            files.write_json(out / "pseudo.json", about)
            log.say(
                f"{about['kept']:,} of {about['images']:,} images kept "
                f"{about['labels_given']:,} labels, {about['dropped']:,} kept none; "
                f"{about['close']:,} would choose others if scores changed by {tallies.close}",
                event="pseudo-labelled",
            )
        sharding.wait_for_all("summed up")
    return files.read_json(out / "pseudo.json")


def check_rule(top, threshold):
    """Raises InputError where no labels can be chosen so."""
    if top < 1:
        raise InputError(f"top {top} should be 1 or above: so many labels an image at most")
    if not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold} should be 0 or above and below 1")


def _shard_name(shard):
    return pathlib.Path(shard["file"]).stem + ".npy"


def _made(shard):
    return pathlib.Path("made") / (pathlib.Path(shard["file"]).stem + ".json")


def _is_made(out, shard):
    if not (out / _made(shard)).exists():
        return False
    try:
        pseudo_labels.read_rows(
            out / _shard_name(shard), files.read_json(out / _made(shard))["sha256"]
        )
    except InputError:  # the counts are there, their labels were lost or damaged since
        return False
    return True


def _confidences(run, dataset, shards, todo, batch_size, advance):
    """Yields (shard number, confidences, labels, mask); one step is always in flight."""
    if not todo:
        return
    paths = [dataset.path / shards[number]["file"] for number in todo]
    reader = pipeline.ordered_batches(
        records.RecordSource(paths),
        batch_size=batch_size,
        threads=run.threads,
    )
    queue, buffers = list(todo), ([], [], [])

    def collect(batch, logits):
        real = batch["weight"] > 0
        logits = np.asarray(logits)[real].astype(np.float64)
        confidences = (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
        for buffer, rows in zip(
            buffers, (confidences, batch["labels"][real], batch["label_mask"][real]), strict=True
        ):
            buffer.append(rows)
        advance(int(real.sum()))
        while queue and sum(map(len, buffers[0])) >= shards[queue[0]]["count"]:
            count = shards[queue[0]]["count"]
            whole = [np.concatenate(buffer) for buffer in buffers]
            for buffer, rows in zip(buffers, whole, strict=True):
                buffer[:] = [rows[count:]]
            yield (queue.pop(0), *(rows[:count] for rows in whole))

    waiting = None
    for batch in reader:
        started = batch, run.score(batch)
        if waiting is not None:
            yield from collect(*waiting)
        waiting = started
    yield from collect(*waiting)


class _Tally:
    """Chooses the labels of a shard and counts what pseudo.json says of it."""

    def __init__(self, vocabulary, *, top, threshold, truth, close):
        self.exclusive, self.size, self.close = vocabulary.exclusive, len(vocabulary), close
        self.top, self.threshold, self.truth = top, threshold, truth

    def judge(self, first, confidences, labels, mask):
        """(rows, counts) of a shard whose first record has the number `first`."""
        choose = pseudo_labels.select
        rule = {"top": self.top, "threshold": self.threshold, "close": self.close}
        columns, close = choose(confidences, self.exclusive, **rule)
        numbers = np.arange(first, first + len(confidences))
        rows = pseudo_labels.rows_of(numbers, columns, confidences, top=self.top)
        given = rows["labels"][rows["labels"] >= 0]
        counts = {
            "images": len(confidences),
            "kept": len(rows),
            "close": int(close.sum()),
            "label_counts": np.bincount(given, minlength=self.size).tolist(),
            "confidences": np.histogram(
                rows["confidences"][rows["labels"] >= 0], bins=20, range=(0, 1)
            )[0].tolist(),
            "sweep": [],
        }
        for threshold in SWEEP:
            found, _ = choose(confidences, self.exclusive, top=self.top, threshold=threshold)
            entry = {
                "threshold": threshold,
                "images": int((found >= 0).any(axis=1).sum()),
                "labels": int((found >= 0).sum()),
            }
            if self.truth:
                entry |= self._right(found, labels, mask)
            counts["sweep"].append(entry)
        if self.truth:
            counts["judged"] = self._right(columns, labels, mask)
        return rows, counts

    def _right(self, columns, labels, mask):
        """Known labels among those given, of these the right ones, and the true ones of all."""
        given = np.zeros(labels.shape, bool)
        row, place = np.nonzero(columns >= 0)
        given[row, columns[row, place]] = True
        known = mask > 0
        return {
            "given": int((given & known).sum()),
            "right": int((given & known & (labels > 0)).sum()),
            "true": int((known & (labels > 0)).sum()),
        }


def _sum(parts, shards):
    """The counts of all shards as those of the whole."""
    about = {name: sum(part[name] for part in parts) for name in ("images", "kept", "close")}
    about["dropped"] = about["images"] - about["kept"]
    for name in ("label_counts", "confidences"):
        about[name] = np.sum([part[name] for part in parts], axis=0).tolist()
    about["labels_given"] = sum(about["label_counts"])
    about["sweep"] = [
        entries[0] | {key: sum(e[key] for e in entries) for key in entries[0] if key != "threshold"}
        for entries in zip(*(part["sweep"] for part in parts), strict=True)
    ]
    if "judged" in parts[0]:
        judged = {key: sum(part["judged"][key] for part in parts) for key in parts[0]["judged"]}
        about["judged"] = judged | {
            "precision": judged["right"] / judged["given"] if judged["given"] else None,
            "recall": judged["right"] / judged["true"] if judged["true"] else None,
        }
    about["shards"] = [
        {"file": _shard_name(shard), "images": shard["count"], "sha256": part["sha256"]}
        for shard, part in zip(shards, parts, strict=True)
    ]
    return about


def _show(out, about, log):
    rows = sorted(zip(about["label_counts"], about["labels"], strict=True), reverse=True)
    console.write_table(out / "counts.csv", ("label", "images"), [row[::-1] for row in rows])
    names = list(about["sweep"][0])
    sweep = [[entry[name] for name in names] for entry in about["sweep"]]
    console.write_table(out / "sweep.csv", names, sweep)
    charts.write_histograms(out / "histogram.png", rows, about["confidences"])
    if "judged" in about and about["judged"]["given"]:
        judged = about["judged"]
        log.say(
            f"against the labels that were held back: {judged['right']:,} of {judged['given']:,} "
            f"right (precision {judged['precision']:.3f}, recall {judged['recall'] or 0:.3f})"
        )
