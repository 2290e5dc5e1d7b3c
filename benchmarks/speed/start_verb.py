"""Times one start of a verb: the process that startup.py runs repeatedly.

    python benchmarks/speed/start_verb.py VERB OPTIONS ...

Runs `maknet VERB OPTIONS ...` and prints JSON as its last line. In seconds: `cpu` (user and system,
all threads), `imports` (CPU, of JAX and the verb's module), `total`, `tracing`, `lowering` and
`compiling` (or loading from the cache). Counts: `modules`, `traced`, `compiled`. `peak_mb` is the
largest resident memory of the process.
"""

import time

START = time.perf_counter()

import importlib  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

EVENTS = {
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compiling",
}


def cpu() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(*argv: str) -> int:
    """Runs the verb, prints the JSON and returns the exit code."""
    import jax

    from maknet_jax import cli

    durations: dict[str, list[float]] = {name: [] for name in EVENTS.values()}

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        name = EVENTS.get(event.rpartition("/")[2])
        if name is not None:
            durations[name].append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listener)
    importlib.import_module(f"maknet_jax.{argv[0]}")
    imported = cpu()
    code = cli.main(argv)
    result: dict[str, Any] = {
        "total": time.perf_counter() - START,
        "cpu": cpu(),
        "imports": imported,
    }
    result |= {name: sum(each) for name, each in durations.items()}
    result |= {"traced": len(durations["tracing"]), "compiled": len(durations["compiling"])}
    result["modules"] = len(sys.modules)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["peak_mb"] = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
