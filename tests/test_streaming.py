"""Half a million records in about a thousand shards: order, handles, memory and time."""

import json

import numpy as np
import pytest

from benchmarks.speed import input_pipeline, streaming
from maknet_jax.data import readers


def streamed(out, *argv):
    streaming.main(["--out", str(out), *argv])
    return json.loads(out.read_text())


def test_two_processes_read_every_record_once_and_resume_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "POOL", readers.Readers())
    monkeypatch.setattr(readers.Readers, "limit", staticmethod(lambda: 3))
    base = streaming.write_base(tmp_path / "base")
    data = input_pipeline.repeat_shards(base, tmp_path / "data", "train", 4000)
    read = []
    for process in range(2):
        result = streaming.read_epoch(data.path, tmp_path / "n.npy", process, 2, 0, 32)
        assert result["wrong"] == 0 and len(readers.POOL) <= 3
        read.append(np.load(tmp_path / "n.npy").reshape(32, 64))
    assert sorted(np.concatenate(read).ravel()) == list(range(8 * 512))
    streaming.read_epoch(data.path, tmp_path / "n.npy", 1, 2, 20, 5)
    np.testing.assert_array_equal(np.load(tmp_path / "n.npy").reshape(5, 64), read[1][20:25])


@pytest.mark.slow
def test_streaming_needs_few_handles(tmp_path):
    result = streamed(tmp_path / "s.json", "--quick", "--records", "6000", "--handles", "40")
    assert (result["shards"], result["records"]) == (12, 6144) and result["read"] == 6144
    assert len(result["rows"]) == 2 and all(row["handles"] <= 40 for row in result["rows"])


@pytest.mark.slow
def test_streaming_half_a_million_records_in_977_shards(tmp_path):
    """At `ulimit -n 1024`, at which one handle per shard is too many."""
    result = streamed(tmp_path / "s.json")
    assert (result["shards"], result["records"]) == (977, 500_224)
    assert result["read"] == 500_224 // 128 * 128
    for row in result["rows"]:
        assert row["handles"] < 700
        assert row["memory"][1] < row["memory"][0] + 64 * 2**20
        assert row["time"]["median"] < 1.5
