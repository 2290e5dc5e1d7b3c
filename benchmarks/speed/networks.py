"""Images per second of the networks, predicting and training, beside the machine's matmul peak.

    python benchmarks/speed/networks.py [--batches 8,32,64] [--precision float32,bfloat16] [--quick]

All networks of one batch and precision take turns, so that their ratios are of one time. A timing
that would take longer than --budget is left out, and its row says so.
"""

import functools

import jax

from benchmarks import harness
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
PASSES = {"predict": 1, "train": 3}  # the gradient costs two forwards


def main(argv=None):
    """Measures, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--batches", type=harness.counts, help="images a step: 8,32,64")
    parser.add_argument("--precision", type=harness.precisions, help="float32,bfloat16")
    parser.add_argument("--networks", type=harness.words, help="networks, or config pages")
    parser.add_argument(
        "--budget", type=options.count, default=600, help="seconds a timing may take (default: 600)"
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    rows, peaks = [], {}
    for precision in chosen.precision:
        latest, matmuls = {}, []
        for batch in sorted(chosen.batches):
            timed, flops = _one_batch(chosen, precision, batch, latest)
            matmuls += timed.pop("matmul")
            rows += _rows(chosen, precision, batch, timed, latest)
        peaks[precision] = jax.device_count() * flops / min(matmuls)
    for row in rows:
        flops = _flops(row["network"], chosen.size)
        row["peak_share"] = None
        if flops and "seconds" in row:
            images = row["images_per_second"]["median"]
            row["peak_share"] = images * flops * PASSES[row["step"]] / peaks[row["precision"]]
    first = harness.page_of(chosen.networks[0])[0]
    harness.report(
        __file__,
        argv,
        chosen,
        ["network", "precision", "batch", "step", "images/s", "of the peak", f"{first} is faster"],
        [_cells(row) for row in rows],
        [
            f"{chosen.size} x {chosen.size} pixels, {jax.device_count()} device(s); medians of "
            f"{chosen.repeats} turns (lowest to highest)",
            "matmul peak of all devices, each by itself: "
            + ", ".join(f"{peak / 1e9:,.0f} GFLOP/s {name}" for name, peak in peaks.items()),
            "FLOPs of the peak's share: convolutions and dense layers, MAKConv as four "
            "convolutions, a training step as three forwards",
        ],
        {"matmul_flops_per_second": peaks, "rows": rows},
    )


def _one_batch(chosen, precision, batch, latest):
    """(timer's name -> seconds a step, FLOPs of the matmul); `latest`: seconds an image so far."""
    call, flops = harness.matmul(precision)
    timers = {"matmul": harness.timer(functools.partial(harness.elapsed, call))}
    for network in chosen.networks:
        steps = [
            step
            for step in PASSES
            if latest.get((network, step), 0) * batch * (chosen.repeats + 2) <= chosen.budget
        ]
        if not steps:
            continue
        made = harness.Network(network, size=chosen.size, batch_size=batch, precision=precision)
        for step in steps:
            run = functools.partial(harness.elapsed, getattr(made, step))
            timers[network, step] = harness.timer(run)
    return harness.take_turns(timers, chosen.repeats), flops


def _rows(chosen, precision, batch, timed, latest):
    for network in chosen.networks:
        for step in PASSES:
            row = {"network": network, "precision": precision, "batch": batch, "step": step}
            seconds = timed.get((network, step))
            if seconds is None:
                row["skipped_seconds_a_step"] = latest[network, step] * batch
            else:
                row["seconds"] = seconds
                row["images_per_second"] = harness.rates(batch, seconds)
                latest[network, step] = harness.spread(seconds)["median"] / batch
                if first := timed.get((chosen.networks[0], step)):
                    row["first_is_faster"] = harness.ratios(seconds, first)
            yield row


def _flops(network, size):
    """FLOPs of one image's forward, or None for a page of the user's own."""
    return sum(part[2] for part in measure(network, size=size)) if network in CONFIGS else None


def _cells(row):
    name = harness.page_of(row["network"])[0]
    cells = [name, row["precision"], row["batch"], row["step"]]
    if "seconds" not in row:
        return [*cells, f"left out: about {row['skipped_seconds_a_step']:.0f} s a step", "", ""]
    share = "" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
    faster = row.get("first_is_faster")
    shown = harness.shown(faster, "x") if faster else ""
    return [*cells, harness.shown(row["images_per_second"]), share, shown]


if __name__ == "__main__":
    harness.run(main)
