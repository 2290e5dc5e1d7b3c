"""Batches: a function of (seed, step), each example once per epoch, any number of processes."""

import itertools

import numpy as np
import pytest

from maknet_jax.data import pipeline, records


class Numbers:
    """A source whose example k is filled with k."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return records.Example(
            f"id-{index}",
            np.full((4, 4, 3), index, np.int16),
            np.array([index % 2, 1], np.uint8),
            np.array([1, index % 3 == 0], np.uint8),
            {},
        )


def take(batches, count):
    return list(itertools.islice(batches, count))


def train(count, steps, **options):
    options = {"batch_size": 4, "seed": 7, "threads": 1, "prefetch": 1} | options
    return take(pipeline.train_batches(Numbers(count), **options), steps)


def ordered(count, **options):
    options = {"batch_size": 4, "threads": 1, "prefetch": 1} | options
    return list(pipeline.ordered_batches(Numbers(count), **options))


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for field in one:
            np.testing.assert_array_equal(one[field], other[field])


def joined(parts):
    """The batches of all processes, concatenated in process order."""
    return [
        {field: np.concatenate([part[field] for part in step]) for field in step[0]}
        for step in zip(*parts, strict=True)
    ]


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_the_fields_of_a_batch():
    (batch,) = train(9, 1)
    index = batch["index"]
    expected = {
        "image": ((4, 4, 4, 3), np.int16),
        "labels": ((4, 2), np.float32),
        "label_mask": ((4, 2), np.float32),
        "weight": ((4,), np.float32),
        "index": ((4,), np.int32),
    }
    assert set(batch) == {*expected, "id"}
    for field, (shape, dtype) in expected.items():
        assert batch[field].shape == shape and batch[field].dtype == dtype
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], index)
    np.testing.assert_array_equal(batch["labels"][:, 0], index % 2)
    np.testing.assert_array_equal(batch["label_mask"][:, 1], index % 3 == 0)
    np.testing.assert_array_equal(batch["weight"], 1)
    assert list(batch["id"]) == [f"id-{k}" for k in index]


@pytest.mark.parametrize("start", [1, 3, 5, 11])
def test_starting_at_a_step_equals_skipping_to_it(start):
    assert_equal(train(10, 4, start=start), train(10, start + 4)[start:])


@pytest.mark.parametrize("processes", [2, 4])  # 4 read one example each
@pytest.mark.parametrize("start", [0, 3])
def test_the_batches_of_all_processes_form_the_batch_of_one(processes, start):
    parts = [
        train(10, 6, start=start, process_index=k, process_count=processes)
        for k in range(processes)
    ]
    assert_equal(joined(parts), train(10, 6, start=start))


def test_every_example_is_seen_once_per_epoch_and_no_remainder_is_dropped():
    # Three epochs of 10 examples, in batches of 5, 6 and 2.
    for batch_size in (5, 6, 2):
        stream = indices(train(10, 30 // batch_size, batch_size=batch_size))
        epochs = [stream[start : start + 10] for start in (0, 10, 20)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed_only():
    assert_equal(train(10, 5), train(10, 5, threads=4, prefetch=4))
    assert indices(train(10, 5)) != indices(train(10, 5, seed=8))
    # The stream does not depend on the batch size.
    assert indices(train(10, 6, batch_size=2)) == indices(train(10, 3, batch_size=4))


def test_a_source_smaller_than_a_batch_repeats():
    assert sorted(indices(train(2, 1))) == [0, 0, 1, 1]


def test_invalid_batch_sizes_are_rejected():
    with pytest.raises(ValueError, match="no examples"):
        train(0, 1)
    with pytest.raises(ValueError, match="4 .*3 "):
        train(10, 1, process_count=3)
    with pytest.raises(ValueError, match="4 .*3 "):
        ordered(10, process_count=3)


COUNTS, SIZES = (10, 7), (6, 4)  # of two streams: examples, and examples per batch


def mixed(steps, counts=COUNTS, sizes=SIZES, **options):
    sources = [Numbers(count) for count in counts]
    return take(pipeline.mixed_batches(sources, sizes, seed=7, threads=1, **options), steps)


def streams(batches):
    """The part of each stream in mixed batches, in order, with the record numbers of the stream."""
    parts = []
    for number in (0, 1):
        parts.append([])
        for batch in batches:
            mine = batch["index"] // pipeline._STREAM_OFFSET == number
            rows = {field: value[mine] for field, value in batch.items()}
            parts[-1].append(rows | {"index": rows["index"] % pipeline._STREAM_OFFSET})
    return parts


@pytest.mark.parametrize("sizes", [(6, 4), (4, 4), (2, 8), (3, 5)])
def test_each_stream_of_a_mix_equals_that_stream_alone(sizes):
    batches = mixed(7, sizes=sizes)
    assert all(len(batch["index"]) == sum(sizes) for batch in batches)
    for number, part in enumerate(streams(batches)):
        alone = train(COUNTS[number], 7, batch_size=sizes[number], seed=7 + number)
        assert_equal(part, alone)


def test_a_mix_of_one_stream_equals_that_stream():
    assert_equal(mixed(5, counts=(10,), sizes=(4,)), train(10, 5))


def test_record_numbers_are_unique_across_streams():
    """Augmentation derives its randomness from them: two streams must not share it."""
    whole = mixed(40, counts=(5, 5), sizes=(4, 4))
    assert len(set(indices(whole))) == 10 and min(indices(whole)) >= 0
    assert whole[0]["index"].dtype == np.int32


@pytest.mark.parametrize("start", [1, 4, 11])
def test_a_mix_starts_at_any_step(start):
    assert_equal(mixed(3, start=start), mixed(start + 3)[start:])


@pytest.mark.parametrize("sizes, processes", [((6, 4), 2), ((4, 4), 2), ((8, 4), 4)])
@pytest.mark.parametrize("start", [0, 3])
def test_the_mixes_of_all_processes_form_that_of_one(sizes, processes, start):
    parts = [
        mixed(4, sizes=sizes, start=start, process_index=k, process_count=processes)
        for k in range(processes)
    ]
    assert_equal(joined(parts), mixed(4, sizes=sizes, start=start))


def test_invalid_mixes_are_rejected():
    with pytest.raises(ValueError, match=r"\(6, 4\) .*4 "):
        mixed(1, process_count=4)
    with pytest.raises(ValueError, match="no examples"):
        mixed(1, counts=(10, 0))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 10, 16])
def test_ordered_batches_hold_every_example_once(batch_size):
    batches = ordered(10, batch_size=batch_size)
    assert all(batch["image"].shape == (batch_size, 4, 4, 3) for batch in batches)
    assert len(batches) == -(-10 // batch_size)
    index, weight = np.array(indices(batches)), np.concatenate([b["weight"] for b in batches])
    assert index[weight > 0].tolist() == list(range(10))
    np.testing.assert_array_equal(index == -1, weight == 0)
    assert set(weight.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("batch_size", [2, 4, 6, 16])
def test_ordered_batches_of_two_processes_hold_every_example_once(batch_size):
    parts = [ordered(11, batch_size=batch_size, process_index=k, process_count=2) for k in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == -(-11 // batch_size)
    assert all(len(batch["index"]) == batch_size // 2 for part in parts for batch in part)
    index = indices(parts[0]) + indices(parts[1])
    assert sorted(k for k in index if k >= 0) == list(range(11))
    # Together they are the batches of one process, with the rows in another order.
    for both, one in zip(joined(parts), ordered(11, batch_size=batch_size), strict=True):
        assert sorted(both["index"]) == sorted(one["index"])


def test_an_empty_source_has_no_ordered_batches():
    assert ordered(0) == []


def test_records_on_disk_give_the_same_batches_twice(shards):
    source = shards.source("train")
    one, two = (
        take(pipeline.train_batches(source, batch_size=4, seed=1, threads=2), 3) for _ in range(2)
    )
    assert_equal(one, two)
    example = source[int(one[0]["index"][0])]
    np.testing.assert_array_equal(one[0]["image"][0], example.image)
    assert one[0]["id"][0] == example.id
