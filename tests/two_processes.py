"""Runs a script on two processes that know each other (gloo on CPU), with a device each."""

import os
import pathlib
import socket
import subprocess
import sys

START = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, number, *arguments = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
"""


def run(script, *arguments, timeout):
    """The lines that each has printed; `script` knows its `number` and its `arguments`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": pathlib.Path(__file__).parent}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", START + script, address, str(number), *arguments],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [worker.communicate(timeout=timeout) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [printed.splitlines() for printed, _ in outputs]
