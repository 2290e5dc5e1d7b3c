"""The benchmark of the training loop against its bare step."""

import json
import time

import pytest

from benchmarks.speed import training_loop


@pytest.mark.slow
def test_the_loop_is_compared_with_the_bare_step(tmp_path):
    out = tmp_path / "loop.json"
    training_loop.main(["--quick", "--batch", "16", "--out", str(out)])
    written = json.loads(out.read_text())
    assert [row["config"] for row in written["rows"]] == ["teacher", "student"]
    for row in written["rows"]:
        low = row["loop"]["low"] / row["bare"]["high"]
        assert low <= row["share"]["median"] <= row["loop"]["high"] / row["bare"]["low"]
        assert 0 <= row["data_wait"]["low"] <= row["data_wait"]["high"] <= 1
        assert set(training_loop.PARTS) < set(row["ms"]) and row["validation"] > 0
    assert "augmentation" in written["rows"][1]["ms"]


def test_the_clock_counts_nested_parts_once():
    clock = training_loop.Clock()
    inner = clock.timed("transfer", lambda: time.sleep(0.05))
    clock.timed("validation", inner)()
    inner()
    assert clock.seconds["validation"] > 0.04 and 0.04 < clock.seconds["transfer"] < 0.09
