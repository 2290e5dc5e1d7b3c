"""Batches from records (grain). A batch is a function of (seed, step): no position is stored.

The order of the examples is a permutation an epoch, each epoch another; batches run on over the
end of an epoch, so that every example is seen once an epoch and no remainder is dropped. Step s of
a run takes examples s*B .. (s+1)*B of that stream, whatever the number of processes: each reads
its contiguous part of the batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from maknet_jax.data.records import Example, ExampleSource

Batch = dict[str, np.ndarray]

_ENDLESS = 2**30  # epochs; with none named, grain overflows in batches of one
_STREAM_OFFSET = 2**29  # between the record numbers of two streams: more than any of them holds


def to_fields(example: Example, index: int) -> dict[str, Any]:
    """What a batch holds of an example; `box` where the record has one."""
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
    """A source that yields batch fields and the number of the record."""

    def __init__(self, source: ExampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return to_fields(self._source[index], index)


class _Padded(_Indexed):
    """The same, lengthened to `length` with examples that count nothing."""

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
    """Endless shuffled batches from step `start` on.

    Args:
      source: a random-access source of `records.Example`.
      batch_size: examples a step over all processes; a multiple of `process_count`.
      seed: of the order.
      start: the first step.
      process_index: which part of each batch this process reads.
      process_count: how many processes read.
      threads: that read and decompress.
      prefetch: batches read ahead.

    Yields:
      `batch` dicts as design.md's contract has them, each array with batch_size / process_count
      rows, `index` int32: the record number, from which augmentation derives its randomness, and
      of lesions `box` float32 [B, 4].

    Raises:
      ValueError: the source is empty or the batch cannot be split evenly.
    """
    if len(source) == 0:
        raise ValueError("there are no examples to train on")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is no multiple of {process_count} processes")
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
    """Batches of several streams at once: labelled and pseudo-labelled images (section 4.2).

    Every stream has an order of its own, and all positions follow from the step. Rows alternate in
    a fixed pattern, so that a row has one place in the batch however many processes read it.

    Args:
      sources: random-access sources of `records.Example`.
      batch_sizes: examples a step of each; their greatest common divisor is a multiple of
        `process_count`.
      seed: of the orders.
      start: the first step.
      process_index: which part this process reads.
      process_count: how many processes read.
      threads: that read and decompress, a stream.

    Yields:
      Batches as `train_batches` does; `index` counts on from stream to stream.

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
        shared = set.intersection(*map(set, batches))  # of lesions and whole slices no boxes
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
    """All examples once, in order, in batches of one shape; the last ones are padded.

    Padding repeats an example with `weight` 0 and `index` -1. Every process yields the same number
    of batches (collective steps need that): process p reads every process_count-th example.

    Args:
      source: a random-access source of `records.Example`.
      batch_size: examples a step over all processes; a multiple of `process_count`.
      process_index: which part this process reads.
      process_count: how many processes read.
      threads: that read and decompress.
      prefetch: batches read ahead.

    Yields:
      Batches as `train_batches` does.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is no multiple of {process_count} processes")
    if len(source) == 0:
        return iter(())
    padded = -(-len(source) // batch_size) * batch_size
    stream = grain.MapDataset.source(_Padded(source, padded))[process_index::process_count]
    blocks = stream.batch(batch_size // process_count)
    return iter(blocks.to_iter_dataset(_read_options(threads, prefetch)))


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
