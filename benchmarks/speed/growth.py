"""How the cost of training, prediction, attribution and reading grows with the task.

    python benchmarks/speed/growth.py  # about eight minutes on two cores; --quick: a minute
    python benchmarks/speed/growth.py --axes batch,size

One axis varies at a time, on a small MAKNet: images per step, pixels per side, labels, layers of
the dense block; and records of the data set, for reading. Costs are divided by the work per image
(the FLOPs of its convolutions and dense layers) or by the records; "growth" is that quotient
relative to the smallest value of the axis, all values of an axis timed in turns. A growth above
`LIMIT` is marked: there the cost grows faster than the work.
"""

import argparse
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, timing
from benchmarks.speed import input_pipeline, streaming
from maknet_jax import models
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.data import pipeline, records
from maknet_jax.errors import InputError
from maknet_jax.models import layer_shapes

LIMIT = 1.15  # of the growth
STEPS = 4  # points of the path of an attribution
READ = 8_192  # records that are read of each data set, at most
BASE = {"batch": 8, "labels": 115, "layers": 2}  # and --size
AXES: dict[str, list[int]] = {
    "batch": [1, 4, 16, 64, 256],
    "size": [64, 128, 256, 512],
    "labels": [7, 115, 1000],
    "layers": [1, 2, 4, 8],
    "records": [1_000, 10_000, 100_000, 1_000_000],
}
QUICK: dict[str, list[int]] = {
    "batch": [1, 4],
    "size": [32, 64],
    "labels": [7, 30],
    "layers": [1, 2],
    "records": [1_000, 4_000],
}
COLUMNS = ("train", "predict", "attribute")
Seconds = dict[tuple[str, int], list[float]]  # by column and value of the axis


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--axes", type=harness.words, help=",".join(AXES))
    full = {"size": 64, "repeats": 3, "axes": list(AXES)}
    chosen = harness.parse(parser, argv, full=full, quick={"size": 32, "repeats": 1})
    for unknown in set(chosen.axes) - set(AXES):
        raise InputError(f"--axes {unknown!r} is unknown: choose from {', '.join(AXES)}")
    rows = []
    for axis in chosen.axes:
        values = (QUICK if chosen.quick else AXES)[axis]
        measure = read if axis == "records" else compute
        rows += measure(chosen, axis, values)
    table = [
        [
            f"{row['axis']} {row['value']:,}",
            row["column"],
            timing.format_spread(row["us"]),
            f"{row['work']:,.4g}",
            timing.format_spread(row["growth"]),
            "faster than its work" if row["growth"]["median"] > LIMIT else "",
        ]
        for row in rows
    ]
    notes = [
        f"a small MAKNet; unless it varies: size {chosen.size}, "
        + ", ".join(f"{name} {value}" for name, value in BASE.items()),
        f"work: MFLOP of a forward pass per image, or records; attribution: {STEPS} gradients",
        "growth: cost per unit of work relative to the first value of the axis",
    ]
    header = ["", "pass", "us per image or record", "work", "growth", ""]
    harness.report(__file__, argv, chosen, header, table, notes, {"rows": rows})


def small(size: int, batch: int, labels: int, layers: int) -> harness.Network:
    """A MAKNet of two dense blocks."""
    options = {
        "stem": 16,
        "blocks": (layers, layers),
        "growth_rates": (16, 16),
        "widths": (32, 32),
    }
    return harness.Network(
        "teacher",
        size=size,
        batch_size=batch,
        precision="float32" if jax.default_backend() == "cpu" else "bfloat16",
        labels=labels,
        devices=jax.devices()[:1],
        changes={f"model.options.{name}": value for name, value in options.items()},
    )


def flops(network: harness.Network, size: int, labels: int) -> float:
    """FLOPs of a forward pass per image: two per multiply-add of convolutions and dense layers."""
    options = network.config.model.options.to_dict()
    layers, _ = layer_shapes.trace(models.build("maknet", labels, **options), size)
    return sum(2 * math.prod(layer.outputs[:-1]) * layer.kernels for layer in layers)


