"""Writing a prepared data set: planned first, then shard by shard, finished by `dataset.json`.

A run that was stopped goes on with the shards that are missing. Nothing is called finished before
`dataset.json` is there (it comes last, by `finish`), and each shard appears whole or not at all.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import pathlib
import shutil
import signal

import numpy as np

import maknet_jax
from maknet_jax import files
from maknet_jax.ct import preprocess
from maknet_jax.data import records
from maknet_jax.errors import InputError

SHARD_RECORDS = 512  # about 100 MB at 256 x 256
WINDOW = (-1024.0, 3071.0)  # HU; LesaNet's, the default of the configs


@dataclasses.dataclass(frozen=True)
class Made:
    """What one unit of work gave.

    Attributes:
      examples: encoded records with their label vectors.
      failures: (input, reason) pairs.
      counters: what to add up over the run, as {"neighbours repeated": 1}.
    """

    examples: tuple[tuple[bytes, np.ndarray], ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    counters: dict = dataclasses.field(default_factory=dict)


def write_shards(out, splits, make, *, kind, size, vocabulary, about, workers, advance):
    """Writes all splits; returns (content for `finish`, failures).

    Args:
      out: the folder to fill; it may hold an unfinished run of the same plan.
      splits: dict split -> list of units; a unit is a picklable dataclass with `count`, the number
        of records expected of it, and a `repr` that says all about it.
      make: make(unit) -> Made, importable by name (worker processes call it).
      kind: deeplesion, dicom or table.
      size: the edge of the images.
      vocabulary: `labels.Vocabulary`.
      about: JSON to keep in `dataset.json`: how the units were chosen.
      workers: processes; 1 works in this one.
      advance: advance(count) is called after each unit.

    Raises:
      InputError: `out` holds something else, or no unit gave a record.
    """
    out = pathlib.Path(out)
    labels = vocabulary.to_json()
    made_by = (records.FORMAT, preprocess.CROP_RULE, kind, size, labels)
    _claim(out, _digest(*made_by, splits))
    entries, failures, counters = {}, [], collections.Counter()
    with _mapper(workers) as run:
        for split, units in splits.items():
            shards, label_counts = [], np.zeros(len(vocabulary), np.int64)
            parts = _chunks(units)
            for number, part in enumerate(parts):
                name = f"{split}/part-{number:05d}-of-{len(parts):05d}.array_record"
                done = _write_part(out, name, part, make, run, len(vocabulary), advance)
                label_counts += np.asarray(done["label_counts"], np.int64)
                failures.extend(tuple(pair) for pair in done["failures"])
                counters.update(done["counters"])
                if done["count"]:
                    shards.append({"file": name, "count": done["count"], "digest": done["digest"]})
            entries[split] = {
                "count": sum(shard["count"] for shard in shards),
                "label_counts": label_counts.tolist(),
                "shards": shards,
            }
    if not any(entry["count"] for entry in entries.values()):
        shutil.rmtree(out / ".parts")
        for folder in filter(pathlib.Path.is_dir, map(out.joinpath, splits)):
            folder.rmdir()  # empty; the next try finds the folder as this one did
        reason = f"the first one says: {failures[0][1]}" if failures else "there was no input"
        raise InputError(f"no record could be made for {out}: {reason}")
    info = {
        "format": records.FORMAT,
        "kind": kind,
        "size": size,
        "labels": labels,
        "splits": entries,
        "counters": dict(sorted(counters.items())),
        "window": WINDOW,
        "crop": preprocess.CROP_RULE,
        "about": about,
        "versions": {"maknet-jax": maknet_jax.__version__}
        | {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pydicom")},
        # Of what was made, not of where it came from: moved inputs give the same one.
        "fingerprint": _digest(*made_by, entries),
    }
    return info, failures


def finish(out, info):
    """Writes `dataset.json`: from here on the folder is a data set."""
    files.write_json(out / "dataset.json", info)
    shutil.rmtree(out / ".parts")


def check_unfinished(out):
    """Raises InputError where `out` holds a finished data set."""
    if (pathlib.Path(out) / "dataset.json").exists():
        raise InputError(f"{out} already holds a finished data set: choose another --out")


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _claim(out, plan):
    check_unfinished(out)
    name, record = ".parts/plan.json", {"plan": plan}
    files.check_claim(out, {name: record}, command="maknet prepare", option="--out")
    files.write_json(out / name, record)


def _chunks(units):
    parts, filled = [[]], 0
    for unit in units:
        if filled and filled + unit.count > SHARD_RECORDS:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.count
    return parts if parts[0] else []


def _write_part(out, name, units, make, run, label_count, advance):
    # The sidecar is written after the shard: where it is, the shard is whole.
    sidecar = out / ".parts" / f"{name.replace('/', '.')}.json"
    if sidecar.exists():
        advance(len(units))
        return files.read_json(sidecar)
    label_counts = np.zeros(label_count, np.int64)
    failures, counters = [], collections.Counter()

    def payloads():
        for made in run(make, units):
            failures.extend(made.failures)
            counters.update(made.counters)
            for payload, labels in made.examples:
                np.add(label_counts, labels, out=label_counts)
                yield payload
            advance(1)

    count, digest = records.write_shard(out / name, payloads())
    if not count:
        (out / name).unlink()
    done = {
        "count": count,
        "digest": digest,
        "label_counts": label_counts.tolist(),
        "failures": failures,
        "counters": dict(counters),
    }
    files.write_json(sidecar, done)
    return json.loads(json.dumps(done))


@contextlib.contextmanager
def _mapper(workers):
    """Yields map(function, units), in order, over processes."""
    if workers <= 1:
        yield map
        return
    # Spawned, not forked: threads of the parent (grain, JAX) do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts
    )
    signals = {signal.SIGINT, signal.SIGTERM}
    try:
        # Started with the signals blocked, which they inherit: one that comes before a worker can
        # ignore it would kill it. The parent gets what came meanwhile afterwards.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        started = [pool.submit(_ignore_interrupts) for _ in range(workers)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        concurrent.futures.wait(started)
        yield pool.map
    except concurrent.futures.process.BrokenProcessPool:
        raise InputError(
            f"one of {workers} worker processes was killed, most often for memory: the same "
            "command with fewer --workers goes on (a script of yours needs `if __name__ == "
            "'__main__':`, because each worker imports it)"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts():
    # Ctrl-C and a scheduler's SIGTERM reach the whole group; the parent decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
