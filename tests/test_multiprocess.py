"""Two processes (gloo on CPU) train as one does: each reads its part of every batch."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy

from maknet_jax import train

SCRIPT = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, number, data, folder = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
sys.path.insert(0, {tests!r})
import toy
from maknet_jax import train
train.train(toy.config(data, "linear"), folder)
assert jax.process_count() == 2 and jax.device_count() == 2
"""


def test_two_processes_are_one(tmp_path):
    data = toy.write(tmp_path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = SCRIPT.format(tests=str(pathlib.Path(__file__).parent))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(number), data, tmp_path / "two"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [worker.communicate(timeout=180)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    train.train(toy.config(data, "linear"), tmp_path / "one", devices=jax.devices()[:2])
    two, one = (toy.lines(tmp_path / name) for name in ("two", "one"))
    assert len(two) == len(one) > 5
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    said = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert len([line for line in said if line["message"].startswith("linear:")]) == 1
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")
    ]
    np.testing.assert_allclose(*(s["best_val_auc"] for s in summaries), atol=1e-5)