def compute(chosen: argparse.Namespace, axis: str, values: Sequence[int]) -> list[dict[str, Any]]:
    """Times the passes of a network at each value of an axis; returns rows of the JSON."""
    timers: dict[tuple[str, int], Callable[[], float]] = {}
    work, images = {}, {}
    for value in values:
        setting = BASE | {"size": chosen.size} | {axis: value}
        network = small(**setting)
        work[value] = flops(network, setting["size"], setting["labels"]) / 1e6
        images[value] = setting["batch"]
        calls = {
            "train": network.train,
            "predict": network.predict,
            "attribute": attribution(network),
        }
        for column, call in calls.items():
            run = functools.partial(timing.elapsed, call)
            timers[column, value] = timing.timer(run, at_least=0.1 if chosen.quick else 0.5)
    seconds = timing.take_turns(timers, chosen.repeats)
    costs = {
        (column, value): [taken / images[value] for taken in times]
        for (column, value), times in seconds.items()
    }
    return rows_of(axis, values, COLUMNS, costs, work)


def attribution(network: harness.Network) -> Callable[[], Any]:
    """A call that explains one label of each image of the network's batch."""
    variables = jax.tree.map(jnp.copy, network.state.variables)  # training donates the state
    logit_fn = ig.logit_fn_of(network.assembly.model, variables)
    images = jnp.asarray(network.assembly.to_input(jnp.asarray(network.batch["image"])))
    targets = np.zeros((len(images), 1), int)
    chunk, rows = ig.fit(logit_fn, images, 1)

    def explain() -> np.ndarray:
        explained = ig.integrated_gradients(
            logit_fn,
            images,
            targets,
            0.0,
            steps=STEPS,
            method="midpoint",
            chunk=min(chunk, STEPS),
            rows=rows,
        )
        return explained.maps

    return explain


def read(chosen: argparse.Namespace, axis: str, values: Sequence[int]) -> list[dict[str, Any]]:
    """Opens data sets of many records and reads some; returns rows of the JSON.

    The shards are symbolic links to a few small ones. Opening is divided by all records, reading by
    those read, at most `READ`, in batches of 64.
    """
    costs: Seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        base = streaming.write_base(pathlib.Path(folder) / "base")
        paths = {
            value: input_pipeline.repeat_shards(
                base, pathlib.Path(folder) / str(value), "train", value
            ).path
            for value in values
        }
        for _ in range(chosen.repeats):
            for value, path in paths.items():
                start = time.perf_counter()
                dataset = records.open_dataset(path)
                source = dataset.source("train")
                opened = (time.perf_counter() - start) / len(source)
                batches = pipeline.train_batches(source, batch_size=64, seed=0, threads=2)
                rate = input_pipeline.images_per_second(batches, READ)
                costs.setdefault(("open", value), []).append(opened)
                costs.setdefault(("read", value), []).append(1 / rate)
    return rows_of(axis, values, ("open", "read"), costs, dict.fromkeys(values, 1.0))


def rows_of(
    axis: str,
    values: Sequence[int],
    columns: Sequence[str],
    costs: Seconds,
    work: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Rows of the JSON, by column.

    Args:
      axis: what varies.
      values: its values; the growth is relative to the first.
      columns: what was timed.
      costs: seconds per image or record, one per turn.
      work: per image or record.
    """
    rows = []
    for column in columns:
        first = [cost / work[values[0]] for cost in costs[column, values[0]]]
        for value in values:
            times = costs[column, value]
            row = {"axis": axis, "value": value, "column": column, "work": work[value]}
            row["us"] = timing.spread([1e6 * cost for cost in times])
            row["growth"] = timing.ratios([cost / work[value] for cost in times], first)
            rows.append(row)
    return rows


if __name__ == "__main__":
    harness.run(main)
