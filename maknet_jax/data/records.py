"""Prepared examples on disk: int16 HU in ArrayRecord shards, and `dataset.json` beside them.

    OUT/dataset.json                                   contents and how they were prepared
    OUT/train/part-00000-of-00009.array_record         one msgpack record per example

A data set on s3:// or gs:// is copied to a local cache, see `object_store`.
"""

import dataclasses
import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from maknet_jax import files
from maknet_jax.data import object_store
from maknet_jax.data.examples import Example as Example
from maknet_jax.data.examples import ExampleSource as ExampleSource
from maknet_jax.data.examples import RecordSource as RecordSource
from maknet_jax.data.examples import decode as decode
from maknet_jax.data.examples import encode as encode
from maknet_jax.data.labels import Vocabulary
from maknet_jax.data.shard_files import write_shard as write_shard
from maknet_jax.errors import InputError, did_you_mean

FORMAT = 1
# Kind -> source of the data; for other kinds the user states it to `maknet prepare`.
_SOURCES = {
    "deeplesion": "DeepLesion",
    "lesions": "DeepLesion (lesion patches)",
    "phantom": "a generated CT phantom",
}
_CHECK_THREADS = 16  # shards that are checked at once: on network storage, opening one takes long


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared folder, whose `dataset.json` was checked against the shards on disk.

    Attributes:
      path: the folder; of a data set in an object store, the local cache.
      info: `dataset.json`.
      url: of a data set in an object store; its shards are copied when they are needed.
    """

    path: pathlib.Path
    info: dict[str, Any]
    url: str = ""

    @property
    def address(self) -> str:
        """The absolute path or the URL, as runs record it."""
        return self.url or str(self.path.absolute())

    @property
    def size(self) -> int:
        """The edge S of the images."""
        return self.info["size"]

    @property
    def vocabulary(self) -> Vocabulary:
        """The labels in column order."""
        return Vocabulary.from_json(self.info["labels"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the digests of all shards: equal data, equal fingerprint."""
        return self.info["fingerprint"]

    @property
    def origin(self) -> dict[str, str | None]:
        """Kind, source, citation and licence of the data; runs trained on them record it."""
        entries = self.info.get("about", {})
        kind = "phantom" if entries.get("phantom") else self.info.get("kind")
        named = {name: entries.get(name) or None for name in ("source", "citation", "licence")}
        return {"kind": kind} | named | {"source": named["source"] or _SOURCES.get(kind or "")}

    @property
    def choice(self) -> dict[str, Any]:
        """How images were chosen, as far as `dataset.json` records it.

        The fields are every (N: every N-th slice), patients (split -> number) and splits (how cases
        were divided -> number of cases).
        """
        entries = self.info.get("about", {})
        every = (entries.get("rules") or {}).get("every")
        known = {"every": every, **{name: entries.get(name) for name in ("patients", "splits")}}
        return {name: value for name, value in known.items() if value}

    def split(self, name: str) -> dict[str, Any]:
        """The entry of a split: count, label_counts, known_counts, shards.

        `label_counts` are the records with each label, `known_counts` those in which the label is
        known. Data sets of earlier versions have no known_counts.

        Raises:
          InputError: the data set has no such split.
        """
        if name not in self.info["splits"]:
            splits = self.info["splits"]
            raise InputError(
                f"split {name!r} is not in {self.path}: {did_you_mean(name, splits)} It has "
                f"{', '.join(splits)}"
            )
        return self.info["splits"][name]

    def known_counts(self, name: str) -> np.ndarray:
        """int64 `[K]`: the number of records of a split in which each label is known.

        Data sets of earlier versions lack these counts; all of their labels count as known.

        Raises:
          InputError: see `split`.
        """
        split = self.split(name)
        counts = split.get("known_counts", [split["count"]] * len(self.vocabulary))
        return np.asarray(counts, np.int64)

    def one_sided(self, name: str) -> list[str]:
        """The labels that no record of a split is known to have, or to lack.

        Raises:
          InputError: see `split`.
        """
        counts = zip(self.split(name)["label_counts"], self.known_counts(name), strict=True)
        names = zip(self.vocabulary.names, counts, strict=True)
        return [label for label, (present, known) in names if present in (0, known)]

    def source(self, name: str) -> RecordSource:
        """A random-access `RecordSource` of a split."""
        return self.shards(self.split(name)["shards"])

    def shards(self, entries: Sequence[dict[str, Any]]) -> RecordSource:
        """A random-access `RecordSource` of some shards of a split, which are checked.

        Raises:
          InputError: a shard is damaged or not the one that `dataset.json` describes. The check
            reads the first record of each shard; `maknet verify` reads all of them.
        """
        if self.url:
            object_store.copy_shards(self.url, self.path, entries)
        with futures.ThreadPoolExecutor(_CHECK_THREADS) as pool:
            for problem in filter(None, pool.map(self.first_problem, entries)):
                raise InputError(f"{problem}: restore a copy or prepare the data again")
        paths = [self.path / shard["file"] for shard in entries]
        return RecordSource(paths, [shard["count"] for shard in entries])

    def first_problem(self, shard: dict[str, Any]) -> str | None:
        """What the number of records or the first record of a shard contradicts, or None.

        Raises:
          InputError: the shard is damaged.
        """
        path = self.path / shard["file"]
        source = RecordSource([path])
        if len(source) != shard["count"]:
            return f"shard {path} has {len(source)} records, not the {shard['count']} of its entry"
        if problem := self.problem(source[0]) if len(source) else None:
            return f"shard {path} has {problem}"
        if not shard.get("first"):  # of an earlier version
            return None
        same = hashlib.sha256(source.payload(0)).hexdigest() == shard["first"]
        return None if same else f"shard {path} has other records than when it was prepared"

    def problem(self, example: Example) -> str | None:
        """How a record contradicts the size and the labels of `dataset.json`, or None."""
        if example.image.shape[0] != self.size:
            return f"images of {example.image.shape[0]} pixels, not the {self.size} of dataset.json"
        labels = len(self.info["labels"])
        if len(example.labels) != labels or len(example.label_mask) != labels:
            return f"{len(example.labels)} labels, not the {labels} of dataset.json"
        return None

    def sample(self, count: int) -> list[Example]:
        """At most `count` random examples of all splits, which `meta` names; the seed is fixed."""
        splits = self.info["splits"]
        places = [(name, k) for name, split in splits.items() for k in range(split["count"])]
        generator = np.random.default_rng(0)
        chosen = sorted(generator.choice(len(places), min(count, len(places)), replace=False))
        sources = {name: self.source(name) for name in splits}
        examples = []
        for name, number in (places[k] for k in chosen):
            example = sources[name][number]
            examples.append(dataclasses.replace(example, meta=example.meta | {"split": name}))
        return examples


