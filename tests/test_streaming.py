"""Half a million records in about a thousand shards: order, handles, memory and time."""

import json

import pytest

from benchmarks.speed import streaming


def streamed(out, *argv):
    streaming.main(["--out", str(out), *argv])
    return json.loads(out.read_text())


def test_streaming_reads_every_record_once_with_few_handles(tmp_path):
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
