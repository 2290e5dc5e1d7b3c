"""Writes a prepared data set: the plan, then shard by shard, then `dataset.json`.

An interrupted run resumes with the missing shards. Each shard is written atomically, and the data
set is finished when `dataset.json` exists (see `finish`).
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax import files
from maknet_jax.ct import preprocess
from maknet_jax.data import cluster, records, shard_files, worker_pool
from maknet_jax.data.labels import Vocabulary
from maknet_jax.data.unit_results import AnyUnit, Divided, Division, Pack, Packed, Unit, UnitResult
from maknet_jax.errors import InputError, NothingUsable

SHARD_RECORDS = 512  # about 100 MB at 256 x 256
WINDOW = (-1024.0, 3071.0)  # HU; LesaNet's, the default of the configs


@dataclasses.dataclass(frozen=True)
class _Part:
    """One finished shard, as stored in its sidecar in `.parts`."""

    count: int
    digest: str
    label_counts: list[int]
    known_counts: list[int]
    failures: list[tuple[str, str]]
    counters: dict[str, int]
    first: str = ""  # SHA-256 of the first record; earlier versions lack it


def write_shards(
    out: str | os.PathLike,
    splits: Mapping[str, Sequence[AnyUnit]],
    make: Callable[[AnyUnit], UnitResult],
    *,
    kind: str,
    size: int,
    vocabulary: Vocabulary,
    about: dict[str, Any],
    workers: int,
    advance: Callable[[int], None],
    failures: Sequence[tuple[str, str]] = (),
    division: Division | None = None,
    scheduler: str | None = None,
    pool: worker_pool.Pool | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes all splits; returns (info for `finish`, failures).

    Args:
      out: the output folder; it may hold an unfinished run with the same plan.
      splits: split -> units.
      make: make(unit) -> UnitResult, importable by name (worker processes call it).
      kind: deeplesion, lesions, dicom, table or segmentations.
      size: the edge of the images.
      vocabulary: `labels.Vocabulary`.
      about: how the units were chosen; JSON, stored in `dataset.json`.
      workers: the number of processes; 1 runs in this process.
      advance: called with the number of units done.
      failures: inputs that were rejected before; they come first in the returned failures.
      division: how large units are divided; None leaves them whole.
      scheduler: the address of a Dask scheduler, whose workers are used instead of processes.
      pool: workers that run already; None starts them.

    Raises:
      NothingUsable: no unit gave a record.
      InputError: `out` is not empty and has another plan, or a worker died.
    """
    out = pathlib.Path(out)
    labels = vocabulary.to_json()
    made_by = (records.FORMAT, preprocess.CROP_RULE, kind, size, labels)
    _claim(out, _digest("known counts", *made_by, splits))
    entries: dict[str, dict[str, Any]] = {}
    failures = list(failures)
    counters: collections.Counter[str] = collections.Counter()
    plan = {split: list(_named_parts(split, units)) for split, units in splits.items()}
    missing = {
        name: [Divided.of(unit, division) for unit in units]
        for name, units in itertools.chain.from_iterable(plan.values())
        if not _sidecar(out, name).exists()
    }
    # One sequence over all shards, so that workers do not wait for each other at the end of each.
    pieces = [piece for units in missing.values() for unit in units for piece in unit.pieces]
    pack = Pack(make, len(vocabulary))
    deaths = _Deaths(out / ".parts" / "killed.json")
    with _results(pack, pieces, workers, scheduler, deaths, pool) as results:
        for split, parts in plan.items():
            shards, label_counts, known_counts = [], *np.zeros((2, len(vocabulary)), np.int64)
            for name, units in parts:
                if name in missing:
                    done = _write_part(out, name, missing[name], results, len(vocabulary), advance)
                else:
                    done = _read_part(_sidecar(out, name))
                    advance(len(units))
                label_counts += np.asarray(done.label_counts, np.int64)
                known_counts += np.asarray(done.known_counts, np.int64)
                failures.extend(done.failures)
                counters.update(done.counters)
                if done.count:
                    shard = {"file": name, "count": done.count, "digest": done.digest}
                    shards.append(shard | ({"first": done.first} if done.first else {}))
            entries[split] = {
                "count": sum(shard["count"] for shard in shards),
                "label_counts": label_counts.tolist(),
                "known_counts": known_counts.tolist(),
                "shards": shards,
            }
    if not any(entry["count"] for entry in entries.values()):
        shutil.rmtree(out / ".parts")
        for folder in filter(pathlib.Path.is_dir, map(out.joinpath, splits)):
            folder.rmdir()  # empty: restores the previous state of `out`
        raise NothingUsable(f"no record could be made for {out}", failures)
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
        "versions": cluster.versions(),
        # Covers the records, not their paths: moving the inputs does not change it.
        "fingerprint": _digest(*made_by, _without_added_fields(entries)),
    }
    info["content"] = records.content_digest(info)
    return info, failures


