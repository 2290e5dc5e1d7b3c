"""Prepared examples on disk: int16 HU in ArrayRecord shards, and `dataset.json` beside them.

    OUT/dataset.json                                   what it is and how it was made
    OUT/train/part-00000-of-00009.array_record         one msgpack record an example

A record holds `id` (str), `image` (int16 HU `[S, S, 3]`), `labels` and `label_mask` (uint8 `[K]`)
and `meta` (a dict: where it came from). ArrayRecord checks every chunk, so that a flipped bit or a
cut file raises when it is read.
"""

import dataclasses
import hashlib
import os
import pathlib

import msgpack
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from maknet_jax import files
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError

FORMAT = 1
# One record a group: random access then decompresses nothing but the record that was asked for.
_OPTIONS = "group_size:1,zstd:3"


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its labels, as a record holds it (see the module)."""

    id: str
    image: np.ndarray
    labels: np.ndarray
    label_mask: np.ndarray
    meta: dict


def encode(example):
    """`Example` -> bytes."""
    size = example.image.shape[0]
    if example.image.shape != (size, size, 3) or example.image.dtype != np.int16:
        raise ValueError(f"image should be int16 [S, S, 3], not {example.image.shape}")
    return msgpack.packb(
        {
            "id": example.id,
            "size": size,
            # Planes compress better than interleaved channels.
            "image": np.ascontiguousarray(example.image.transpose(2, 0, 1)).astype("<i2").tobytes(),
            "labels": example.labels.astype(np.uint8).tobytes(),
            "label_mask": example.label_mask.astype(np.uint8).tobytes(),
            "meta": example.meta,
        }
    )


def decode(payload):
    """Bytes -> `Example`; the image is a read-only view where the byte order allows it."""
    record = msgpack.unpackb(payload)
    size = record["size"]
    image = np.frombuffer(record["image"], "<i2").reshape(3, size, size).transpose(1, 2, 0)
    return Example(
        record["id"],
        image,
        np.frombuffer(record["labels"], np.uint8),
        np.frombuffer(record["label_mask"], np.uint8),
        record["meta"],
    )


def write_shard(path, payloads):
    """Writes one shard whole or not at all; returns (count, SHA-256 of the payloads in order)."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    digest, count = hashlib.sha256(), 0
    writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS)
    try:
        for payload in payloads:
            writer.write(payload)
            digest.update(hashlib.sha256(payload).digest())
            count += 1
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)
        raise
    return count, digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared folder: `dataset.json` read and checked against the shards that are there."""

    path: pathlib.Path
    info: dict

    @property
    def size(self):
        """The edge S of the images."""
        return self.info["size"]

    @property
    def vocabulary(self):
        """The labels in column order."""
        return Vocabulary.from_json(self.info["labels"])

    @property
    def fingerprint(self):
        """SHA-256 over the digests of all shards: the same data gives the same one."""
        return self.info["fingerprint"]

    def split(self, name):
        """The entry of a split: count, label_counts, shards.

        Raises:
          InputError: there is no such split.
        """
        if name not in self.info["splits"]:
            raise InputError(
                f"split {name!r} is not in {self.path}: it has {', '.join(self.info['splits'])}"
            )
        return self.info["splits"][name]

    def source(self, name):
        """A random-access `RecordSource` of a split."""
        paths = [self.path / shard["file"] for shard in self.split(name)["shards"]]
        return RecordSource(paths)

    def sample(self, count: int) -> list[Example]:
        """At most `count` random examples over all splits; always the same ones."""
        splits = self.info["splits"]
        places = [(name, k) for name, split in splits.items() for k in range(split["count"])]
        generator = np.random.default_rng(0)
        chosen = sorted(generator.choice(len(places), min(count, len(places)), replace=False))
        sources = {name: self.source(name) for name in splits}
        return [sources[places[k][0]][places[k][1]] for k in chosen]


def open_dataset(path):
    """Reads `path/dataset.json`.

    Raises:
      InputError: nothing finished is there, its format is newer, or a shard is missing.
    """
    path = pathlib.Path(path)
    try:
        info = files.read_json(path / "dataset.json")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path} holds no finished data set (no dataset.json): run `maknet prepare`"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}/dataset.json is damaged: {error}") from None
    if info.get("format") != FORMAT:
        raise InputError(
            f"{path} has record format {info.get('format')}, this version reads {FORMAT}: "
            "prepare the data again"
        )
    for split in info["splits"].values():
        for shard in split["shards"]:
            if not (path / shard["file"]).is_file():
                raise InputError(f"shard {path / shard['file']} is missing: prepare the data again")
    return Dataset(path, info)


class RecordSource:
    """Random access to the examples of several shards, as grain wants it (picklable)."""

    def __init__(self, paths):
        """Opens shards.

        Args:
          paths: the files in order; none gives an empty source.

        Raises:
          InputError: here or at an example, where a shard is damaged.
        """
        self._paths = [str(path) for path in paths]
        try:
            source = array_record_data_source.ArrayRecordDataSource
            self._records = source(self._paths) if self._paths else []
        except RuntimeError as error:
            raise self._damaged(error) from error

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        try:
            payload = self._records[index]
        except RuntimeError as error:
            raise self._damaged(error) from error
        return decode(payload)

    def _damaged(self, error):
        folder = pathlib.Path(self._paths[0]).parent
        return InputError(f"a shard in {folder} is damaged ({error}): prepare the data again")
