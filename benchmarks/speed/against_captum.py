"""Integrated Gradients in JAX and in Captum with the same weights on the CPU, timed in turns.

    python benchmarks/speed/against_captum.py --torch-python PYTHON [--steps 50] [--quick]

PYTHON is any Python with torch, captum and NumPy. The maps are compared before anything is timed.
Both compute in float32 on all cores, with the same number of path points per call. The machine must
be idle.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks import harness, timing
from benchmarks.speed import torch_worker
from maknet_jax import files
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.cli import options
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import workdir

SCRIPT = pathlib.Path(__file__).resolve().with_name("torch_attribution.py")
TOLERANCE = torch_worker.TOLERANCE  # of the largest value of a map
TARGETS = {"one": 1.2, "several": 2.0, "bare": 0.9}
FULL = {"size": 256, "steps": 50, "repeats": 5, "networks": ["maknet", "vgg16"]}
QUICK = {"size": 64, "steps": 10, "repeats": 2, "networks": ["maknet"]}
LABELS = 5  # labels of one image that "several" explains

Seconds = Mapping[tuple[str, str, str], Sequence[float]]  # (network, call, framework) -> seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Compares the maps, measures, prints the table and writes the JSON."""
    parser = torch_worker.parser(__file__, __doc__)
    parser.add_argument("--steps", type=options.count, help="points of the path")
    parser.add_argument("--networks", type=harness.words, help="networks, or configs")
    parser.add_argument("--workdir", help="use these trained weights; with a single network")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    timers, rows = {}, {}
    with torch_worker.Worker(chosen.torch_python, SCRIPT) as worker:
        for config in chosen.networks:
            name = harness.config_of(config)[0]
            rows[name], calls = compare(name, _network(config, chosen), worker, chosen.steps)
            for call_name, call in calls.items():
                run = functools.partial(timing.elapsed, call)
                timers[name, call_name, "jax"] = timing.timer(run)
            for call_name in ("one", "several"):
                timers[name, call_name, "captum"] = worker.timer(name, call_name)
        seconds = timing.take_turns(timers, chosen.repeats)
    cells = []
    for name, row in rows.items():
        cells += _summarize(name, row, seconds, chosen.steps)
    differences = ", ".join(
        f"{name} {method} {values['largest']:.1g} (99 % of pixels below {values['p99']:.1g})"
        for name, row in rows.items()
        for method, values in row["differences"].items()
    )
    harness.report(
        __file__,
        argv,
        chosen,
        ["network", "labels", "JAX gradients/s", "Captum gradients/s", "JAX speed-up", "target"],
        cells,
        [
            f"{chosen.steps} midpoints of one image of {chosen.size} x {chosen.size}, float32",
            "largest difference between the maps relative to the largest value "
            f"(target: {TOLERANCE}): {differences}",
        ],
        {"torch": worker.versions, "rows": rows, "aims": TARGETS},
    )


def _summarize(name: str, row: dict[str, Any], seconds: Seconds, steps: int) -> list[list[str]]:
    """Adds rates and speed-ups to the JSON row of a network; returns its lines of the table."""
    row["seconds"] = {"/".join(key[1:]): value for key, value in seconds.items() if key[0] == name}
    cells = []
    for call_name, labels in (("one", 1), ("several", LABELS)):
        jax_seconds = seconds[name, call_name, "jax"]
        captum_seconds = seconds[name, call_name, "captum"]
        rates = [timing.rates(steps * labels, times) for times in (jax_seconds, captum_seconds)]
        ratio = timing.ratios(captum_seconds, jax_seconds)
        row[call_name] = {"jax": rates[0], "captum": rates[1], "ratio": ratio}
        cells.append(
            [
                name,
                f"{labels} per image",
                *map(timing.format_spread, rates),
                timing.format_spread(ratio, "x"),
                timing.verdict(ratio, TARGETS[call_name]),
            ]
        )
    bare_seconds = seconds[name, "bare", "jax"]
    share = timing.ratios(bare_seconds, seconds[name, "one", "jax"])
    row["of_the_bare_gradient"] = share
    cells.append(
        [
            name,
            "bare gradient",
            timing.format_spread(timing.rates(steps, bare_seconds)),
            "",
            f"one label reaches {timing.format_spread(share)} of it",
            timing.verdict(share, TARGETS["bare"]),
        ]
    )
    return cells


