"""LesaNet on VGG16 in JAX and in PyTorch, on the CPU, in one run and never at the same time.

    python benchmarks/speed/lesanet_against_pytorch.py --torch-python PYTHON [--batch 16] [--quick]

As against_pytorch.py: PYTHON is any Python with torch and NumPy, weights, patches and boxes go over
from here, and logits and the cross entropy of the first step are compared before anything is
timed. The losses that draw (hard examples, triplets) draw differently and are not compared.
"""

import functools
import pathlib

import jax
import numpy as np

from benchmarks import harness
from benchmarks.speed import against_pytorch
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.training import losses

WORKER = pathlib.Path(__file__).resolve().with_name("torch_lesanet.py")
LABELS = 171
STEPS = ("train", "predict")
FULL = {"size": 120, "batch": 16, "repeats": 4}
QUICK = {"size": 64, "batch": 4, "repeats": 2}


def main(argv=None):
    """Compares, measures, prints and writes."""
    jax.config.update("jax_platforms", "cpu")
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--torch-python", required=True, help="a Python with torch and NumPy")
    parser.add_argument("--batch", type=options.count, help="patches")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    made = harness.Network(
        "lesanet",
        size=chosen.size,
        batch_size=chosen.batch,
        precision="float32",
        labels=LABELS,
        place=against_pytorch.unlike_the_start,
    )
    timers = {}
    with against_pytorch.Worker(chosen.torch_python, WORKER) as worker:
        agreement = _agree(made, worker)
        for step in STEPS:
            ours = functools.partial(harness.elapsed, getattr(made, step))
            timers[step, "jax"] = harness.timer(ours, at_least=1.0)
            timers[step, "torch"] = worker.timer("lesanet", step, at_least=1.0)
        seconds = harness.take_turns(timers, chosen.repeats)
    rows = []
    for step in STEPS:
        ours, theirs = seconds[step, "jax"], seconds[step, "torch"]
        rows.append(
            {
                "step": step,
                "seconds": {"jax": ours, "torch": theirs},
                "jax_patches_per_second": harness.rates(chosen.batch, ours),
                "torch_patches_per_second": harness.rates(chosen.batch, theirs),
                "jax_is_faster": harness.ratios(theirs, ours),
            }
        )
    cells = [
        [
            row["step"],
            harness.shown(row["jax_patches_per_second"]),
            harness.shown(row["torch_patches_per_second"]),
            harness.shown(row["jax_is_faster"], "x"),
        ]
        for row in rows
    ]
    harness.report(
        __file__,
        argv,
        chosen,
        ["step", "JAX patches/s", "PyTorch patches/s", "JAX is faster"],
        cells,
        [
            f"{chosen.batch} patches of {chosen.size} x {chosen.size}, {LABELS} labels, float32; "
            f"PyTorch {worker.about['torch']}, channels_last, {worker.about['threads']} threads",
            "before timing they differed by "
            + ", ".join(f"{value:.1g} ({name})" for name, value in agreement.items()),
        ],
        {"torch": worker.about, "rows": rows, "differences": agreement},
    )


def _agree(made, worker):
    """Loads the network into PyTorch and compares; returns the two relative differences."""
    clamp = made.config.loss.clamp
    weights = losses.class_weights(made.label_counts, harness.EXAMPLES, clamp=clamp)
    batch = made.batch | dict(zip(("pos_weight", "neg_weight"), weights, strict=True))
    against_pytorch.hand_over(worker, "lesanet", made, batch, optimizer={"lr": 0.0})
    ours = np.asarray(made.predict())
    theirs = np.asarray(worker.ask(name="lesanet", step="predict", calls=1)["result"])
    second = worker.ask(name="lesanet", step="cross_entropy", calls=1)["result"]
    metrics = made.train()
    first = float(metrics["loss_before_spl"] + metrics["loss_after_spl"])
    found = {
        "logits": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "cross entropy": abs(first - second) / abs(second),
    }
    for what, difference in found.items():
        if not difference <= against_pytorch.TOLERANCE:
            raise InputError(
                f"{what} of JAX and PyTorch differ by {difference:.2g}, "
                f"{against_pytorch.TOLERANCE} is allowed: make torch_lesanet.py the same network "
                "again; nothing was timed"
            )
    return found


if __name__ == "__main__":
    harness.run(main)
