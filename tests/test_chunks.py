"""Shards that are put together from chunks have the bytes of one ArrayRecord writer."""

import pathlib

import numpy as np
import pytest
from array_record.python import array_record_module

from maknet_jax.data import chunks, records, shard_files
from maknet_jax.errors import InputError


@pytest.fixture
def expected(tmp_path):
    """expected(payloads): the file that ArrayRecord writes."""

    def expected(payloads):
        path = tmp_path / "expected"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
        for payload in payloads:
            writer.write(payload)
        writer.close()
        return path.read_bytes()

    return expected


def put_together(groups):
    layout = chunks.Layout()
    pieces = layout.start()
    for group in groups:
        pieces += layout.add(chunks.compress(group))
    return b"".join(pieces + layout.end())


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_records_give_the_file_of_one_writer(expected, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 80))
    payloads = [rng.bytes(int(2 ** rng.uniform(0, 18))) for _ in range(count)]
    cuts = [0, *np.sort(rng.integers(0, count + 1, 3)).tolist(), count]
    groups = [payloads[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert put_together(groups) == expected(payloads)


@pytest.mark.parametrize("count", [0, 600])
def test_files_without_records_and_with_many(expected, count, monkeypatch):
    """Here in temporary files, as on systems that have no files in memory."""
    monkeypatch.delattr(chunks.os, "memfd_create", raising=False)
    payloads = [bytes([number % 251]) * 20 for number in range(count)]
    assert put_together([payloads[:7], payloads[7:]]) == expected(payloads)


def test_chunks_and_padding_that_end_at_block_boundaries(expected, monkeypatch):
    """Around 64 KiB: no padding, a padding chunk that needs another block, and the next chunk."""
    rng, padded, padding = np.random.default_rng(0), set(), chunks._padding
    monkeypatch.setattr(chunks, "_padding", lambda size: padded.add(size) or padding(size))
    ends = set()
    for length in [*range(65105, 65160), *range(65400, 65410)]:
        payloads = [rng.bytes(length), b"next"]
        ends.add((40 + chunks.compress(payloads[:1]).sizes[0]) % 65512)
        whole = expected(payloads)
        assert put_together([payloads]) == whole
        assert put_together([payloads[:1], payloads[1:]]) == whole
    assert {65511, 0, 1} <= ends, sorted(ends)
    assert {40, 65512 + 39, 65512 + 1} <= padded, sorted(padded)


def test_records_can_be_dropped_from_the_end(expected, tmp_path):
    rng = np.random.default_rng(0)
    payloads = [rng.bytes(30_000) for _ in range(9)]
    with shard_files.open_shard(tmp_path / "shard") as shard:
        shard.add(chunks.compress(payloads[:2]))
        shard.add(chunks.compress(payloads[4:]))
        shard.keep(2)
        shard.add(chunks.compress(payloads[2:4]))
        assert len(shard) == 4
    assert (tmp_path / "shard").read_bytes() == expected(payloads[:4])
    assert (4, shard.digest) == records.write_shard(tmp_path / "other", payloads[:4])


def test_errors_without_a_file_name_get_that_of_the_shard(tmp_path):
    """Such as that of `compress`, which writes into memory."""
    with pytest.raises(OSError) as caught, shard_files.open_shard(tmp_path / "shard"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "shard") and not list(tmp_path.iterdir())


def test_another_file_format_is_refused(monkeypatch):
    chunks.check_format()
    chunks.check_format.cache_clear()
    monkeypatch.setattr(chunks, "_VERSION", 2)
    with pytest.raises(InputError, match="not support"):
        chunks.Layout().start()


@pytest.mark.parametrize("content", [b"no block", bytes(1 << 16), b"\xff" * (1 << 16)])
def test_a_file_format_without_chunks_is_refused(monkeypatch, content):
    monkeypatch.setattr(
        chunks, "_write_file", lambda path, *_: pathlib.Path(path).write_bytes(content)
    )
    chunks.check_format.cache_clear()
    with pytest.raises(InputError, match="not support"):
        chunks.Layout().start()
