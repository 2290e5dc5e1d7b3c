"""MAKNet through 20 kills, and 10,000 steps in constant memory and with constant file handles."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import toy
from runs import NOISE, equal_runs

from maknet_jax import files
from maknet_jax.runs import config as configs

START = """
import json, os, signal, sys
from maknet_jax import cli
from maknet_jax.data import pipeline
from maknet_jax.training import checkpoint
path, workdir, where, number = sys.argv[1:]
mixed_batches, calls = pipeline.mixed_batches, []

def kill_at(name):
    if name == where:
        calls.append(name)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

def killing(module, name):
    original = getattr(module, name)
    def call(*args, **options):
        kill_at(name)
        return original(*args, **options)
    setattr(module, name, call)

def taken(count):
    kill_at("batch")
    if where == "measure" and count % int(number) == int(number) * 3 // 20:  # between saves
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        row = count, int(status["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd"))
        print(*row, int(status["Threads"]), flush=True)

def batches(*args, **options):
    for count, batch in enumerate(mixed_batches(*args, **options)):
        taken(count)
        yield batch

pipeline.mixed_batches = batches
killing(checkpoint, "digests")  # before a checkpoint is written
killing(checkpoint.Checkpoints, "_check_written")  # before it is read again
sys.exit(cli.main(["train", "--config", path, "--workdir", workdir]))
"""


def start(config, folder, where="nowhere", number=0):
    """Trains in a process of its own, with one device."""
    path = folder.parent / f"{folder.name}.json"
    files.write_json(path, configs.to_json(config))
    return subprocess.run(
        [sys.executable, "-c", START, path, folder, where, str(number)],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_student_maknet_is_the_same_after_20_kills(data, tmp_path):
    """With BatchNorm, dropout, augmentation, averaged weights, and two streams of images."""
    pseudo = toy.write_pseudo(tmp_path / "labels", toy.write_unlabelled(tmp_path / "images"))
    changes = {"pseudo.path": str(pseudo), "pseudo.batch_size": 16, "ema_decay": 0.8}
    changes |= NOISE | {"epochs": 20.0, "checkpoint_every": 3}  # 100 steps
    config = toy.config(data, "smoke", changes)
    assert start(config, tmp_path / "whole").returncode == 0
    rng, resumed = np.random.default_rng(0), set()
    for kill in range(20):
        where = ("batch", "batch", "digests", "_check_written")[kill % 4]
        number = int(rng.integers(4, 9) if where == "batch" else rng.integers(1, 4))
        ended = start(config, tmp_path / "run", where, number)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        resumed |= {line for line in ended.stderr.splitlines() if "resuming from step" in line}
    ended = start(config, tmp_path / "run")
    assert ended.returncode == 0 and len(resumed) > 8, ended.stderr
    print(f"20 kills, resumed at {len(resumed)} different steps")
    equal_runs(tmp_path / "whole", tmp_path / "run", config)


@pytest.mark.slow
def test_10_000_steps_need_constant_memory_and_handles(data, tmp_path):
    """With 50 checkpoints and 10 validations."""
    changes = {"epochs": 2000.0, "evaluate_every": 200.0, "checkpoint_every": 200, "log_every": 50}
    config = toy.config(data, "linear", changes)
    ended = start(config, tmp_path / "run", "measure", 1000)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    rows = [list(map(int, line)) for line in lines if len(line) == 4 and "".join(line).isdigit()]
    steps, memory, handles, threads = np.array(rows).T
    assert steps.tolist() == list(range(150, 10_000, 1000))
    print(json.dumps({"MiB": (memory / 1024).round(1).tolist(), "handles": handles.tolist()}))
    assert memory[2:].max() < memory[1] + 24 * 1024  # the first steps and validation compile
    assert handles[2:].max() <= handles[1] + 10 and threads[2:].max() <= threads[1] + 10
