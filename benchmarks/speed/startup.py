"""How long `maknet train` takes to its first step, cold and with the compile cache warm.

    python benchmarks/speed/startup.py

Each start is a new process that makes one step and is stopped, as by a cluster: cold with an empty
cache, warm in a new folder with the cache of an earlier run, and restarted, which is the warm one
going on from its checkpoint. They take turns.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import harness
from maknet_jax.data import records
from maknet_jax.runs import config as configs

START = pathlib.Path(__file__).with_name("start_once.py")


def data_of(folder, size, batch):
    """One batch of noise with labels, as a data set."""
    rng, made = np.random.default_rng(0), []
    for number in range(batch):
        image = rng.integers(-1000, 1000, (size, size, 3)).astype(np.int16)
        labels = (rng.random(harness.LABELS) < 0.1).astype(np.uint8)
        full = np.ones(harness.LABELS, np.uint8)
        made.append(records.Example(f"x{number}", image, labels, full, {}))
    _, digest = records.write_shard(folder / "train/part-0.array_record", map(records.encode, made))
    shard = {"file": "train/part-0.array_record", "count": batch, "digest": digest}
    counts = np.sum([example.labels for example in made], axis=0, dtype=int).tolist()
    entry = {"count": batch, "label_counts": counts, "shards": [shard]}
    labels = [
        {"name": f"label {n}", "class": "", "parents": [], "exclusive": []}
        for n in range(harness.LABELS)
    ]
    info = {"format": records.FORMAT, "kind": "table", "size": size, "labels": labels}
    info |= {"fingerprint": digest, "splits": {"train": entry}}
    (folder / "dataset.json").write_text(json.dumps(info))


def main(argv=None):
    """Starts, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--config", help="the page (default: teacher)")
    full = {"size": 256, "repeats": 3, "config": "teacher"}
    quick = {"size": 64, "repeats": 1, "config": "smoke"}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    configs.load(chosen.config)  # before processes are started that could say less
    found = {"cold": [], "warm": [], "restarted": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        data_of(folder / "data", chosen.size, 8)

        def start(cache, number, goes_on=False):
            changes = [
                f"data.path={folder / 'data'}",
                f"data.size={chosen.size}",
                "epochs=2.0",
                "data.batch_size=8",
                "evaluate_every=99",
            ]
            done = subprocess.run(
                [sys.executable, START, chosen.config, folder / f"run-{number}", *changes],
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"a start failed:\n{done.stderr}")
            taken = json.loads(done.stdout.splitlines()[-1])
            if taken["stopped"] == goes_on:  # it made both steps before the signal came, or neither
                raise RuntimeError(f"a start made not one step but another number: {taken}")
            return taken

        start(folder / "kept", "first")
        for turn in range(chosen.repeats):
            found["cold"].append(start(folder / f"empty-{turn}", f"cold-{turn}"))
            found["warm"].append(start(folder / "kept", f"warm-{turn}"))
            found["restarted"].append(start(folder / "kept", f"warm-{turn}", goes_on=True))
    names = ("imports", "compile", "longest", "first_step")
    rows = [
        [kind, *(harness.shown(harness.spread([one[name] for one in ones])) for name in names)]
        for kind, ones in found.items()
    ]
    shares = {
        kind: harness.spread(
            [
                one["first_step"] / cold["first_step"]
                for cold, one in zip(found["cold"], found[kind], strict=True)
            ]
        )
        for kind in ("warm", "restarted")
    }
    notes = [
        "seconds; first step: from the imports' end to one update done and saved (reading, making "
        "or restoring the state, compiling or loading programs, checkpoint); the restarted one is "
        "the last of its training, whose end it holds too",
        *(f"{kind} over cold: {harness.shown(share)}" for kind, share in shares.items()),
        f"aim: at most 0.25; {chosen.config} at {chosen.size} x {chosen.size}, batch 8",
    ]
    header = ["", "imports", "compiling, all", "longest program", "first step"]
    results = {"rows": [{"kind": kind, "starts": ones} for kind, ones in found.items()]}
    harness.report(__file__, argv, chosen, header, rows, notes, results | {"over_cold": shares})


if __name__ == "__main__":
    harness.run(main)
