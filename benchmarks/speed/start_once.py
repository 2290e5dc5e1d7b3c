"""Times one start of `maknet train`: the process that startup.py runs repeatedly.

    python benchmarks/speed/start_once.py CONFIG WORKDIR FIELD=VALUE ...

In a new workdir it is stopped by SIGTERM after its first step; in an existing one it resumes and
runs to the end. Prints JSON, in seconds: `imports`, `first_step` (from the end of the imports),
`compile` (all programs) and `longest` (one program), and whether it was `stopped`.
"""

import time

START = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402

import jax  # noqa: E402

from maknet_jax import train  # noqa: E402
from maknet_jax.cli import options  # noqa: E402
from maknet_jax.errors import Stopped  # noqa: E402
from maknet_jax.runs import config  # noqa: E402


def stop_when_handled(before: object) -> None:
    """Sends SIGTERM once training has replaced the handler `before`: it saves after its step."""
    while signal.getsignal(signal.SIGTERM) is before:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def main(name: str, workdir: str, *changes: str) -> None:
    """Trains and prints the JSON."""
    compile_seconds: list[float] = []

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compile_seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listener)
    options.start_jax()
    imported = time.perf_counter()
    if not os.path.exists(workdir):
        before = signal.getsignal(signal.SIGTERM)
        threading.Thread(target=stop_when_handled, args=[before], daemon=True).start()
    stopped = False
    try:
        train.train(config.load(name, changes), workdir)
    except Stopped:
        stopped = True
    result = {"imports": imported - START, "first_step": time.perf_counter() - imported}
    result |= {"compile": sum(compile_seconds), "longest": max(compile_seconds)}
    print(json.dumps(result | {"stopped": stopped}))


if __name__ == "__main__":
    main(*sys.argv[1:])
