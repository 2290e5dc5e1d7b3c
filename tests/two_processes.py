"""Runs a script in two processes of one JAX cluster (gloo on CPU), with one device each."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent
START = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
tests, address, number, *arguments = sys.argv[1:]
sys.path.insert(0, tests)
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
"""


def run(script, *arguments, timeout):
    """Returns the lines that each printed; `script` may read its `number` and `arguments`.

    If one fails, the other is killed and the error shows the stderr of both.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with contextlib.ExitStack() as stack:
        workers, printed, messages = [], [], []
        for number in range(2):
            for files in (printed, messages):
                files.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            command = [sys.executable, "-c", START + script, TESTS, address, str(number)]
            workers.append(
                subprocess.Popen(
                    [*command, *arguments], env=environment, stdout=printed[-1], stderr=messages[-1]
                )
            )
            stack.callback(workers[-1].wait)
            stack.callback(workers[-1].kill)
        ends = time.monotonic() + timeout
        while any(worker.poll() is None for worker in workers) and time.monotonic() < ends:
            if any(worker.returncode for worker in workers):
                break
            time.sleep(0.05)
        for files in (printed, messages):
            for file in files:
                file.seek(0)
        codes = [worker.returncode for worker in workers]
        assert codes == [0, 0], [codes, *(file.read() for file in messages)]
        return [file.read().splitlines() for file in printed]
