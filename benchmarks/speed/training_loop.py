"""The rate of `maknet train` from records relative to its bare training step.

    python benchmarks/speed/training_loop.py [--size 96]  # about three minutes; --quick: one

The loop is that of users: it reads, decompresses and shuffles records of generated CT, mixes the
student's two streams, transfers, augments, trains, logs and saves. The bare step trains on one
batch that stays on the device, in the same program. Both run in turns. The rate of the loop is that
of the lines of `metrics.jsonl` after the first one, which contains the compilation; validation does
not count and is timed apart. For the parts of an iteration see `PARTS`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import harness, timing
from benchmarks.speed import input_pipeline
from maknet_jax import files, phantom, prepare, train
from maknet_jax.cli import options
from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.evaluation import evaluator
from maknet_jax.runs import build, setup
from maknet_jax.runs import config as configs
from maknet_jax.training import checkpoint, log, sharding

TARGET = 0.95
# What the host does in an iteration besides starting the step. A step runs during it, so that it
# costs time only if it takes longer than the step, or if it needs the cores of the step.
PARTS = {
    "loader": "taking a batch: waiting for it, and mixing streams",
    "transfer": "arrays to the device",
    "logging": "metrics of the steps, and the line of `metrics.jsonl`",
    "checkpoint": "copying the state to the host; it is written in the background",
}
WINDOWS = 3  # lines of metrics.jsonl that count
IMAGES, VALIDATION = 64, 64  # records of the splits


@dataclasses.dataclass
class Clock:
    """Seconds by part of the loop; while one part is timed, the parts inside of it are not."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    inside: bool = False

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time is added to a part."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return call(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        return run

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Times the parts of the runs of `maknet train` in the block."""
        mixed = pipeline.mixed_batches

        def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
            take = self.timed("loader", functools.partial(next, mixed(*args, **kwargs)))
            while True:
                yield take()

        parts = [
            ("transfer", sharding, "put_batch"),
            ("logging", log, "averages"),
            ("logging", log.MetricLog, "write"),
            ("checkpoint", checkpoint.Checkpoints, "save"),
        ]
        scores = evaluator.Evaluator.scores
        repeated = self.timed("validation", scores)

        def validate(*args: Any) -> Any:
            scores(*args)  # compiles
            return repeated(*args)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(pipeline, "mixed_batches", batches))
            stack.enter_context(mock.patch.object(evaluator.Evaluator, "scores", validate))
            for part, owner, name in parts:
                timed = self.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


def main(argv: Sequence[str] | None = None) -> None:
    """Writes data to a temporary folder, measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--configs", type=harness.words, help="teacher,student")
    parser.add_argument("--batch", type=options.count, help="images per step, of all streams")
    parser.add_argument("--seconds", type=options.count, help="seconds of training per log line")
    full = {"size": 256, "configs": ["teacher", "student"], "batch": 16, "repeats": 3, "seconds": 4}
    quick = {"size": 32, "batch": 4, "repeats": 1, "seconds": 1}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(pathlib.Path(folder), chosen.size)
        rows = [measure(chosen, name, *data) for name in chosen.configs]
    header = ["", "loop, images/s", "bare step, images/s", "loop / bare step"]
    header += ["waited for data", "ms per step", "augmentation", *PARTS, "validation, images/s"]
    table = [
        [
            row["config"],
            timing.format_spread(row["loop"]),
            timing.format_spread(row["bare"]),
            timing.format_spread(row["share"]),
            f"{row['data_wait']['median']:.1%}",
            *(f"{row['ms'].get(part, 0.0):.3g}" for part in ("step", "augmentation", *PARTS)),
            f"{row['validation']:.3g}",
        ]
        for row in rows
    ]
    notes = [
        f"{chosen.size} x {chosen.size} pixels, batches of {chosen.batch}; target: {TARGET}",
        "ms per step; those after the augmentation are of the host while a step runs:",
        *(f"  {name}: {text}" for name, text in PARTS.items()),
    ]
    harness.report(__file__, argv, chosen, header, table, notes, {"rows": rows})


