"""Images per second of the networks in prediction and training, relative to the matmul peak.

    python benchmarks/speed/networks.py [--batches 8,32,64] [--precision float32,bfloat16] [--quick]

All networks of one batch size and precision are timed in turns, so that their ratios refer to the
same period. Measurements that would exceed --budget are skipped; their rows say so.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from benchmarks import harness, timing
from maknet_jax.cli import options
from maknet_jax.model_table import CONFIGS, measure

FULL = {
    "size": 256,
    "repeats": 5,
    "batches": [8, 32, 64],
    "precision": ["float32", "bfloat16"],
    "networks": list(CONFIGS),
}
QUICK = {"size": 128, "repeats": 2, "batches": [4], "precision": ["float32"]}
PASSES = {"predict": 1, "train": 3}  # in forward passes; a backward pass costs two


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--batches", type=harness.counts, help="images per step: 8,32,64")
    parser.add_argument("--precision", type=harness.precisions, help="float32,bfloat16")
    parser.add_argument("--networks", type=harness.words, help="networks, or configs")
    parser.add_argument(
        "--budget",
        type=options.count,
        default=600,
        help="maximal seconds of one measurement (default: 600)",
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    rows: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    for precision in chosen.precision:
        seconds_per_image: dict[tuple[str, str], float] = {}
        matmul_seconds: list[float] = []
        for batch in sorted(chosen.batches):
            seconds, matmul_flops = _time_batch(chosen, precision, batch, seconds_per_image)
            matmul_seconds += seconds.pop("matmul")
            rows += _rows(chosen, precision, batch, seconds, seconds_per_image)
        peaks[precision] = jax.device_count() * matmul_flops / min(matmul_seconds)
    for row in rows:
        flops = _flops(row["network"], chosen.size)
        row["peak_share"] = None
        if flops and "seconds" in row:
            images = row["images_per_second"]["median"]
            row["peak_share"] = images * flops * PASSES[row["step"]] / peaks[row["precision"]]
    first = harness.config_of(chosen.networks[0])[0]
    harness.report(
        __file__,
        argv,
        chosen,
        ["network", "precision", "batch", "step", "images/s", "share of peak", f"{first} speed-up"],
        [_cells(row) for row in rows],
        [
            f"{chosen.size} x {chosen.size} pixels, {jax.device_count()} device(s); medians of "
            f"{chosen.repeats} turns (lowest to highest)",
            "matmul peak of one device times the number of devices: "
            + ", ".join(f"{peak / 1e9:,.0f} GFLOP/s {name}" for name, peak in peaks.items()),
            "FLOPs in the share of peak: convolutions and dense layers, MAKConv as four "
            "convolutions, a training step as three forward passes",
        ],
        {"matmul_flops_per_second": peaks, "rows": rows},
    )


def _time_batch(
    chosen: argparse.Namespace,
    precision: str,
    batch: int,
    seconds_per_image: Mapping[tuple[str, str], float],
) -> tuple[dict[Any, list[float]], int]:
    """Times all networks at one batch size.

    Args:
      chosen: the options.
      precision: float32 or bfloat16.
      batch: images per step.
      seconds_per_image: (network, step) -> at the previous batch size, to estimate the duration.

    Returns:
      (seconds, FLOPs of the matrix product): seconds per step by "matmul" and (network, step);
      what would exceed the budget is missing.
    """
    call, flops = timing.matmul(precision)
    timers: dict[Any, Callable[[], float]] = {
        "matmul": timing.timer(functools.partial(timing.elapsed, call))
    }
    for config in chosen.networks:
        steps = [
            step
            for step in PASSES
            if seconds_per_image.get((config, step), 0) * batch * (chosen.repeats + 2)
            <= chosen.budget
        ]
        if not steps:
            continue
        network = harness.Network(config, size=chosen.size, batch_size=batch, precision=precision)
        for step in steps:
            run = functools.partial(timing.elapsed, getattr(network, step))
            timers[config, step] = timing.timer(run)
    return timing.take_turns(timers, chosen.repeats), flops


def _rows(
    chosen: argparse.Namespace,
    precision: str,
    batch: int,
    seconds_by_step: Mapping[Any, list[float]],
    seconds_per_image: dict[tuple[str, str], float],
) -> Iterator[dict[str, Any]]:
    """Yields a row per network and step; updates `seconds_per_image`."""
    for network in chosen.networks:
        for step in PASSES:
            row = {"network": network, "precision": precision, "batch": batch, "step": step}
            seconds = seconds_by_step.get((network, step))
            if seconds is None:
                row["skipped_seconds_a_step"] = seconds_per_image[network, step] * batch
            else:
                row["seconds"] = seconds
                row["images_per_second"] = timing.rates(batch, seconds)
                seconds_per_image[network, step] = timing.spread(seconds)["median"] / batch
                if first := seconds_by_step.get((chosen.networks[0], step)):
                    row["first_is_faster"] = timing.ratios(seconds, first)
            yield row


def _flops(network: str, size: int) -> int | None:
    """FLOPs of the forward pass of one image; None for a custom config."""
    return sum(cost.flops for cost in measure(network, size=size)) if network in CONFIGS else None


def _cells(row: Mapping[str, Any]) -> list[object]:
    name = harness.config_of(row["network"])[0]
    cells = [name, row["precision"], row["batch"], row["step"]]
    if "seconds" not in row:
        return [*cells, f"skipped: about {row['skipped_seconds_a_step']:.0f} s per step", "", ""]
    share = "" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
    faster = row.get("first_is_faster")
    speed_up = timing.format_spread(faster, "x") if faster else ""
    return [*cells, timing.format_spread(row["images_per_second"]), share, speed_up]


if __name__ == "__main__":
    harness.run(main)
