"""The student's augmentation as a share of MAKNet's training step, on this device.

    python benchmarks/speed/augmentation.py

For TPUs, without one: `python benchmarks/speed/tpu_aot.py --kinds train,student`.
"""

import jax
import jax.numpy as jnp

from benchmarks import harness
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import augment, sharding

STEP = "training step"


def main(argv=None):
    """Times the step and both forms of the augmentation in turns, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--batch", type=options.count, help="images a step")
    parser.add_argument("--network", help="a config page or a path (default: maknet)")
    full = {"batch": 8, "size": 256, "repeats": 5, "network": "maknet"}
    chosen = harness.parse(parser, argv, full=full, quick={"batch": 4, "size": 96, "repeats": 3})
    page = configs.load("student").augment.to_dict()
    precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    network = harness.Network(
        chosen.network, size=chosen.size, batch_size=chosen.batch, precision=precision
    )
    if build.build_augment(network.config, 1):
        raise InputError(f"--network {chosen.network} augments: give one whose step does not")
    mesh, shape = sharding.data_mesh(), (chosen.batch, chosen.size, chosen.size, 3)
    images = jax.random.uniform(jax.random.key(0), shape, jnp.float32)
    keys = jax.random.split(jax.random.key(1), chosen.batch)
    images, keys = jax.device_put((images, keys), sharding.split(mesh))
    calls = {STEP: network.train}
    for form in ("gather", "shear"):
        noise = jax.jit(augment.make_augment(**page, form=form, devices=mesh.size))
        calls[f"augmentation, {form}"] = lambda noise=noise: noise(images, keys)
    timers = {
        name: harness.timer(lambda count, call=call: harness.elapsed(call, count))
        for name, call in calls.items()
    }
    seconds = harness.take_turns(timers, chosen.repeats)
    rows, results = [], []
    for name, values in seconds.items():
        per_image = harness.spread([1e3 * value / chosen.batch for value in values])
        row, share = {"what": name, "ms_per_image": per_image}, ""
        if name != STEP:
            both = [a + b for a, b in zip(values, seconds[STEP], strict=True)]
            row["share_of_step"] = harness.ratios(values, both)
            share = f"{row['share_of_step']['median']:.1%}"
        rows.append([name, harness.shown(per_image), share])
        results.append(row)
    notes = [
        f"{chosen.network} at {chosen.size} x {chosen.size}, batch {chosen.batch}, {precision}; "
        "medians and range; the share of the step with its augmentation",
        "aim: below 10 %; the form that `auto` takes here is gather (TPU: shear)",
    ]
    header = ["", "ms an image", "share"]
    harness.report(__file__, argv, chosen, header, rows, notes, {"rows": results})


if __name__ == "__main__":
    harness.run(main)
