"""The student's augmentation as a share of MAKNet's training step, on this device.

    python benchmarks/augment.py

For TPUs, without one: `python benchmarks/tpu_aot.py --kinds train,student`.
"""

import harness
import jax
import jax.numpy as jnp

from maknet_jax import config as configs
from maknet_jax.cli import options
from maknet_jax.data import augment


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
    shape = (chosen.batch, chosen.size, chosen.size, 3)
    images = jax.random.uniform(jax.random.key(0), shape, jnp.float32)
    keys = jax.random.split(jax.random.key(1), chosen.batch)
    calls = {"training step": network.train}
    for form in ("gather", "shear"):
        noise = jax.jit(augment.make_augment(**page, form=form))
        calls[f"augmentation, {form}"] = lambda noise=noise: noise(images, keys)
    timers = {
        name: harness.timer(lambda count, call=call: harness.elapsed(call, count))
        for name, call in calls.items()
    }
    seconds = harness.take_turns(timers, chosen.repeats)
    rows, results = [], []
    for name, values in seconds.items():
        per_image = harness.rates(1e3 / chosen.batch, [1 / value for value in values])
        share = harness.ratios(values, seconds["training step"])
        rows.append([name, harness.shown(per_image), f"{share['median']:.1%}"])
        results.append({"what": name, "ms_per_image": per_image, "share_of_step": share})
    notes = [
        f"{chosen.network} at {chosen.size} x {chosen.size}, batch {chosen.batch}, {precision}; "
        "the step without augmentation; medians and range",
        "aim: below 10 % of the step; the form that `auto` takes here is gather (TPU: shear)",
    ]
    header = ["", "ms an image", "share of the step"]
    harness.report(__file__, argv, chosen, header, rows, notes, {"rows": results})


if __name__ == "__main__":
    harness.run(main)
