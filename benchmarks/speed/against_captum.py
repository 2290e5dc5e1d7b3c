"""Integrated Gradients here and by Captum on the same weights, on the CPU, taking turns.

    python benchmarks/speed/against_captum.py --torch-python PYTHON [--steps 50] [--quick]

PYTHON is any Python with torch, captum and NumPy. Maps are compared before anything is timed. Both
compute in float32 on all cores, which must be idle, with as many places of the path a call.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks import harness
from benchmarks.speed import against_pytorch
from maknet_jax import files
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.cli import options
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import workdir

WORKER = pathlib.Path(__file__).resolve().with_name("torch_attribution.py")
TOLERANCE = 1e-3  # of the largest value of a map
AIMS = {"one": 1.2, "several": 2.0, "bare": 0.9}
FULL = {"size": 256, "steps": 50, "repeats": 5, "networks": ["maknet", "vgg16"]}
QUICK = {"size": 64, "steps": 10, "repeats": 2, "networks": ["maknet"]}
LABELS = 5  # that one image is explained for


def main(argv=None):
    """Compares, measures, prints and writes."""
    jax.config.update("jax_platforms", "cpu")
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--torch-python", required=True, help="a Python with torch and captum")
    parser.add_argument("--steps", type=options.count, help="of the path")
    parser.add_argument("--networks", type=harness.words, help="networks, or config pages")
    parser.add_argument("--workdir", help="trained weights of the one network named")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    timers, rows = {}, {}
    with against_pytorch.Worker(chosen.torch_python, WORKER) as worker:
        for network in chosen.networks:
            name = harness.page_of(network)[0]
            made = _network(network, chosen)
            rows[name], ours = _agree(name, made, worker, chosen.steps)
            for what, call in ours.items():
                timers[name, what, "jax"] = harness.timer(functools.partial(harness.elapsed, call))
            for what in ("one", "several"):
                timers[name, what, "captum"] = worker.timer(name, what)
        seconds = harness.take_turns(timers, chosen.repeats)
    cells = []
    for name, row in rows.items():
        taken = {what: seconds[name, what, "jax"] for what in AIMS}
        row["seconds"] = {
            "/".join(key[1:]): value for key, value in seconds.items() if key[0] == name
        }
        for what, labels in (("one", 1), ("several", LABELS)):
            gradients = chosen.steps * labels
            theirs = seconds[name, what, "captum"]
            rates = [harness.rates(gradients, values) for values in (taken[what], theirs)]
            ratio = harness.ratios(theirs, taken[what])
            row[what] = {"jax": rates[0], "captum": rates[1], "ratio": ratio}
            judged = against_pytorch.judged(ratio, AIMS[what])
            cells.append(
                [
                    name,
                    f"{labels} of an image",
                    *map(harness.shown, rates),
                    harness.shown(ratio, "x"),
                    judged,
                ]
            )
        limit = harness.ratios(taken["bare"], taken["one"])
        row["of_the_bare_gradient"] = limit
        cells.append(
            [
                name,
                "bare gradient",
                harness.shown(harness.rates(chosen.steps, taken["bare"])),
                "",
                f"one label reaches {harness.shown(limit)}",
                against_pytorch.judged(limit, AIMS["bare"]),
            ]
        )
    differences = ", ".join(
        f"{name} {method} {values['largest']:.1g} (99 % of pixels below {values['p99']:.1g})"
        for name, row in rows.items()
        for method, values in row["differences"].items()
    )
    harness.report(
        __file__,
        argv,
        chosen,
        ["network", "labels", "here, gradients/s", "Captum, gradients/s", "here is faster", "aim"],
        cells,
        [
            f"{chosen.steps} midpoints of one image of {chosen.size} x {chosen.size}, float32",
            f"largest difference of maps over the largest value (aim: {TOLERANCE}): {differences}",
        ],
        {"torch": worker.about, "rows": rows, "aims": AIMS},
    )


def _network(network, chosen):
    """The network with fresh weights and an image of noise, or a trained one and a test image."""
    make = functools.partial(
        harness.Network,
        network,
        size=chosen.size,
        batch_size=1,
        precision="float32",
        devices=jax.devices()[:1],
    )
    if not chosen.workdir:
        return make()
    params, batch_stats, _ = workdir.open_weights(chosen.workdir)[:3]
    about = files.read_json(pathlib.Path(chosen.workdir) / "dataset.json")
    made = make(
        labels=len(about["labels"]),
        place=lambda _: {"params": params, "batch_stats": batch_stats},
    )
    made.batch["image"] = records.open_dataset(about["path"]).source("test")[0].image[None]
    return made


def _agree(name, made, worker, steps):
    """Loads the network into PyTorch and compares maps: (what was found, calls to time)."""
    model = made.assembly.model
    logit_fn = Partial(lambda v, x: model.apply(v, x, train=False).logits, made.state.variables)
    images = jnp.asarray(made.assembly.to_input(made.batch["image"]))
    labels = np.linspace(0, made.batch["labels"].shape[1] - 1, LABELS).astype(int).tolist()
    targets = np.array([labels])
    chunk = min(steps, ig.find_chunk(logit_fn, images, LABELS))
    against_pytorch.hand_over(
        worker,
        name,
        made,
        made.batch,
        optimizer={"lr": 0.0},
        steps=steps,
        chunk=chunk,
        labels=labels,
    )
    run = functools.partial(
        ig.integrated_gradients, logit_fn, images, baseline=0.0, steps=steps, chunk=chunk
    )
    found = {}
    for method in ("gauss", "midpoint"):
        ours = run(targets=targets, method=method).maps
        theirs = np.asarray(worker.ask(name=name, step=method, calls=1)["result"])
        apart = np.abs(ours - theirs) / np.abs(theirs).max()
        found[method] = {"largest": float(apart.max()), "p99": float(np.quantile(apart, 0.99))}
        # At a maximum of two equal values a last bit decides which one the gradient takes: a few
        # pixels may then differ by more, and the table says by how much.
        if not found[method]["p99"] <= TOLERANCE:
            raise InputError(
                f"{name}: one pixel in a hundred of the maps by {method} differs by more than "
                f"{found[method]['p99']:.2g} of the largest value between here and Captum, "
                f"{TOLERANCE} is allowed: nothing was timed"
            )
    # No sum over the path, no check of completeness: the gradients alone, chunk by chunk.
    calls = -(-steps // chunk)
    points = jnp.linspace(0, 1, -(-steps // calls))[:, None, None, None] * images
    gradient = jax.jit(jax.grad(lambda x, f: jax.nn.sigmoid(f(x)[:, labels[0]]).sum()))

    def bare():
        return [gradient(points, logit_fn) for _ in range(calls)]

    timed = {
        "one": functools.partial(run, targets=targets[:, :1], method="midpoint"),
        "several": functools.partial(run, targets=targets, method="midpoint"),
        "bare": bare,
    }
    timed = {what: _arrays(call) for what, call in timed.items()}
    return {"differences": found, "chunk": chunk}, timed


def _arrays(call):
    """`harness.elapsed` waits for arrays; an Attribution is NumPy already."""

    def ready():
        result = call()
        return result.maps if isinstance(result, ig.Attribution) else result

    return ready


if __name__ == "__main__":
    harness.run(main)