def _without_added_fields(entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    # Earlier versions had no known counts and no digest of the first record; the digests of the
    # shards already cover both.
    return {
        split: {
            "count": entry["count"],
            "label_counts": entry["label_counts"],
            "shards": [
                {key: shard[key] for key in ("file", "count", "digest")}
                for shard in entry["shards"]
            ],
        }
        for split, entry in entries.items()
    }


def finish(out: pathlib.Path, info: dict[str, Any]) -> None:
    """Writes `dataset.json`, which marks the data set as finished."""
    files.write_json(out / "dataset.json", info)
    shutil.rmtree(out / ".parts")


def check_start(out: str | os.PathLike[str], scheduler: str | None) -> None:
    """Raises InputError if `out` contains a finished data set, or a scheduler has no workers."""
    _check_unfinished(out)
    cluster.check(scheduler)


def _check_unfinished(out: str | os.PathLike[str]) -> None:
    if (pathlib.Path(out) / "dataset.json").exists():
        raise InputError(f"{out} already contains a finished data set: choose another --out")


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _claim(out: pathlib.Path, plan: str) -> None:
    _check_unfinished(out)
    name, record = ".parts/plan.json", {"plan": plan}
    files.check_claim(
        out, {name: record}, command="maknet prepare", option="--out", leftovers=("failures.csv",)
    )
    files.write_json(out / name, record)


def _unit_groups(units: Iterable[AnyUnit]) -> list[list[AnyUnit]]:
    parts: list[list[AnyUnit]] = [[]]
    filled = 0
    for unit in units:
        if filled and filled + unit.count > SHARD_RECORDS:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.count
    return parts if parts[0] else []


def _named_parts(split: str, units: Iterable[AnyUnit]) -> Iterator[tuple[str, list[AnyUnit]]]:
    """Yields (path of the shard, its units)."""
    parts = _unit_groups(units)
    for number, part in enumerate(parts):
        yield f"{split}/part-{number:05d}-of-{len(parts):05d}.array_record", part


def _sidecar(out: pathlib.Path, name: str) -> pathlib.Path:
    """Written after the shard: if it exists, the shard is complete."""
    return out / ".parts" / f"{name.replace('/', '.')}.json"


def _read_part(sidecar: pathlib.Path) -> _Part:
    content = files.read_json(sidecar)
    try:
        failed = [(name, reason) for name, reason in content["failures"]]
        return _Part(**content | {"failures": failed})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{sidecar} is damaged ({error}): delete it and run the command again"
        ) from None


def _write_part(
    out: pathlib.Path,
    name: str,
    units: Iterable[Divided],
    results: Iterator[Packed],
    label_count: int,
    advance: Callable[[int], None],
) -> _Part:
    """Writes one shard of the next results."""
    counts = np.zeros((2, label_count), np.int64)
    failures: list[tuple[str, str]] = []
    counters: collections.Counter[str] = collections.Counter()
    with shard_files.open_shard(out / name) as shard:
        for unit in units:
            before = len(shard)
            made = []
            for packed in itertools.islice(results, len(unit.pieces)):
                shard.add(packed.chunks)
                made.append((packed.result, packed.counts))
            result, kept = unit.join([result for result, _ in made], len(shard) - before)
            if kept:
                counts += sum(added for _, added in made)
            else:
                shard.keep(before)
            failures.extend(result.failures)
            counters.update(result.counters)
            advance(1)
    if not len(shard):
        (out / name).unlink()
    labelled, known = counts.tolist()
    part = _Part(len(shard), shard.digest, labelled, known, failures, dict(counters), shard.first)
    files.write_json(_sidecar(out, name), dataclasses.asdict(part))
    return part


@contextlib.contextmanager
def _results(
    pack: Pack[AnyUnit],
    pieces: Sequence[Any],
    workers: int,
    scheduler: str | None,
    deaths: "_Deaths",
    pool: worker_pool.Pool | None,
) -> Iterator[Iterator[Packed]]:
    """Yields an iterator over pack(piece) for each piece, in order."""
    here = workers <= 1 and scheduler is None and not any(map(deaths.by, pieces))
    if here or not pieces:
        yield map(pack, pieces)
        return
    started = (
        contextlib.nullcontext(pool)
        if pool
        else cluster.start(min(workers, len(pieces)), scheduler, module=pack.make.__module__)
    )
    with started as pool:

        def died(piece: Unit, how: str) -> Packed:
            return pack.pack(deaths.add(pool, piece, how))

        yield pool.map(pack, pieces, alone=deaths.by, died=died)


class _Deaths:
    """Units whose worker died, remembered for the next run.

    The first death ends the run. The next run gives such a unit to a worker while all others wait,
    and rejects it if the worker dies again.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._digests = set(files.read_json(path)) if path.exists() else set()

    def by(self, unit: Unit) -> bool:
        """Whether a worker died with this unit."""
        return bool(self._digests) and _digest(unit) in self._digests

    def add(self, pool: worker_pool.Pool, unit: Unit, how: str) -> UnitResult:
        """Rejects the unit if this is its second death, else ends the run."""
        if self.by(unit):
            reason = f"the worker process that read it died twice ({how})"
            return UnitResult(failures=((unit.source, reason),))
        files.write_json(self._path, sorted({*self._digests, _digest(unit)}))
        raise worker_pool.death(pool, unit.source, how)
