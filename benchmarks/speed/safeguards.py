"""What the safeguards of the training loop cost per step, in the same process and in turns.

    python benchmarks/speed/safeguards.py [--networks maknet,linear] [--quick]

- `skip_nonfinite`: the training step with it, against the step without it.
- The stop flag: two processes of one cluster on this host agree after each step on whether to stop.
  The request travels in the batch, and its maximum is a metric of the step. Compared with no
  agreement and with an all-gather per step; the linear model, whose step is the shortest.
"""

import argparse
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import harness, timing
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.runs import steps
from maknet_jax.training import sharding

WITHOUT, WITH, GATHERED = "without", "with", "with an all-gather"
_PROCESSES, _FLAG_SIZE, _FLAG_BATCH = 2, 32, 8


def main(argv: Sequence[str] | None = None) -> None:
    """Times both, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--networks", type=harness.words, help="networks, or configs")
    parser.add_argument("--batch", type=options.count, help="images per step")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # ADDRESS,NUMBER: one of the two
    full = {"batch": 8, "size": 128, "repeats": 5, "networks": ["maknet", "linear"]}
    quick = {"batch": 8, "size": 32, "repeats": 3, "networks": ["linear"]}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    if chosen.process:
        address, number = chosen.process.split(",")
        print(json.dumps(_time_flag(address, int(number), chosen.repeats)))
        return
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for name in chosen.networks:
        seconds = _time_skipping(name, chosen)
        rows.append(_add(results, f"skip_nonfinite, {name}", WITH, seconds))
    seconds = _run_processes(chosen.repeats)
    for kind in (WITH, GATHERED):
        rows.append(_add(results, f"stop flag, {kind}", kind, seconds))
    notes = [
        f"{chosen.size} x {chosen.size}, batch {chosen.batch}; the stop flag: linear model, "
        f"{_FLAG_SIZE} x {_FLAG_SIZE}, {_PROCESSES} processes; ratio to the step without it, turn "
        "by turn; medians (lowest to highest)"
    ]
    header = ["", "ms per step", "ratio"]
    harness.report(__file__, argv, chosen, header, rows, notes, {"rows": results})


def _add(
    results: list[dict[str, Any]], name: str, kind: str, seconds: Mapping[str, list[float]]
) -> list[str]:
    """Adds a row to `results`; returns its cells."""
    milliseconds = timing.spread([1e3 * value for value in seconds[kind]])
    ratio = timing.ratios(seconds[kind], seconds[WITHOUT])
    results.append({"what": name, "ms_per_step": milliseconds, "ratio": ratio})
    return [name, timing.format_spread(milliseconds), timing.format_spread(ratio)]


def _time_skipping(name: str, chosen: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step with and without `skip_nonfinite`, in turns."""
    timers = {}
    for kind, most in ((WITHOUT, 0), (WITH, 10)):
        network = harness.Network(
            name,
            size=chosen.size,
            batch_size=chosen.batch,
            precision="float32",
            changes={"skip_nonfinite": most},
        )
        timers[kind] = timing.timer(functools.partial(timing.elapsed, network.train))
    return timing.take_turns(timers, chosen.repeats)


def _run_processes(repeats: int) -> dict[str, list[float]]:
    """Seconds per step of the kinds of agreement, as process 0 of two measures them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "--repeats", str(repeats), "--process"]
    workers = [
        subprocess.Popen(
            [*command, f"{address},{number}"], env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(_PROCESSES)
    ]
    try:
        printed = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(worker.returncode for worker in workers):
        raise InputError("a process of the stop flag's measurement failed: see its message above")
    return json.loads(printed[0].splitlines()[-1])


def _time_flag(address: str, number: int, repeats: int) -> dict[str, list[float]]:
    """The work of one process."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=_PROCESSES, process_id=number)
    network = harness.Network(
        "linear",
        size=_FLAG_SIZE,
        batch_size=_FLAG_BATCH,
        precision="float32",
        changes={"skip_nonfinite": 0},
    )
    step, mesh = network.assembly.train_step, network.assembly.mesh
    assert step is not None  # assembled for training
    key, ids = harness.replicated_key(mesh), ["image"] * _FLAG_BATCH

    def train(kind: str, calls: int) -> None:
        """`calls` steps of the training loop, with one in flight."""
        loop = steps.Steps(lambda: False, print, save_minutes=0, most_skipped=10)
        for count in range(calls):
            batch: dict[str, np.ndarray] = network.batch
            if kind == WITH:
                batch = loop.mark(batch)
            network.state, values = step(network.state, sharding.put_batch(mesh, batch), key)
            loop.add(count, values, ids)
            if kind == WITH:
                loop.request()
            elif kind == GATHERED:
                sharding.any_process(False)
        loop.settle()

    calls = 200  # the same in both processes, or a collective would wait for ever
    timers: dict[str, Callable[[], float]] = {}
    for kind in (WITHOUT, WITH, GATHERED):
        train(kind, 2)
        timers[kind] = functools.partial(_seconds, functools.partial(train, kind, calls), calls)
    return timing.take_turns(timers, repeats)


def _seconds(run: Callable[[], None], calls: int) -> float:
    return timing.elapsed(run, 1) / calls


if __name__ == "__main__":
    if "--process" in sys.argv:  # JAX must not start before the cluster
        main()
    else:
        harness.run(main)
