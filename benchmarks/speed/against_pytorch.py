"""The networks in JAX and in PyTorch on the CPU, timed in turns.

    python benchmarks/speed/against_pytorch.py --torch-python PYTHON [--batch 8] [--quick]

PYTHON is any Python with torch and NumPy. PyTorch runs in a separate process that waits while JAX
runs. Both use the same weights and batches; logits and the first loss are compared before anything
is timed. Both compute in float32 on all cores. The machine must be idle: OpenMP threads spin while
they wait, and other load can make PyTorch thirty times slower.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import harness, timing
from benchmarks.speed import torch_worker
from maknet_jax.cli import options
from maknet_jax.model_table import CONFIGS

TARGETS = {"train": 1.3, "predict": 1.5}  # MAKNet in JAX over MAKNet in PyTorch
VGG16_TARGET = 15  # training of MAKNet over the faster of the two VGG16
FULL = {"size": 256, "batch": 8, "repeats": 5, "networks": list(CONFIGS)}
QUICK = {"size": 128, "batch": 4, "repeats": 2, "networks": ["maknet", "vgg16"]}

Seconds = Mapping[tuple[str, str, str], Sequence[float]]  # (network, step, framework) -> seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Compares the outputs, measures, prints the table and writes the JSON."""
    parser = torch_worker.parser(__file__, __doc__)
    parser.add_argument("--batch", type=options.count, help="images per step")
    parser.add_argument("--networks", type=harness.words, help="networks, or configs")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    timers = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with torch_worker.Worker(chosen.torch_python) as worker:
        for config in chosen.networks:
            name = harness.config_of(config)[0]
            network = harness.Network(
                config,
                size=chosen.size,
                batch_size=chosen.batch,
                precision="float32",
                place=torch_worker.perturb_constant_initial_values,
            )
            differences = compare(name, network, worker)
            for step in TARGETS:
                timers[name, step, "jax"] = timing.timer(
                    functools.partial(timing.elapsed, getattr(network, step)), at_least=1.0
                )
                timers[name, step, "torch"] = worker.timer(name, step, at_least=1.0)
                rows[name, step] = {"network": name, "step": step} | differences
        seconds = timing.take_turns(timers, chosen.repeats)
    for (name, step), row in rows.items():
        jax_seconds, torch_seconds = seconds[name, step, "jax"], seconds[name, step, "torch"]
        row["seconds"] = {"jax": jax_seconds, "torch": torch_seconds}
        row["jax_images_per_second"] = timing.rates(chosen.batch, jax_seconds)
        row["torch_images_per_second"] = timing.rates(chosen.batch, torch_seconds)
        row["jax_is_faster"] = timing.ratios(torch_seconds, jax_seconds)
    over_vgg16 = _over_vgg16(seconds)
    quick = "--quick: small images, do not quote these timings; " if chosen.quick else ""
    harness.report(
        __file__,
        argv,
        chosen,
        [
            "network",
            "step",
            "JAX images/s",
            "PyTorch images/s",
            "JAX speed-up",
            "target",
            "logits differ",
            "first loss differs",
        ],
        [_cells(row) for row in rows.values()],
        [
            f"{quick}{chosen.batch} images of {chosen.size} x {chosen.size}, float32, medians of "
            f"{chosen.repeats} turns (lowest to highest)",
            f"PyTorch {worker.versions['torch']}, channels_last, {worker.versions['threads']} "
            "threads, MAKConv as four convolutions; it trains with torch.optim.RAdam, JAX with "
            "Ranger (RAdam and lookahead)",
            *_vgg16_notes(over_vgg16),
        ],
        {
            "torch": worker.versions,
            "rows": list(rows.values()),
            "aims": TARGETS | {"maknet_over_vgg16": VGG16_TARGET},
            "maknet_over_vgg16": over_vgg16,
        },
    )


def compare(name: str, network: harness.Network, worker: torch_worker.Worker) -> dict[str, float]:
    """Sends the network to PyTorch and compares logits and the first loss.

    Returns:
      The relative differences, `logits_differ` and `first_loss_differs`.

    Raises:
      InputError: a difference exceeds the tolerance.
    """
    loss, optimizer = network.config.loss, network.config.optimizer
    worker.send(
        name,
        network,
        torch_worker.weighted_batch(network),
        gamma=loss.gamma,
        head_weights=loss.to_dict()["head_weights"],
        optimizer={
            "lr": optimizer.learning_rate,
            "betas": [optimizer.b1, optimizer.b2],
            "eps": optimizer.eps,
        },
    )
    jax_logits = np.asarray(network.predict())
    torch_logits = np.asarray(worker.ask(name=name, step="predict", calls=1)["result"])
    jax_loss = float(network.train()["loss"])
    torch_loss = worker.ask(name=name, step="train", calls=1)["result"]
    differences = {
        "logits_differ": torch_worker.relative_difference(jax_logits, torch_logits),
        "first_loss_differs": torch_worker.relative_difference(jax_loss, torch_loss),
    }
    torch_worker.check_differences(differences, "torch_networks.py", f"{name}: ")
    return differences


def _over_vgg16(seconds: Seconds) -> dict[str, Any] | None:
    """Speed-up of training MAKNet in JAX over the faster VGG16; None if either was not measured."""
    maknet = seconds.get(("maknet", "train", "jax"))
    vgg16 = {
        framework: seconds[key]
        for framework in ("jax", "torch")
        if (key := ("vgg16", "train", framework)) in seconds
    }
    if maknet is None or not vgg16:
        return None
    faster = min(vgg16, key=lambda framework: timing.spread(vgg16[framework])["median"])
    return {"faster": faster, "ratio": timing.ratios(vgg16[faster], maknet)}


def _vgg16_notes(over_vgg16: Mapping[str, Any] | None) -> list[str]:
    if over_vgg16 is None:
        return []
    ratio, framework = over_vgg16["ratio"], {"jax": "JAX", "torch": "PyTorch"}
    return [
        f"MAKNet trains {timing.format_spread(ratio, 'x')} as fast as the faster VGG16 "
        f"({framework[over_vgg16['faster']]}): {timing.verdict(ratio, VGG16_TARGET)}"
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    speed_up = row["jax_is_faster"]
    return [
        row["network"],
        row["step"],
        timing.format_spread(row["jax_images_per_second"]),
        timing.format_spread(row["torch_images_per_second"]),
        timing.format_spread(speed_up, "x"),
        timing.verdict(speed_up, TARGETS[row["step"]]) if row["network"] == "maknet" else "",
        f"{row['logits_differ']:.1g}",
        f"{row['first_loss_differs']:.1g}",
    ]


if __name__ == "__main__":
    harness.run(main)
