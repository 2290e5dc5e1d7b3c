"""The same networks in JAX and in PyTorch, on the CPU, in one run and never at the same time.

    python benchmarks/speed/against_pytorch.py --torch-python PYTHON [--batch 8] [--quick]

PYTHON is any Python with torch and NumPy; PyTorch runs there in a process of its own and waits for
a line before each of its turns. It gets weights and batches from here; logits and the first loss
are compared before anything is timed. Both compute in float32 on all cores, which must be idle:
OpenMP's threads wait for each other in loops, and other work can make PyTorch thirty times slower.
"""

import functools
import json
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
from flax import traverse_util

from benchmarks import harness
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.model_table import CONFIGS
from maknet_jax.training import losses

TOLERANCE = 1e-3  # of the largest logit
AIMS = {"train": 1.3, "predict": 1.5}  # MAKNet in JAX over MAKNet in PyTorch
AIM_VGG16 = 15  # MAKNet's training over the faster of the two VGG16
FULL = {"size": 256, "batch": 8, "repeats": 5, "networks": list(CONFIGS)}
QUICK = {"size": 128, "batch": 4, "repeats": 2, "networks": ["maknet", "vgg16"]}
WORKER = pathlib.Path(__file__).resolve().with_name("torch_networks.py")


def main(argv=None):
    """Compares, measures, prints and writes."""
    jax.config.update("jax_platforms", "cpu")
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--torch-python", required=True, help="a Python with torch and NumPy")
    parser.add_argument("--batch", type=options.count, help="images")
    parser.add_argument("--networks", type=harness.words, help="networks, or config pages")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    timers, rows = {}, {}
    with Worker(chosen.torch_python) as worker:
        for network in chosen.networks:
            name = harness.page_of(network)[0]
            made = harness.Network(
                network,
                size=chosen.size,
                batch_size=chosen.batch,
                precision="float32",
                place=unlike_the_start,
            )
            agreement = _agree(name, made, worker)
            for step in AIMS:
                timers[name, step, "jax"] = harness.timer(
                    functools.partial(harness.elapsed, getattr(made, step)), at_least=1.0
                )
                timers[name, step, "torch"] = worker.timer(name, step, at_least=1.0)
                rows[name, step] = {"network": name, "step": step} | agreement
        seconds = harness.take_turns(timers, chosen.repeats)
    for (name, step), row in rows.items():
        jax_seconds, torch_seconds = seconds[name, step, "jax"], seconds[name, step, "torch"]
        row["seconds"] = {"jax": jax_seconds, "torch": torch_seconds}
        row["jax_images_per_second"] = harness.rates(chosen.batch, jax_seconds)
        row["torch_images_per_second"] = harness.rates(chosen.batch, torch_seconds)
        row["jax_is_faster"] = harness.ratios(torch_seconds, jax_seconds)
    over_vgg16 = _over_vgg16(seconds)
    quick = "--quick: small images, no numbers to quote; " if chosen.quick else ""
    harness.report(
        __file__,
        argv,
        chosen,
        [
            "network",
            "step",
            "JAX images/s",
            "PyTorch images/s",
            "JAX is faster",
            "aim",
            "logits differ",
            "first loss differs",
        ],
        [_cells(row) for row in rows.values()],
        [
            f"{quick}{chosen.batch} images of {chosen.size} x {chosen.size}, float32, medians of "
            f"{chosen.repeats} turns (lowest to highest)",
            f"PyTorch {worker.about['torch']}, channels_last, {worker.about['threads']} threads, "
            "MAKConv as four convolutions; it trains with torch.optim.RAdam, JAX with Ranger "
            "(RAdam and lookahead)",
            *_vgg16_lines(over_vgg16),
        ],
        {
            "torch": worker.about,
            "rows": list(rows.values()),
            "aims": AIMS | {"maknet_over_vgg16": AIM_VGG16},
            "maknet_over_vgg16": over_vgg16,
        },
    )