def _network(config: str, chosen: argparse.Namespace) -> harness.Network:
    """The network with initial weights and random images, or trained weights and a test image."""
    create = functools.partial(
        harness.Network,
        config,
        size=chosen.size,
        batch_size=1,
        precision="float32",
        devices=jax.devices()[:1],
    )
    if not chosen.workdir:
        return create()
    params, batch_stats, _ = workdir.open_weights(chosen.workdir)[:3]
    dataset = files.read_json(pathlib.Path(chosen.workdir) / "dataset.json")
    network = create(
        labels=len(dataset["labels"]),
        place=lambda _: {"params": params, "batch_stats": batch_stats},
    )
    network.batch["image"] = records.open_dataset(dataset["path"]).source("test")[0].image[None]
    return network


def compare(
    name: str, network: harness.Network, worker: torch_worker.Worker, steps: int
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """Sends the network to PyTorch and compares the maps.

    Args:
      name: of the network.
      network: the network with one image.
      worker: the process with Captum.
      steps: points of the path.

    Returns:
      (row, calls): differences and chunk size for the JSON, and the calls to time: "one" label,
      "several" labels, and "bare", the gradients alone.

    Raises:
      InputError: the maps differ.
    """
    model = network.assembly.model

    def logits(variables: dict[str, Any], x: jax.Array) -> jax.Array:
        output: Any = model.apply(variables, x, train=False)
        return output.logits

    logit_fn = Partial(logits, network.state.variables)
    images = jnp.asarray(network.assembly.to_input(jnp.asarray(network.batch["image"])))
    labels = np.linspace(0, network.batch["labels"].shape[1] - 1, LABELS).astype(int).tolist()
    targets = np.array([labels])
    chunk = min(steps, ig.fit(logit_fn, images, LABELS)[0])
    worker.send(
        name,
        network,
        network.batch,
        optimizer={"lr": 0.0},
        steps=steps,
        chunk=chunk,
        labels=labels,
    )
    run = functools.partial(
        ig.integrated_gradients,
        logit_fn,
        images,
        baseline=0.0,
        steps=steps,
        chunk=chunk,
        rows=1,
    )
    differences = {}
    for method in ("gauss", "midpoint"):
        jax_maps = run(targets=targets, method=method).maps
        captum_maps = np.asarray(worker.ask(name=name, step=method, calls=1)["result"])
        apart = np.abs(jax_maps - captum_maps) / np.abs(captum_maps).max()
        p99 = float(np.quantile(apart, 0.99))
        differences[method] = {"largest": float(apart.max()), "p99": p99}
        # Where a maximum is taken over two equal values, rounding decides which one gets the
        # gradient. A few pixels may then differ by more; the report states by how much.
        if not p99 <= TOLERANCE:
            raise InputError(
                f"{name}: 1 % of the pixels of the {method} maps differ between JAX and Captum by "
                f"more than {p99:.2g} of the largest value, which exceeds {TOLERANCE}: make "
                "torch_attribution.py match; nothing was timed"
            )
    # The gradients alone, chunk by chunk: no sum over the path and no completeness check.
    calls = -(-steps // chunk)
    points = jnp.linspace(0, 1, -(-steps // calls))[:, None, None, None] * images
    gradient = jax.jit(jax.grad(lambda x, f: jax.nn.sigmoid(f(x)[:, labels[0]]).sum()))

    def bare() -> list[jax.Array]:
        return [gradient(points, logit_fn) for _ in range(calls)]

    return {"differences": differences, "chunk": chunk}, {
        "one": lambda: run(targets=targets[:, :1], method="midpoint").maps,
        "several": lambda: run(targets=targets, method="midpoint").maps,
        "bare": bare,
    }


if __name__ == "__main__":
    harness.run(main)
