"""Examples and the shards that hold them: encoding and random access.

A record holds `id` (str), `image` (int16 HU `[S, S, 3]`), `labels` and `label_mask` (uint8 `[K]`)
and `meta` (a dict: the source of the image). ArrayRecord checks every chunk: a flipped bit or a
truncated file raises when it is read.
"""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import msgpack
import numpy as np

from maknet_jax.data import readers
from maknet_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its labels.

    Attributes:
      id: unique within the data set.
      image: int16 `[S, S, 3]` in HU.
      labels: uint8 `[K]`.
      label_mask: uint8 `[K]`, 0 where the label is unknown.
      meta: the source of the image, JSON-like; `box` for a lesion patch.
    """

    id: str
    image: np.ndarray
    labels: np.ndarray
    label_mask: np.ndarray
    meta: dict[str, Any]


class ExampleSource(Protocol):
    """Random access to examples: a `RecordSource`, or a list of `Example`s."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def encode(example: Example) -> bytes:
    """Serialises an example.

    Raises:
      ValueError: the image is not int16 `[S, S, 3]`.
    """
    size = example.image.shape[0]
    if example.image.shape != (size, size, 3) or example.image.dtype != np.int16:
        raise ValueError(
            f"image should be int16 [S, S, 3], not {example.image.dtype} {example.image.shape}"
        )
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


def decode(payload: bytes) -> Example:
    """The inverse of `encode`; the image is a read-only view if the byte order allows it."""
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


class RecordSource:
    """Random access to the examples of several shards; picklable, for grain."""

    def __init__(
        self, paths: Iterable[str | os.PathLike], counts: Sequence[int] | None = None
    ) -> None:
        """Opens shards.

        Args:
          paths: the files in order; an empty list gives an empty source.
          counts: records per file; None reads them from the files.

        Raises:
          InputError: a shard is damaged. Reading an example can raise it, too.
          OSError: the system cannot read a shard. Reading an example can raise it, too.
        """
        self._paths = [str(path) for path in paths]
        if counts is None:
            counts = [self._read(path, readers.POOL.count) for path in self._paths]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        path, number = self._locate(index)
        return self._read(path, lambda path: decode(readers.POOL.read(path, number)))

    def payload(self, index: int) -> bytes:
        """An example as it is stored, see `decode`."""
        path, number = self._locate(index)
        return self._read(path, lambda path: readers.POOL.read(path, number))

    def close(self) -> None:
        """Closes the shards; reading opens them again."""
        for path in self._paths:
            readers.POOL.close(path)

    def _locate(self, index: int) -> tuple[str, int]:
        """The shard of an example and its number there."""
        shard = bisect.bisect_right(self._ends, index)
        return self._paths[shard], index - (self._ends[shard - 1] if shard else 0)

    @staticmethod
    def _read(path: str, read: Callable[[str], T]) -> T:
        try:
            return read(path)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            folder, name = os.path.split(path)
            raise InputError(
                f"a shard in {folder} is damaged ({name}: {error}): prepare the data again"
            ) from error
