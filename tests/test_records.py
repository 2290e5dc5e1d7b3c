"""Records and shards on disk: exact, checked, atomic."""

import errno
import json
import pickle
import re
import time

import numpy as np
import pytest

from maknet_jax.data import records, shard_files
from maknet_jax.errors import InputError


def make_example(number=0, size=8, labels=5):
    rng = np.random.default_rng(number)
    return records.Example(
        f"slice ü {number}",
        rng.integers(-1024, 3072, (size, size, 3)).astype(np.int16),
        rng.integers(0, 2, labels).astype(np.uint8),
        rng.integers(0, 2, labels).astype(np.uint8),
        {"crop": [1, 2, 3, 4], "spacing": [None, 0.5, 0.5], "file": "a.png"},
    )


def assert_same(actual, expected):
    assert actual.id == expected.id and actual.meta == expected.meta
    for field in ("image", "labels", "label_mask"):
        value = getattr(actual, field)
        assert value.dtype == getattr(expected, field).dtype
        np.testing.assert_array_equal(value, getattr(expected, field))


def write_set(folder, counts=(5, 3), split="train"):
    """A prepared folder with numbered examples."""
    shards, number = [], 0
    for shard, count in enumerate(counts):
        name = f"{split}/part-{shard:05d}.array_record"
        examples = [make_example(number + k) for k in range(count)]
        written, digest = records.write_shard(folder / name, map(records.encode, examples))
        shards.append({"file": name, "count": written, "digest": digest})
        number += count
    entry = {"count": number, "label_counts": [0] * 5, "shards": shards}
    labels = [{"name": n, "class": "", "parents": [], "exclusive": []} for n in "abcde"]
    info = {"format": 1, "size": 8, "labels": labels, "splits": {split: entry}, "fingerprint": "f"}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("labels", [5, 0])
def test_decode_undoes_encode(labels):
    example = make_example(labels=labels)
    assert_same(records.decode(records.encode(example)), example)


def test_images_other_than_square_int16_triplets_are_rejected():
    good = make_example()
    for image in (
        good.image.astype(np.float32),
        good.image[..., :2],
        good.image[:4],
        good.image[..., 0],
    ):
        with pytest.raises(ValueError, match="int16"):
            records.encode(records.Example("x", image, good.labels, good.label_mask, {}))


def test_a_source_concatenates_shards(tmp_path):
    dataset = records.open_dataset(write_set(tmp_path, counts=(5, 3)))
    source = dataset.source("train")
    assert len(source) == 8
    for number in (0, 4, 5, 7, 2):
        assert_same(source[number], make_example(number))
    assert_same(pickle.loads(pickle.dumps(source))[6], make_example(6))
    assert dataset.size == 8 and dataset.vocabulary.names == tuple("abcde")


def test_a_split_without_records_is_empty(tmp_path):
    dataset = records.open_dataset(write_set(tmp_path, counts=()))
    assert len(dataset.source("train")) == 0


def test_equal_records_give_equal_bytes_and_digests(tmp_path):
    payloads = [records.encode(make_example(k)) for k in range(4)]
    first = records.write_shard(tmp_path / "a" / "x", payloads)
    assert first == records.write_shard(tmp_path / "b" / "x", iter(payloads))
    assert (tmp_path / "a" / "x").read_bytes() == (tmp_path / "b" / "x").read_bytes()
    assert first[0] == 4
    assert first[1] != records.write_shard(tmp_path / "c" / "x", payloads[::-1])[1]


def test_a_failing_writer_leaves_the_old_shard(tmp_path):
    def payloads():
        yield records.encode(make_example())
        raise KeyboardInterrupt

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        records.write_shard(tmp_path / "x", payloads())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def read_all(folder):
    source = records.open_dataset(folder).source("train")
    return [source[number] for number in range(len(source))]


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_flipped_bit_is_detected(tmp_path, number):
    write_set(tmp_path, counts=(6,))
    (path,) = tmp_path.glob("train/*")
    content = bytearray(path.read_bytes())
    # Random pixels do not compress, so the file contains them unchanged.
    pixels = make_example(number).image.transpose(2, 0, 1).tobytes()
    at = content.find(pixels[100:116])
    assert at > 0
    content[at] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path.parent))} .*damaged"):
        read_all(tmp_path)


@pytest.mark.parametrize("length", [0, 100, 65536, -1])
def test_a_truncated_shard_is_detected(tmp_path, length):
    write_set(tmp_path, counts=(6,))
    (path,) = tmp_path.glob("train/*")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=f"{re.escape(str(path.parent))} .*damaged"):
        read_all(tmp_path)


def test_unfinished_and_damaged_data_sets_are_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            records.open_dataset(path)
    write_set(tmp_path)
    dataset = records.open_dataset(tmp_path)
    with pytest.raises(InputError, match="'test'.*train"):
        dataset.source("test")
    info = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(InputError, match="format 2.*1"):
        records.open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(info)[:50])
    with pytest.raises(InputError, match="dataset.json"):
        records.open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    (tmp_path / info["splits"]["train"]["shards"][1]["file"]).unlink()
    with pytest.raises(InputError, match="part-00001.array_record"):
        records.open_dataset(tmp_path)


def test_a_failed_flush_is_an_error_even_if_the_system_reports_it_once(tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "broken disk")

    def payloads():
        yield b"one"
        deadline = time.monotonic() + 30
        while not calls and time.monotonic() < deadline:
            time.sleep(0.001)
        yield b"two"

    monkeypatch.setattr(shard_files, "_FLUSH", 0.0)
    monkeypatch.setattr(shard_files.os, "fsync", fsync)
    with pytest.raises(OSError, match="broken disk"):
        records.write_shard(tmp_path / "shard", payloads())
    assert calls and not list(tmp_path.iterdir())
    assert records.write_shard(tmp_path / "shard", [b"one"])[0] == 1
