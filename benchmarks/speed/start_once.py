"""One start of `maknet train`, timed: the process that `startup.py` starts again and again.

    python benchmarks/speed/start_once.py CONFIG WORKDIR FIELD=VALUE ...

In a new folder it is stopped after its first step, as by a cluster; in an old one it goes on to the
end. Prints JSON: seconds of imports, to the first step's end, of compiling in all and at most, and
whether it was stopped.
"""

import time

BEGAN = time.perf_counter()

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


def stop_once_it_listens(before):
    """A signal as soon as training has a handler: it ends the step that it is in, and saves."""
    while signal.getsignal(signal.SIGTERM) is before:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def main(page, folder, *changes):
    """Trains, and prints."""
    compiled = []

    def note(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    options.start_jax()
    imported = time.perf_counter()
    if not os.path.exists(folder):
        before = signal.getsignal(signal.SIGTERM)
        threading.Thread(target=stop_once_it_listens, args=[before], daemon=True).start()
    stopped = False
    try:
        train.train(config.load(page, changes), folder)
    except Stopped:
        stopped = True
    found = {"imports": imported - BEGAN, "first_step": time.perf_counter() - imported}
    found |= {"compile": sum(compiled), "longest": max(compiled), "stopped": stopped}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
