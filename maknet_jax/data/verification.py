"""Reads everything of a data set or of pseudo-labels and compares it with what was recorded."""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from maknet_jax import console, files
from maknet_jax.data import pseudo_labels, records
from maknet_jax.errors import InputError

_THREADS = 4  # shards that are read at once


class Check(NamedTuple):
    """The result of reading one file or checkpoint.

    Attributes:
      item: its name.
      content: what it holds, such as "512 records".
      problem: what is wrong; "" if nothing is.
      remark: what could not be checked; "" if everything was.
    """

    item: str
    content: str = ""
    problem: str = ""
    remark: str = ""


def check_dataset(path: str | os.PathLike[str]) -> Iterator[Check]:
    """Reads all records of a data set: digests, counts, sizes and numbers of labels.

    Yields:
      A check of `dataset.json`, then one of each shard and of the totals of each split.
    """
    try:
        dataset = records.read_description(path)
    except InputError as error:
        yield Check("dataset.json", problem=str(error))
        return
    splits = dataset.info["splits"]
    shards = [shard for split in splits.values() for shard in split["shards"]]
    yield Check(
        "dataset.json",
        console.plural(sum(split["count"] for split in splits.values()), "record"),
        remark="" if "content" in dataset.info else "no digest (written by an earlier version)",
    )
    totals = {name: np.zeros((2, len(dataset.info["labels"])), np.int64) for name in splits}
    names = [name for name, split in splits.items() for _ in split["shards"]]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda shard: _check_shard(dataset, shard), shards)
        for name, (check, counts) in zip(names, results, strict=True):
            totals[name] += counts
            yield check
    for name, split in splits.items():
        recorded = [split["label_counts"], split.get("known_counts", totals[name][1])]
        equal = np.array_equal(np.asarray(recorded).reshape(2, -1), totals[name])
        problem = "" if equal else "its records have other labels than dataset.json counts"
        yield Check(f"split {name}", console.plural(split["count"], "record"), problem)


def _check_shard(dataset: records.Dataset, shard: dict[str, Any]) -> tuple[Check, np.ndarray | int]:
    """(the check, `[2, K]` records with each label and records in which it is known)."""
    digest, counts = hashlib.sha256(), np.zeros((2, len(dataset.info["labels"])), np.int64)
    try:
        source = records.RecordSource([dataset.path / shard["file"]])
        content = console.plural(len(source), "record")
        for number in range(len(source)):
            payload = source.payload(number)
            digest.update(hashlib.sha256(payload).digest())
            example = records.decode(payload)
            if problem := dataset.problem(example):
                return Check(shard["file"], content, f"record {number} has {problem}"), 0
            counts += example.labels & example.label_mask, example.label_mask
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check(shard["file"], problem=str(error)), 0
    problem = remark = ""
    if len(source) != shard["count"]:
        problem = f"it should have {console.plural(shard['count'], 'record')}"
    elif "digest" not in shard:
        remark = "no digest (written by an earlier version)"
    elif digest.hexdigest() != shard["digest"]:
        problem = "its records do not match their digest: they are not the ones that were prepared"
    return Check(shard["file"], content, problem, remark), counts


def check_pseudo_labels(path: str | os.PathLike[str]) -> Iterator[Check]:
    """Reads all label shards of `maknet pseudo-label` and compares their digests."""
    folder = pathlib.Path(path)
    try:
        info = files.read_json(folder / "pseudo.json")
        shards = [(str(shard["file"]), str(shard["sha256"])) for shard in info["shards"]]
    except (InputError, KeyError, TypeError) as error:
        yield Check("pseudo.json", problem=f"{type(error).__name__}: {error}")
        return
    yield Check("pseudo.json", f"{len(shards)} shards")
    for name, digest in shards:
        try:
            yield Check(name, f"{len(pseudo_labels.read_rows(folder / name, digest)):,} images")
        except (InputError, OSError) as error:
            yield Check(name, problem=str(error))
