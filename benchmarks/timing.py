"""Interleaved timing: seconds per call, measured in turns, with medians and ranges."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Spread = dict[str, float]  # median, low, high
Key = TypeVar("Key", bound=Hashable)


def matmul(precision: str) -> tuple[Callable[[], jax.Array], int]:
    """(call, FLOPs) of a square matrix product that is large enough to saturate the device."""
    edge = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (edge, edge), precision)
    product = jax.jit(jnp.dot)
    return functools.partial(product, a, a), 2 * edge**3


def elapsed(call: Callable[[], Any], calls: int) -> float:
    """Seconds that `calls` calls take until all results are ready."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
        if jax.default_backend() == "cpu":  # else independent calls would share the cores
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def timer(run: Callable[[int], float], *, at_least: float = 0.5) -> Callable[[], float]:
    """Returns a function that measures seconds per call.

    Args:
      run: run(calls) -> seconds. Runs once here to compile and once to estimate its duration.
      at_least: minimal seconds per measurement, to make the overhead of the clock and of dispatch
        negligible.
    """
    run(1)
    calls = max(1, math.ceil(at_least / run(1)))
    return lambda: run(calls) / calls


def take_turns(timers: Mapping[Key, Callable[[], float]], repeats: int) -> dict[Key, list[float]]:
    """Measures in turns, so that a slow period of the machine affects all timers alike.

    Returns:
      name -> `repeats` measurements.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, measure in timers.items():
            seconds[name].append(measure())
    return seconds


def spread(values: Iterable[float]) -> Spread:
    """Median, lowest and highest value."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rates(amount: float, seconds: Iterable[float]) -> Spread:
    """The spread of amount / seconds."""
    return spread(amount / value for value in seconds)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """The spread of the speed-up of `fast` over `slow`, turn by turn."""
    return spread(a / b for a, b in zip(slow, fast, strict=True))


def format_spread(values: Spread, unit: str = "") -> str:
    """A `Spread` as a table cell."""
    ordered = (values[name] for name in ("median", "low", "high"))
    median, low, high = (f"{v:,.0f}{unit}" if v >= 999.5 else f"{v:.3g}{unit}" for v in ordered)
    return median if low == high else f"{median} ({low} to {high})"


def verdict(ratio: Spread, target: float) -> str:
    """Whether the median of a ratio reaches its target, as a table cell."""
    return f"at least {target}x: {'reached' if ratio['median'] >= target else 'missed'}"