def write_data(folder: pathlib.Path, size: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes generated CT; returns the labelled data set and pseudo-labels of the other images."""
    paths = phantom.write_phantom(folder / "phantom", patients=4, unlabelled_volumes=4, size=size)
    images = folder / "images"
    prepare.prepare_dicom(
        paths["dicom"], images, salt_file=folder / "salt", min_slices=30, size=size
    )
    splits = {"train": IMAGES, "val": VALIDATION}
    data = input_pipeline.write_labelled(folder / "data", images, harness.LABELS, splits)
    unlabelled, vocabulary = records.open_dataset(images), records.open_dataset(data).vocabulary
    numbers = np.arange(unlabelled.split("unlabelled")["count"])
    confidences = np.random.default_rng(0).random((len(numbers), len(vocabulary)), np.float32)
    columns, _ = pseudo_labels.select(confidences, vocabulary.exclusive)
    rows = pseudo_labels.rows_of(numbers, columns, confidences, top=15)
    shard = {"file": "all.npy", "sha256": pseudo_labels.write_rows(folder / "all.npy", rows)}
    pseudo = {"records": str(images), "fingerprint": unlabelled.fingerprint, "soft": False}
    pseudo |= {"split": "unlabelled", "labels": vocabulary.names, "shards": [shard]}
    files.write_json(folder / "pseudo.json", pseudo)
    return data, folder


def measure(
    chosen: argparse.Namespace, name: str, data: pathlib.Path, pseudo: pathlib.Path
) -> dict[str, Any]:
    """Runs the loop and the bare step in turns; returns a row of the JSON."""
    base = configs.load(name)
    streams = 1 + bool(base.pseudo.path)
    overrides = {
        "data.path": data,
        "data.size": chosen.size,
        "data.batch_size": chosen.batch // streams,
        "evaluate_every": 1e6,  # at the end only
        "domain_components": 0,
    }
    if streams == 2:
        overrides |= {"pseudo.path": pseudo, "pseudo.batch_size": chosen.batch // streams}

    def config(**changes: object) -> ConfigDict:
        return configs.load(name, [f"{k}={v}" for k, v in (overrides | changes).items()])

    step, augment = bare_step(config())
    timer = timing.timer(functools.partial(timing.elapsed, step), at_least=chosen.seconds)
    steps = max(2, math.ceil(chosen.seconds / timer()))
    epochs = (1 + WINDOWS) * steps * overrides["data.batch_size"] / IMAGES
    clock = Clock()
    loop, bare, waits = [], [], []
    for _ in range(chosen.repeats):
        bare.append(chosen.batch / timer())
        with tempfile.TemporaryDirectory() as folder, clock.observing():
            run = pathlib.Path(folder) / "run"
            train.train(config(epochs=epochs, log_every=steps), run)
            lines = (run / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "train/loss" in row][1:]
        loop.append(len(rows) / sum(1 / row["train/images_per_second"] for row in rows))
        waits += [row["train/data_wait"] for row in rows]
    validation = clock.seconds.pop("validation") / chosen.repeats
    total = chosen.repeats * (1 + WINDOWS) * steps
    ms = {part: 1e3 * value / total for part, value in clock.seconds.items()}
    ms["step"] = 1e3 * chosen.batch / timing.spread(bare)["median"]
    if augment is not None:
        ms["augmentation"] = 1e3 * timing.timer(functools.partial(timing.elapsed, augment))()
    return {
        "config": name,
        "steps": steps,
        "loop": timing.spread(loop),
        "bare": timing.spread(bare),
        "share": timing.ratios(loop, bare),
        "data_wait": timing.spread(waits),
        "ms": ms,
        "validation": VALIDATION / validation,
    }


def bare_step(config: ConfigDict) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """The training step of a config on one batch that stays on the device, and its augmentation.

    Returns:
      (step, augment): calls; the second is None without augmentation.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = setup.set_up(config, pathlib.Path(folder) / "run")
        batch = next(pipeline.mixed_batches(run.sources, run.batch_sizes, seed=config.seed))
    mesh, train_step = run.assembly.mesh, run.assembly.train_step
    assert train_step is not None  # assembled for training
    state = sharding.put_state(mesh, run.assembly.create(config.seed, None))
    on_mesh, key = sharding.put_batch(mesh, batch), jax.random.key(config.seed + 1)

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(state, on_mesh, key)
        return metrics

    augment = build.build_augment(config, mesh.size)
    if augment is None:
        return step, None
    keys = sharding.put_batch(mesh, {"keys": batch["index"]})["keys"]
    split = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))(key, keys)
    return step, functools.partial(jax.jit(augment), on_mesh["image"], split)


if __name__ == "__main__":
    harness.run(main)
