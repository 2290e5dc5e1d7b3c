"""The share of the student's augmentation in MAKNet's training step on this device.

    python benchmarks/speed/augmentation.py [--batch 8] [--quick]

For TPUs, compiled ahead of time: `python benchmarks/speed/aot.py --kinds train,student`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness, timing
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import augment, sharding

STEP = "training step"


def main(argv: Sequence[str] | None = None) -> None:
    """Times the step and both forms of the augmentation, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--batch", type=options.count, help="images per step")
    parser.add_argument("--network", help="network, or config (default: maknet)")
    full = {"batch": 8, "size": 256, "repeats": 5, "network": "maknet"}
    chosen = harness.parse(parser, argv, full=full, quick={"batch": 4, "size": 96, "repeats": 3})
    settings = configs.load("student").augment.to_dict()
    precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    network = harness.Network(
        chosen.network, size=chosen.size, batch_size=chosen.batch, precision=precision
    )
    if build.build_augment(network.config, 1):
        raise InputError(
            f"--network {chosen.network} already augments: give a config without augmentation"
        )
    mesh, shape = sharding.data_mesh(), (chosen.batch, chosen.size, chosen.size, 3)
    images = jax.random.uniform(jax.random.key(0), shape, jnp.float32)
    keys = jax.random.split(jax.random.key(1), chosen.batch)
    images, keys = jax.device_put((images, keys), sharding.split(mesh))
    calls: dict[str, Callable[[], Any]] = {STEP: network.train}
    for form in ("gather", "shear"):
        apply = augment.make_augment(**settings, form=form, devices=mesh.size)
        assert apply is not None  # the config of a student augments
        calls[f"augmentation, {form}"] = functools.partial(jax.jit(apply), images, keys)
    timers = {
        name: timing.timer(functools.partial(timing.elapsed, call)) for name, call in calls.items()
    }
    seconds = timing.take_turns(timers, chosen.repeats)
    rows, results = [], []
    for name, values in seconds.items():
        per_image = timing.spread([1e3 * value / chosen.batch for value in values])
        share = ""
        row: dict[str, Any] = {"what": name, "ms_per_image": per_image}
        if name != STEP:
            total = [a + b for a, b in zip(values, seconds[STEP], strict=True)]
            row["share_of_step"] = timing.ratios(values, total)
            share = f"{row['share_of_step']['median']:.1%}"
        rows.append([name, timing.format_spread(per_image), share])
        results.append(row)
    notes = [
        f"{chosen.network} at {chosen.size} x {chosen.size}, batch {chosen.batch}, {precision}; "
        "medians (lowest to highest); share: of the training step including the augmentation",
        "target: below 10 %; the form `auto` is gather on CPU and GPU, shear on TPU",
    ]
    header = ["", "ms per image", "share"]
    harness.report(__file__, argv, chosen, header, rows, notes, {"rows": results})


if __name__ == "__main__":
    harness.run(main)