class Worker:
    """The process of torch_networks.py, or one that talks like it; usable in `with`.

    Attributes:
      about: its torch's version and threads.
    """

    def __init__(self, python, script=None):
        """Starts `script` (default: torch_networks.py). Raises InputError where it has no torch."""
        self._script = script or WORKER
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [python, self._script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise InputError(
                f"--torch-python {python}: {error.strerror}: give a Python with torch and NumPy"
            ) from None
        try:
            self.about = self._answer()
        except InputError as error:
            self.__exit__()
            raise InputError(
                f"--torch-python {python}: {error}: give a Python with torch and NumPy"
            ) from None

    def ask(self, **request):
        """Sends a request, waits for its answer and returns it."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def timer(self, name, step, **options):
        """`harness.timer` of a step of a network that was handed over."""
        return harness.timer(
            lambda calls: self.ask(name=name, step=step, calls=calls)["seconds"], **options
        )

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            why = (self._errors.read().strip() or "without a word").splitlines()[-1]
            raise InputError(f"the process of {self._script.name} ended: {why.strip()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def unlike_the_start(variables):
    """Moves what starts as 0, 1 or the identity, so that a wrong place in PyTorch would be seen."""
    rng = np.random.default_rng(1)

    def moved(array):
        noise = 0.1 * rng.standard_normal(array.shape).astype(np.float32)
        return array if array.ndim == 4 else array + noise

    return jax.tree.map(moved, variables)


def hand_over(worker, name, made, batch, **about):
    """Loads a network's weights and a batch into the worker.

    Args:
      worker: a `Worker`.
      name: that later requests call the network by.
      made: a `harness.Network`.
      batch: arrays by name.
      about: what the worker's script wants to know beside the model.
    """
    config, flat = made.config, {}
    for tree in made.state.variables.values():
        flat |= traverse_util.flatten_dict(tree, sep="/")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.npz"
        arrays = {f"weights/{path}": np.asarray(array) for path, array in flat.items()}
        np.savez(file, **arrays, **{f"batch/{key}": value for key, value in batch.items()})
        worker.ask(
            name=name,
            load=str(file),
            model=config.model.name,
            options=config.model.options.to_dict(),
            window=config.data.window,
            **about,
        )


def _agree(name, made, worker):
    """Loads the network into PyTorch and compares; returns the two differences."""
    config = made.config
    loss = config.loss.to_dict()
    weights = losses.class_weights(made.label_counts, harness.EXAMPLES, clamp=loss["clamp"])
    batch = made.batch | dict(zip(("pos_weight", "neg_weight"), weights, strict=True))
    optimizer = config.optimizer
    hand_over(
        worker,
        name,
        made,
        batch,
        gamma=loss["gamma"],
        head_weights=loss["head_weights"],
        optimizer={
            "lr": optimizer.learning_rate,
            "betas": [optimizer.b1, optimizer.b2],
            "eps": optimizer.eps,
        },
    )
    ours = np.asarray(made.predict())
    theirs = np.asarray(worker.ask(name=name, step="predict", calls=1)["result"])
    first = float(made.train()["loss"])
    second = worker.ask(name=name, step="train", calls=1)["result"]
    found = {
        "logits_differ": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "first_loss_differs": abs(first - second) / abs(second),
    }
    for what, difference in found.items():
        if not difference <= TOLERANCE:
            raise InputError(
                f"{name}: {what} by {difference:.2g} between JAX and PyTorch, {TOLERANCE} is "
                "allowed: make torch_networks.py the same network again; nothing was timed"
            )
    return found


def _over_vgg16(seconds):
    """MAKNet's training in JAX over the faster VGG16's, or None where one was not measured."""
    maknet = seconds.get(("maknet", "train", "jax"))
    both = {kind: seconds.get(("vgg16", "train", kind)) for kind in ("jax", "torch")}
    if maknet is None or both["jax"] is None:
        return None
    faster = min(both, key=lambda kind: harness.spread(both[kind])["median"])
    return {"faster": faster, "ratio": harness.ratios(both[faster], maknet)}


def _vgg16_lines(over_vgg16):
    if over_vgg16 is None:
        return []
    ratio, kind = over_vgg16["ratio"], {"jax": "JAX", "torch": "PyTorch"}[over_vgg16["faster"]]
    return [
        f"MAKNet trains {harness.shown(ratio, 'x')} as fast as the faster VGG16, {kind}'s: "
        f"{judged(ratio, AIM_VGG16)}"
    ]


def judged(ratio, aim):
    """Whether the median of `ratios` reaches an aim, in words."""
    return f"at least {aim}x: {'reached' if ratio['median'] >= aim else 'missed'}"


def _cells(row):
    aim = AIMS[row["step"]]
    return [
        row["network"],
        row["step"],
        harness.shown(row["jax_images_per_second"]),
        harness.shown(row["torch_images_per_second"]),
        harness.shown(row["jax_is_faster"], "x"),
        judged(row["jax_is_faster"], aim) if row["network"] == "maknet" else "",
        f"{row['logits_differ']:.1g}",
        f"{row['first_loss_differs']:.1g}",
    ]


if __name__ == "__main__":
    harness.run(main)
