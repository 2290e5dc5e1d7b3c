"""Runs one `maknet` command in two processes of `--distributed`, and sends them signals."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent
# Batches of a verb come slowly enough for a signal to arrive between them.
START = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import jax
from maknet_jax.data import pipeline
from maknet_jax.ct import read_ahead
from maknet_jax.explain import results
def slowly(function, pause):
    def call(*args, **options):
        for item in function(*args, **options):
            print("batch", flush=True)
            time.sleep(pause)
            yield item
    return call
pipeline.ordered_batches = slowly(pipeline.ordered_batches, 0.3)
pipeline.train_batches = slowly(pipeline.train_batches, 0.02)
results.read_ahead = slowly(results.read_ahead, 0.3)
"""
END = """
from maknet_jax.cli import main
sys.exit(main())
"""


class Commands:
    """Two processes of one command."""

    def __init__(self, workers, printed, messages):
        self.workers, self._printed, self._messages = workers, printed, messages

    def _read(self, files):
        return [os.pread(file.fileno(), 1 << 20, 0).decode() for file in files]

    def wait_for_batch(self, count=2, timeout=60):
        """Waits until both have taken `count` batches."""
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            if all(text.count("batch\n") >= count for text in self._read(self._printed)):
                return
            assert all(worker.poll() is None for worker in self.workers), self.messages
            time.sleep(0.02)
        raise AssertionError(self.messages)

    def send(self, number, *targets):
        """Sends a signal to some of the processes."""
        for target in targets:
            self.workers[target].send_signal(number)

    def codes(self, timeout=60):
        """The exit codes of both, and the seconds until the last one ended."""
        began = time.monotonic()
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.1, began + timeout - time.monotonic()))
        return [worker.returncode for worker in self.workers], time.monotonic() - began

    @property
    def messages(self):
        """What each printed on standard error."""
        return self._read(self._messages)

    def lines(self, number):
        """The lines of a process on standard error that begin as those of `exit_code`."""
        return re.findall(r"^maknet: .*$", self.messages[number], re.MULTILINE)


@contextlib.contextmanager
def start(*arguments, script="", environment=(), distributed=True):
    """Starts `maknet ARGUMENTS` twice.

    Args:
      *arguments: of the command.
      script: Python code that runs before it, with `number` of the process.
      environment: variables of both.
      distributed: adds --distributed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        workers, printed, messages = [], [], []
        for number in range(2):
            for files in (printed, messages):
                files.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            variables = {
                **os.environ,
                "XLA_FLAGS": "",
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
                **dict(environment),
            }
            code = f"number = {number}\n{START}{script}{END}"
            command = [sys.executable, "-c", code, str(TESTS), *map(str, arguments)]
            workers.append(
                subprocess.Popen(
                    [*command, *["--distributed"] * distributed],
                    env=variables,
                    stdout=printed[-1],
                    stderr=messages[-1],
                )
            )
            stack.callback(workers[-1].wait)
            stack.callback(workers[-1].kill)
        yield Commands(workers, printed, messages)
