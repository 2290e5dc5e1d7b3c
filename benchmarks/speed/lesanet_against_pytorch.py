"""LesaNet on VGG16 in JAX and in PyTorch on the CPU, timed in turns.

    python benchmarks/speed/lesanet_against_pytorch.py --torch-python PYTHON [--batch 16] [--quick]

Works like against_pytorch.py: PYTHON is any Python with torch and NumPy. Both use the same weights,
patches and boxes; logits and the cross entropy of the first step are compared before anything is
timed. The losses that sample (hard examples, triplets) use different random numbers and are not
compared.
"""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks import harness, timing
from benchmarks.speed import torch_worker
from maknet_jax.cli import options

SCRIPT = pathlib.Path(__file__).resolve().with_name("torch_lesanet.py")
LABELS = 171
STEPS = ("train", "predict")
FULL = {"size": 120, "batch": 16, "repeats": 4}
QUICK = {"size": 64, "batch": 4, "repeats": 2}


def main(argv: Sequence[str] | None = None) -> None:
    """Compares the outputs, measures, prints the table and writes the JSON."""
    parser = torch_worker.parser(__file__, __doc__)
    parser.add_argument("--batch", type=options.count, help="patches per step")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    network = harness.Network(
        "lesanet",
        size=chosen.size,
        batch_size=chosen.batch,
        precision="float32",
        labels=LABELS,
        place=torch_worker.perturb_constant_initial_values,
    )
    timers = {}
    with torch_worker.Worker(chosen.torch_python, SCRIPT) as worker:
        differences = compare(network, worker)
        for step in STEPS:
            run = functools.partial(timing.elapsed, getattr(network, step))
            timers[step, "jax"] = timing.timer(run, at_least=1.0)
            timers[step, "torch"] = worker.timer("lesanet", step, at_least=1.0)
        seconds = timing.take_turns(timers, chosen.repeats)
    rows, cells = [], []
    for step in STEPS:
        jax_seconds, torch_seconds = seconds[step, "jax"], seconds[step, "torch"]
        jax_rate = timing.rates(chosen.batch, jax_seconds)
        torch_rate = timing.rates(chosen.batch, torch_seconds)
        speed_up = timing.ratios(torch_seconds, jax_seconds)
        rows.append(
            {
                "step": step,
                "seconds": {"jax": jax_seconds, "torch": torch_seconds},
                "jax_patches_per_second": jax_rate,
                "torch_patches_per_second": torch_rate,
                "jax_is_faster": speed_up,
            }
        )
        rates = (timing.format_spread(rate) for rate in (jax_rate, torch_rate))
        cells.append([step, *rates, timing.format_spread(speed_up, "x")])
    harness.report(
        __file__,
        argv,
        chosen,
        ["step", "JAX patches/s", "PyTorch patches/s", "JAX speed-up"],
        cells,
        [
            f"{chosen.batch} patches of {chosen.size} x {chosen.size}, {LABELS} labels, float32; "
            f"PyTorch {worker.versions['torch']}, channels_last, {worker.versions['threads']} "
            "threads",
            "relative differences before timing: "
            + ", ".join(f"{value:.1g} ({name})" for name, value in differences.items()),
        ],
        {"torch": worker.versions, "rows": rows, "differences": differences},
    )


def compare(network: harness.Network, worker: torch_worker.Worker) -> dict[str, float]:
    """Sends the network to PyTorch; returns the relative differences, or raises InputError."""
    batch = torch_worker.weighted_batch(network)
    worker.send("lesanet", network, batch, optimizer={"lr": 0.0})
    jax_logits = np.asarray(network.predict())
    torch_logits = np.asarray(worker.ask(name="lesanet", step="predict", calls=1)["result"])
    torch_loss = worker.ask(name="lesanet", step="cross_entropy", calls=1)["result"]
    metrics = network.train()
    jax_loss = float(metrics["loss_before_spl"] + metrics["loss_after_spl"])
    differences = {
        "logits": torch_worker.relative_difference(jax_logits, torch_logits),
        "cross entropy": torch_worker.relative_difference(jax_loss, torch_loss),
    }
    torch_worker.check_differences(differences, "torch_lesanet.py")
    return differences


if __name__ == "__main__":
    harness.run(main)
