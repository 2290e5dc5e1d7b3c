"""Checkpoints are written in the background, and nothing is lost by it."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import two_commands
from runs import newest_checkpoint
from test_checkpoint import LIKE, at, equal, opened

from maknet_jax import train
from maknet_jax.cli import exit_codes
from maknet_jax.errors import InputError
from maknet_jax.training import checkpoint
from maknet_jax.training.background import Background


@pytest.fixture
def background():
    with contextlib.closing(Background()) as thread:
        yield thread


class Gate:
    """Holds the writing of checkpoints until it is opened."""

    def __init__(self, monkeypatch):
        self.entered, self.open = threading.Event(), threading.Event()
        original = checkpoint.digests

        def digests(tree):
            self.entered.set()
            assert self.open.wait(60)
            return original(tree)

        monkeypatch.setattr(checkpoint, "digests", digests)


def test_save_returns_before_the_checkpoint_is_written(tmp_path, background, monkeypatch):
    gate = Gate(monkeypatch)
    with opened(tmp_path / "last", background=background) as saved:
        state, metadata = at(10), {"best": [0.5]}
        saved.save(state, metadata)
        assert gate.entered.wait(60) and saved.steps() == []
        metadata["best"][0] = 0.9  # what the training changes later does not matter
        jax.tree.map(lambda leaf: leaf.delete(), state)  # as a step that donates it
        gate.open.set()
        saved.wait()
        restored = saved.restore(LIKE)
    assert equal(restored.state, at(10)) and restored.metadata == {"best": [0.5]}


def test_the_best_checkpoint_is_written_before_the_last(tmp_path, background, monkeypatch):
    """A kill between them must not leave a last state whose best one is missing."""
    gate = Gate(monkeypatch)
    with (
        opened(tmp_path / "best", keep=1, background=background) as best,
        opened(tmp_path / "last", background=background) as last,
    ):
        best.save(at(10))
        last.save(at(10))
        time.sleep(0.1)
        assert (best.steps(), last.steps()) == ([], [])
        gate.open.set()
        last.wait()
        assert (best.steps(), last.steps()) == ([10], [10])


def full(*_, **__):
    raise ValueError("Error writing x [OS error 28: No space left on device]")


def test_after_a_failure_nothing_later_is_written_and_it_is_raised_once(
    tmp_path, background, monkeypatch
):
    with (
        opened(tmp_path / "best", keep=1, background=background) as best,
        opened(tmp_path / "last", background=background) as last,
    ):
        last.save(at(5))
        last.wait()
        with monkeypatch.context() as patch:
            patch.setattr(best._manager, "save", full)
            best.save(at(10))
            last.save(at(10))
            with pytest.raises(OSError) as caught:
                last.wait()
        assert caught.value.errno == errno.ENOSPC and not background.failed
        assert (best.steps(), last.steps()) == ([], [5])
        last.save(at(10))
        last.wait()
        assert last.steps() == [5, 10]


def test_a_failed_save_stops_the_training_at_once(data, tmp_path, monkeypatch, capsys):
    """Not at the next regular checkpoint, 30 steps later; the same command resumes."""
    page = toy.config(data, "linear", {"checkpoint_every": 4, "evaluate_every": 7.0})
    original, taken = checkpoint.Checkpoints._write, []

    def write(self, step, *rest):
        if step == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "8"))
        original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_write", write)
        code = exit_codes.exit_code("maknet", lambda: taken.append(train.train(page, tmp_path)))
    assert code == 2 and not taken
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("maknet: ") and "checkpoints/8: No space left" in message
    assert int(newest_checkpoint(tmp_path, page).state.step) == 4
    assert train.train(page, tmp_path)["steps"] == 40


def test_an_error_of_another_kind_is_one_line_too(tmp_path, background, monkeypatch):
    def broken(*_, **__):
        raise KeyError("no such array")

    with opened(tmp_path / "last", background=background) as saved:
        monkeypatch.setattr(saved._manager, "save", broken)
        saved.save(at(10))
        with pytest.raises(InputError, match="10 was not written .KeyError: 'no such array'"):
            saved.wait()


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
import pathlib
import jax.numpy as jnp
from maknet_jax.training import checkpoint
from maknet_jax.training.background import Background
from test_checkpoint import at
big = {"filler": jnp.ones((1 << 22,))}
saved = checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), background=Background())
for step in range(1, 1000):
    saved.save(at(step)._replace(ema=big))
    print(step, flush=True)
"""


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    """Killed while Orbax's temporary folder exists, after at least two whole saves."""
    folder = tmp_path / "last"
    command = [sys.executable, "-c", KILLED, str(folder), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        try:
            # A save starts when the one before it is done, so 4 means that 2 and 3 are complete.
            started = 0
            while started < 4:
                started = int(worker.stdout.readline())
            while not any(folder.glob("*.orbax-checkpoint-tmp*")):
                assert worker.poll() is None
        finally:
            worker.send_signal(signal.SIGKILL)
        started = int(([started, *worker.stdout.read().split()])[-1])
    like = LIKE._replace(ema={"filler": np.empty(1 << 22, np.float32)})
    with opened(folder) as saved:
        assert not list(folder.glob("*.orbax-checkpoint-tmp*"))
        restored = saved.restore(like)
        step = int(restored.state.step)
        assert step in (started - 1, started) and restored.damaged == {}
        assert equal(restored.state._replace(ema=()), at(step))


@pytest.mark.slow  # compares times
def test_the_pause_of_a_save_is_that_of_a_copy(tmp_path, background):
    """Seconds for which the training waits, in one process, in turn: a ratio."""
    state = at(1)._replace(ema={"filler": jnp.ones((1 << 22,))})  # 16 MB
    seconds = {"whole": [], "copy": []}
    with (
        opened(tmp_path / "whole") as whole,
        opened(tmp_path / "copy", background=background) as copied,
    ):
        for step in range(1, 4):
            for name, saved in (("whole", whole), ("copy", copied)):
                began = time.perf_counter()
                saved.save(state._replace(step=jnp.int32(step)))
                seconds[name].append(time.perf_counter() - began)
                saved.wait()
    ratio = min(seconds["whole"]) / min(seconds["copy"])
    print(f"the pause of a save is {ratio:.1f} times shorter in the background")
    assert ratio > 2


FULL = """
import errno, os
from maknet_jax.training import checkpoint
original = checkpoint.Checkpoints._write
def write(self, step, *rest):
    if step == 8:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "8"))
    original(self, step, *rest)
checkpoint.Checkpoints._write = write
"""


@pytest.mark.slow
def test_a_failed_save_of_process_0_ends_all_processes_with_its_reason(data, tmp_path):
    changes = {"checkpoint_every": 4, "evaluate_every": 7.0}
    overrides = [f"--config.{text}" for text in toy.overrides(data, "linear", **changes)]
    command = ["train", "--config", "linear", "--workdir", tmp_path / "run", *overrides]
    with two_commands.start(*command, script=FULL) as both:
        codes, _ = both.codes(timeout=120)
        assert codes == [2, 2]
        for number in range(2):
            (line,) = both.lines(number)
            assert "No space left" in line and "checkpoints/8" in line
    steps = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps == ["4"]
