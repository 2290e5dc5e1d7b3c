"""The rate of the loop: time that it waited for data counts only while no step was running."""

import contextlib
import json
import threading
import time

import pytest
import toy

from maknet_jax import train
from maknet_jax.data import pipeline
from maknet_jax.runs.throughput import Throughput

WAIT = 0.2  # seconds that a batch takes


class Step:
    """The metrics of a step that ends when told to."""

    def __init__(self):
        self.end = threading.Event()

    def block_until_ready(self):
        self.end.wait()
        return self


def slow(seconds=WAIT):
    """Batches that take `seconds`."""
    while True:
        time.sleep(seconds)
        yield {}


@pytest.fixture
def throughput():
    with contextlib.closing(Throughput(8, step=10)) as result:
        yield result


def test_waiting_before_the_first_step_counts(throughput):
    throughput.take(slow())
    time.sleep(WAIT)
    rates = throughput.read(11)
    assert rates["data_wait"] == pytest.approx(0.5, abs=0.2)
    assert rates["images_per_second"] == pytest.approx(8 / (2 * WAIT), rel=0.4)


def test_waiting_behind_a_running_step_does_not_count(throughput):
    step = Step()
    throughput.started(step)
    throughput.take(slow())
    step.end.set()
    assert throughput.read(11)["data_wait"] == 0.0


def test_waiting_counts_from_the_end_of_the_step(throughput):
    step = Step()
    throughput.started(step)
    threading.Timer(WAIT, step.end.set).start()
    throughput.take(slow(3 * WAIT))
    assert throughput.read(11)["data_wait"] == pytest.approx(2 / 3, abs=0.2)


def test_each_line_has_its_own_time_and_validation_has_none(throughput):
    throughput.take(slow())
    assert throughput.read(11)["data_wait"] > 0.9
    with throughput.paused():
        time.sleep(2 * WAIT)
    time.sleep(WAIT)
    rates = throughput.read(13)
    assert rates["data_wait"] == 0.0
    assert rates["images_per_second"] == pytest.approx(16 / WAIT, rel=0.4)
    total = throughput.total(13)
    assert total["data_wait"] == pytest.approx(1 / 4, abs=0.1)  # validation included
    assert total["images_per_second"] == pytest.approx(24 / (4 * WAIT), rel=0.3)
    assert throughput.total(10) == {"images_per_second": None, "data_wait": None}


def test_closing_waits_for_the_last_step():
    """Its thread would return from C++ while Python ends, which aborts the process."""
    throughput, step = Throughput(8, step=0), Step()
    throughput.started(step)
    threading.Timer(WAIT, step.end.set).start()
    throughput.close()
    assert step.end.is_set() and not throughput._watching.is_alive()


@pytest.mark.parametrize("streams", [1, 2])
def test_a_run_logs_the_share_of_time_that_it_waited(data, tmp_path, monkeypatch, streams):
    original = pipeline.train_batches

    def batches(*args, **kwargs):
        for batch in original(*args, **kwargs):
            time.sleep(0.03)  # a step of the linear model takes 2 ms
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", batches)
    changes = {"epochs": 4.0, "log_every": 5, "evaluate_every": 99}
    if streams == 2:
        images = toy.write_unlabelled(tmp_path / "images")
        pseudo = toy.write_pseudo(tmp_path / "pseudo", images)
        changes |= {"pseudo.path": str(pseudo), "pseudo.batch_size": 8}
    summary = train.train(toy.config(data, "linear", changes), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    shares = [row["train/data_wait"] for row in rows if "train/data_wait" in row]
    assert len(shares) == 4 and all(0.5 < share <= 1 for share in shares[1:])
    assert 0 < summary["data_wait"] <= 1
