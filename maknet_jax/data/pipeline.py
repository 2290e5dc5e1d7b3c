"""Batches from records (grain). A batch is a function of (seed, step): no reader state is stored.

Each epoch is a new permutation of the examples. Batches cross epochs, so every example is used once
per epoch and no remainder is dropped. Step s of a run reads examples s*B to (s+1)*B of that stream,
for any number of processes: each reads its contiguous part of the batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from maknet_jax.data.records import Example, ExampleSource

Batch = dict[str, np.ndarray]

_ENDLESS = 2**30  # epochs; with repeat(None), grain overflows in batches of one
_STREAM_OFFSET = 2**29  # added to the record numbers of each further stream; exceeds any stream


def to_fields(example: Example, index: int) -> dict[str, Any]:
    """The batch fields of one example; `box` if the record has one."""
    fields = {
        "image": example.image,
        "labels": example.labels.astype(np.float32),
        "label_mask": example.label_mask.astype(np.float32),
        "weight": np.float32(1.0),
        "id": example.id,
        "index": np.int32(index),
    }
    if "box" in example.meta:
        fields["box"] = np.asarray(example.meta["box"], np.float32)
    return fields


class _Indexed:
    """A source of batch fields, including the record number."""

    def __init__(self, source: ExampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return to_fields(self._source[index], index)


class _Padded(_Indexed):
    """`_Indexed`, extended to `length` with zero-weight padding."""

    def __init__(self, source: ExampleSource, length: int) -> None:
        super().__init__(source)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self._source):
            return super().__getitem__(index)
        padding = super().__getitem__(0)
        return padding | {"weight": np.float32(0.0), "index": np.int32(-1)}


def train_batches(
    source: ExampleSource,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Endless shuffled batches, starting at step `start`.

    Args:
      source: a random-access source of `records.Example`.
      batch_size: examples per step over all processes; a multiple of `process_count`.
      seed: determines the order.
      start: the first step.
      process_index: the part of each batch that this process reads.
      process_count: the number of processes.
      threads: the number of threads for reading and decompressing.
      prefetch: batches read ahead.

    Yields:
      Dicts of arrays with B = batch_size / process_count rows: `image` int16 `[B, S, S, 3]` in HU,
      `labels` and `label_mask` float32 `[B, K]` (mask 0: unknown), `weight` float32 `[B]` (0:
      padding), `id` str `[B]`, `index` int32 `[B]` (the record number, from which augmentation
      derives its randomness), and for lesions `box` float32 `[B, 4]`.

    Raises:
      ValueError: the source is empty or the batch cannot be split evenly.
    """
    if len(source) == 0:
        raise ValueError("the source has no examples to train on")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of {process_count} processes")
    local = batch_size // process_count
    stream = grain.MapDataset.source(_Indexed(source)).seed(seed).shuffle().repeat(_ENDLESS)
    # Batch s of process p is block s * process_count + p of the stream cut into local batches.
    blocks = stream.batch(local)[start * process_count + process_index :: process_count]
    return iter(blocks.to_iter_dataset(_read_options(threads, prefetch)))


def mixed_batches(
    sources: Sequence[ExampleSource],
    batch_sizes: Sequence[int],
    *,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> Iterator[Batch]:
    """Batches mixed from several streams: labelled and pseudo-labelled images (section 4.2).

    Each stream is shuffled separately, and its position depends only on the step. Rows alternate in
    a fixed pattern, so a row has the same position in the batch for any number of processes.

    Args:
      sources: random-access sources of `records.Example`.
      batch_sizes: examples per step from each source; their greatest common divisor is a multiple
        of `process_count`.
      seed: determines the orders.
      start: the first step.
      process_index: the part of each batch that this process reads.
      process_count: the number of processes.
      threads: the number of threads per source for reading and decompressing.

    Yields:
      Batches like those of `train_batches`; `index` is unique across sources, and fields missing in
      one source (`box`) are dropped.

    Raises:
      ValueError: a source is empty or the batches cannot be split evenly.
    """
    unit = math.gcd(*batch_sizes)
    if unit % process_count:
        raise ValueError(f"batches {batch_sizes} cannot be split over {process_count} processes")
    streams = [
        train_batches(
            source,
            batch_size=size,
            seed=seed + number,
            start=start,
            process_index=process_index,
            process_count=process_count,
            threads=threads,
        )
        for number, (source, size) in enumerate(zip(sources, batch_sizes, strict=True))
    ]
    local = unit // process_count
    for batches in zip(*streams, strict=True):
        for number, batch in enumerate(batches):
            batch["index"] = batch["index"] + np.int32(number * _STREAM_OFFSET)
        shared = set.intersection(*map(set, batches))  # only lesion patches have a box
        yield {name: _alternate([batch[name] for batch in batches], local) for name in shared}


def _alternate(columns: Sequence[np.ndarray], units: int) -> np.ndarray:
    if len(columns) == 1:
        return columns[0]
    parts = [column.reshape(units, -1, *column.shape[1:]) for column in columns]
    whole = np.concatenate(parts, axis=1)
    return whole.reshape(-1, *whole.shape[2:])


def ordered_batches(
    source: ExampleSource,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """All examples once, in order, in batches of equal shape; the last batch is padded.

    Padding repeats the first example with `weight` 0 and `index` -1. Process p reads every
    process_count-th example, and every process yields the same number of batches, as collective
    operations require.

    Args:
      source: a random-access source of `records.Example`.
      batch_size: examples per step over all processes; a multiple of `process_count`.
      process_index: the part of each batch that this process reads.
      process_count: the number of processes.
      threads: the number of threads that read and decompress.
      prefetch: batches read ahead.

    Yields:
      Batches like those of `train_batches`.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of {process_count} processes")
    if len(source) == 0:
        return iter(())
    padded = -(-len(source) // batch_size) * batch_size
    stream = grain.MapDataset.source(_Padded(source, padded))[process_index::process_count]
    blocks = stream.batch(batch_size // process_count)
    return iter(blocks.to_iter_dataset(_read_options(threads, prefetch)))


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