def open_dataset(path: str | os.PathLike) -> Dataset:
    """Reads `path/dataset.json`.

    Args:
      path: a folder, or an s3:// or gs:// URL.

    Raises:
      InputError: the folder is not a finished data set, its format is not supported, or a shard is
        missing.
    """
    if object_store.is_url(path):
        folder = object_store.copy_description(os.fspath(path))
        return dataclasses.replace(read_description(folder), url=os.fspath(path))
    dataset = read_description(path)
    for split in dataset.info["splits"].values():
        for shard in split["shards"]:
            if not (dataset.path / shard["file"]).is_file():
                raise InputError(
                    f"shard {dataset.path / shard['file']} is missing: prepare the data again"
                )
    return dataset


def read_description(path: str | os.PathLike) -> Dataset:
    """Like `open_dataset`, without looking at the shards."""
    files.check_local(path)
    path = pathlib.Path(path)
    try:
        info = files.read_json(path / "dataset.json")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path} has no finished data set (no dataset.json): run `maknet prepare`"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}/dataset.json is damaged: {error}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        version = info.get("format") if isinstance(info, dict) else None
        raise InputError(
            f"{path} has record format {version}, this version reads format {FORMAT}: "
            "prepare the data again"
        )
    try:
        shards = [shard for split in info["splits"].values() for shard in split["shards"]]
        total = sum(operator.index(split["count"]) for split in info["splits"].values())
        _ = Vocabulary.from_json(info["labels"]), operator.index(info["size"]), info["fingerprint"]
        intact = info.get("content", content_digest(info)) == content_digest(info)
        intact &= total == sum(operator.index(shard["count"]) for shard in shards)
        names = [pathlib.PurePosixPath(shard["file"]) for shard in shards]
        # A foreign data set must not make `object_store` write outside of its cache.
        intact &= not any(name.is_absolute() or ".." in name.parts for name in names)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path}/dataset.json is damaged ({reason}): restore a copy or prepare the data again"
        ) from None
    if not intact:
        raise InputError(
            f"{path}/dataset.json was changed after it was prepared: restore a copy or prepare "
            "the data again"
        )
    return Dataset(path, info)


def content_digest(info: Mapping[str, Any]) -> str:
    """SHA-256 of what `dataset.json` says about the content of the shards: its field `content`.

    Data sets of earlier versions have no such field.
    """
    content = {name: info[name] for name in ("format", "size", "labels", "splits", "fingerprint")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_size(dataset: Dataset, size: int, name: str = "the network") -> None:
    """Checks that a data set was prepared at the image size of a network.

    Args:
      dataset: the prepared data set.
      size: the edge of the network's images in pixels.
      name: the network, for the message.

    Raises:
      InputError: the sizes differ.
    """
    if dataset.size != size:
        raise InputError(
            f"{dataset.path} was prepared with --size {dataset.size}, but {name} needs {size}: "
            f"prepare it again with --size {size}"
        )
