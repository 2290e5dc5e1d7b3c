"""The log of metrics: what is written, and what a restart removes."""

import contextlib
import json
import math

import numpy as np
import pytest

from maknet_jax.training import log


def write(folder, *, step, rows):
    with contextlib.closing(log.MetricLog(folder, step=step)) as metrics:
        for number, values in rows:
            metrics.write(number, values)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_step_and_scalars_and_no_nan(tmp_path):
    write(tmp_path, step=0, rows=[(3, {"loss": np.float32(0.5)}), (4, {"loss": math.inf})])
    assert lines(tmp_path) == [{"step": 3, "loss": 0.5}, {"step": 4, "loss": None}]
    events = list((tmp_path / "tensorboard").glob("events.*"))
    assert len(events) == 1 and b"loss" in events[0].read_bytes()


def test_a_restart_removes_lines_after_its_checkpoint(tmp_path):
    write(tmp_path, step=0, rows=[(k, {"a": k}) for k in (10, 20, 20, 30)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "a"')  # killed while writing a line
    write(tmp_path, step=20, rows=[(25, {"a": 1.0})])
    assert [row["step"] for row in lines(tmp_path)] == [10, 20, 20, 25]


def test_averages_are_means_of_the_steps():
    steps = [{"loss": np.float32(k), "norm": 2.0 * k} for k in (1, 2, 6)]
    assert log.averages(steps) == pytest.approx({"loss": 3.0, "norm": 6.0}, rel=1e-6)
    assert math.isnan(log.averages([{"loss": 1.0}, {"loss": math.nan}])["loss"])
    assert log.averages([]) == {}
