"""Time of `maknet train` to its first step, and of other verbs, with a cold and a warm cache.

    python benchmarks/speed/startup.py [--config teacher] [--quick]
    python benchmarks/speed/startup.py --model RUN [--ct CT] [--series FOLDER] [--before CHECKOUT]
        [--only-verbs]

Each start is a new process that runs one step and is then stopped by SIGTERM. "cold" has an empty
cache, "warm" a new workdir and the cache of an earlier run, and "restarted" resumes the warm one
from its checkpoint. The three are timed in turns.

With --model, `report` of six cases is timed in the same way; with --ct `predict` of a CT and
`attribute` of two of its slices; and with --series `predict` of a DICOM series, repeated to 300
slices (by the network of the training above) and to 2,000 slices. The parts of a start are CPU
seconds or seconds of JAX's own log; the counts of imported modules and of traced and compiled
programs do not depend on how busy the machine is. With --before, another checkout of this
repository runs in turns with this one. With --only-verbs the training is started once, for the
network of the 300 slices, and not timed. Each start is reported on standard error when it ends.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import harness, timing
from benchmarks.speed import verb_starts
from maknet_jax import console
from maknet_jax.data import records
from maknet_jax.runs import config as configs

SCRIPT = pathlib.Path(__file__).with_name("start_once.py")


def write_data(folder: pathlib.Path, size: int, batch: int) -> None:
    """Writes a data set of one batch of random images and labels."""
    rng, examples = np.random.default_rng(0), []
    for number in range(batch):
        image = rng.integers(-1000, 1000, (size, size, 3)).astype(np.int16)
        labels = (rng.random(harness.LABELS) < 0.1).astype(np.uint8)
        mask = np.ones(harness.LABELS, np.uint8)
        examples.append(records.Example(f"x{number}", image, labels, mask, {}))
    path = folder / "train/part-0.array_record"
    _, digest = records.write_shard(path, map(records.encode, examples))
    shard = {"file": "train/part-0.array_record", "count": batch, "digest": digest}
    counts = np.sum([example.labels for example in examples], axis=0, dtype=int).tolist()
    entry = {"count": batch, "label_counts": counts, "shards": [shard]}
    vocabulary = [
        {"name": f"label {n}", "class": "", "parents": [], "exclusive": []}
        for n in range(harness.LABELS)
    ]
    info = {"format": records.FORMAT, "kind": "table", "size": size, "labels": vocabulary}
    info |= {"fingerprint": digest, "splits": {"train": entry}}
    (folder / "dataset.json").write_text(json.dumps(info))


def main(argv: Sequence[str] | None = None) -> None:
    """Times the starts, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--config", help="config (default: teacher)")
    parser.add_argument("--model", help="a trained network: also time report with it")
    parser.add_argument("--ct", help="CT for predict and attribute")
    parser.add_argument("--series", help="folder of a DICOM series to repeat")
    parser.add_argument("--before", help="checkout of another version to compare with")
    parser.add_argument("--only-verbs", action="store_true", help="do not time the training")
    full = {"size": 256, "repeats": 3, "config": "teacher"}
    quick = {"size": 64, "repeats": 1, "config": "smoke"}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    if chosen.only_verbs and not chosen.model:
        parser.error("--only-verbs needs --model")
    if chosen.only_verbs and not chosen.quick:
        chosen.extent = "partial"
    configs.load(chosen.config)  # reports an unknown config in one line
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": [], "restarted": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_data(folder / "data", chosen.size, 8)

        def start(cache: pathlib.Path, run: str, *, resumes: bool = False) -> dict[str, Any]:
            changes = [
                f"data.path={folder / 'data'}",
                f"data.size={chosen.size}",
                "epochs=2.0",
                "data.batch_size=8",
                "evaluate_every=99",
            ]
            process = subprocess.run(
                [sys.executable, SCRIPT, chosen.config, folder / f"run-{run}", *changes],
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
                capture_output=True,
                text=True,
            )
            if process.returncode:
                raise RuntimeError(f"a start failed:\n{process.stderr}")
            result = json.loads(process.stdout.splitlines()[-1])
            if result["stopped"] == resumes:  # the signal came too late or not at all
                raise RuntimeError(f"a start did not run exactly one step: {result}")
            console.Log().say(f"train {run}: first step after {result['first_step']:.1f} s")
            return result

        start(folder / "cache", "first")
        for turn in range(0 if chosen.only_verbs else chosen.repeats):
            starts["cold"].append(start(folder / f"empty-{turn}", f"cold-{turn}"))
            starts["warm"].append(start(folder / "cache", f"warm-{turn}"))
            starts["restarted"].append(start(folder / "cache", f"warm-{turn}", resumes=True))
        verbs: list[dict[str, Any]] = []
        if chosen.model:
            found = verb_starts.commands(
                folder, chosen.model, chosen.ct, chosen.series, folder / "run-first"
            )
            for one in verb_starts.measure(folder, found, chosen.before, chosen.repeats):
                console.Log().say(
                    f"{one['name']}, {one['cache']} cache, {one['code']}: {one['total']:.1f} s, "
                    f"{one['cpu']:.1f} CPU seconds"
                )
                verbs.append(one)
    names = ("imports", "compile", "longest", "first_step")
    rows = [
        [
            kind,
            *(
                timing.format_spread(timing.spread([one[name] for one in results]))
                for name in names
            ),
        ]
        for kind, results in starts.items()
        if results
    ]
    shares = {
        kind: timing.spread(
            [
                one["first_step"] / cold["first_step"]
                for cold, one in zip(starts["cold"], starts[kind], strict=True)
            ]
        )
        for kind in ("warm", "restarted")
        if starts[kind]
    }
    notes = [
        "seconds; first step: from the end of the imports until one step is saved (reading data, "
        "creating or restoring the state, compiling or loading programs, checkpoint); restarted: "
        "the last step, so it includes the end of training",
        *(f"{kind} over cold: {timing.format_spread(share)}" for kind, share in shares.items()),
        f"target: at most 0.25; {chosen.config} at {chosen.size} x {chosen.size}, batch 8",
    ]
    header = ["", "imports", "compilation", "longest program", "first step"]
    document: dict[str, Any] = {
        "rows": [{"kind": kind, "starts": results} for kind, results in starts.items()]
    }
    document |= {"over_cold": shares, "verbs": verbs}
    harness.report(__file__, argv, chosen, header, rows, notes, document)
    if verbs:
        print(console.format_table(verb_starts.HEADER, verb_starts.rows(verbs)))


if __name__ == "__main__":
    harness.run(main)
