"""Streams one epoch of a data set of many shards in several processes, with few file handles.

    python benchmarks/speed/streaming.py  # about ten minutes on two cores; --quick: seconds

The shards are symbolic links to a few small ones. Each process may open `--handles` files, fewer
than there are shards. Checked: every record once per epoch, its content, the order after a restart
in the middle of the epoch, and that handles, memory and time per record do not grow.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import harness, timing
from benchmarks.speed import input_pipeline
from maknet_jax import files
from maknet_jax.cli import options
from maknet_jax.data import pipeline, records
from maknet_jax.errors import InputError

BASE, RECORDS, SIZE = 4, 512, 16  # different shards, records per shard, pixels per side
PARTS = 10  # of an epoch, each of which is timed


def write_base(folder: pathlib.Path) -> pathlib.Path:
    """Writes the data set whose shards are repeated; the id of a record is its number."""
    shards = []
    for shard in range(BASE):
        rng = np.random.default_rng(shard)
        examples = [
            records.Example(
                str(shard * RECORDS + number),
                rng.integers(-1024, 3072, (SIZE, SIZE, 3)).astype(np.int16),
                np.ones(1, np.uint8),
                np.ones(1, np.uint8),
                {},
            )
            for number in range(RECORDS)
        ]
        name = f"train/part-{shard}.array_record"
        _, digest = records.write_shard(folder / name, map(records.encode, examples))
        shards.append({"file": name, "count": RECORDS, "digest": digest})
    entry = {"count": BASE * RECORDS, "label_counts": [BASE * RECORDS], "shards": shards}
    labels = [{"name": "any", "class": "", "parents": [], "exclusive": []}]
    info = {"format": records.FORMAT, "size": SIZE, "labels": labels, "fingerprint": "base"}
    files.write_json(folder / "dataset.json", info | {"splits": {"train": entry}})
    return folder


def read_epoch(
    data: pathlib.Path, out: pathlib.Path, process: int, processes: int, start: int, steps: int
) -> dict[str, Any]:
    """Reads the batches of one process; writes the record numbers to `out` in their order.

    Args:
      data: the data set.
      out: the .npy file to write.
      process: the number of this process.
      processes: how many there are.
      start: the first step.
      steps: the number of steps to read.

    Returns:
      Seconds per record, open files and memory (bytes) after each of `PARTS` parts, the seconds to
      open the data set, and the number of records whose content is not that of their number.
    """
    began = time.perf_counter()
    source = records.open_dataset(data).source("train")
    opened = time.perf_counter() - began
    batches = pipeline.train_batches(
        source,
        batch_size=64 * processes,
        seed=0,
        start=start,
        process_index=process,
        process_count=processes,
        threads=2,
    )
    result: dict[str, Any] = {"seconds_to_open": opened, "per_record": [], "handles": []}
    result |= {"memory": [], "wrong": 0}
    numbers = []
    for part in np.array_split(np.arange(steps), PARTS):
        began = time.perf_counter()
        for _ in part:
            batch = next(batches)
            numbers.append(batch["index"].astype(np.int64))
            ids = batch["id"].astype(np.int64)
            result["wrong"] += int((ids != numbers[-1] % len(source) % (BASE * RECORDS)).sum())
        if len(part):
            result["per_record"].append((time.perf_counter() - began) / (64 * len(part)))
        result["handles"].append(len(os.listdir("/proc/self/fd")))
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        result["memory"].append(pages * resource.getpagesize())
    np.save(out, np.concatenate(numbers))
    return result


def start(handles: int, *arguments: object) -> subprocess.Popen:
    """Starts `read_epoch` in a process that may open `handles` files."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({handles}, {handles})); "
        "import json, pathlib, sys; from benchmarks.speed import streaming; "
        "data, out, *numbers = sys.argv[1:]; print(json.dumps(streaming.read_epoch("
        "pathlib.Path(data), pathlib.Path(out), *map(int, numbers))))"
    )
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def finish(process: subprocess.Popen) -> dict[str, Any]:
    """The result of a process of `start`.

    Raises:
      InputError: it failed.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise InputError(f"a reader failed with code {process.returncode}: see its message")
    return json.loads(output)


def measure(chosen: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Streams an epoch in `chosen.processes` processes, restarts in its middle, and compares.

    Raises:
      InputError: a record is missing, repeated or wrong, or the restart reads other records.
    """
    base = write_base(folder / "base")
    data = input_pipeline.repeat_shards(base, folder / "data", "train", chosen.records)
    total, shards = data.split("train")["count"], len(data.split("train")["shards"])
    steps = total // (64 * chosen.processes)  # whole batches of the first epoch
    parts = [folder / f"part-{number}.npy" for number in range(chosen.processes)]
    running = [
        start(chosen.handles, data.path, part, number, chosen.processes, 0, steps)
        for number, part in enumerate(parts)
    ]
    results = [finish(process) for process in running]
    read = [np.load(part).reshape(steps, 64) for part in parts]
    everything = np.concatenate(read, axis=1)
    middle, again = steps // 2, min(50, steps - steps // 2)
    finish(
        start(chosen.handles, data.path, folder / "again.npy", 0, chosen.processes, middle, again)
    )
    restarted = np.load(folder / "again.npy").reshape(again, 64)
    if len(np.unique(everything)) != everything.size or everything.max() >= total:
        raise InputError("a record was read twice in one epoch")
    if any(result["wrong"] for result in results):
        raise InputError("a record has the content of another one")
    if not np.array_equal(restarted, read[0][middle : middle + again]):
        raise InputError("after a restart the order differs")
    return {"records": total, "shards": shards, "read": everything.size, "processes": results}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes data to a temporary folder, measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--records", type=options.count, help="records of the data set")
    parser.add_argument("--processes", type=options.count, help="processes that read")
    parser.add_argument("--handles", type=options.count, help="files that a process may open")
    full = {"size": SIZE, "repeats": 1, "records": 500_000, "processes": 2, "handles": 1024}
    quick = {"size": SIZE, "repeats": 1, "records": 20_000, "processes": 2, "handles": 48}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(chosen, pathlib.Path(folder))
    rows = []
    for number, each in enumerate(result["processes"]):
        ratios = [after / each["per_record"][0] for after in each["per_record"][1:]]
        rows.append(
            {
                "process": number,
                "handles": max(each["handles"]),
                "memory": [each["memory"][0], each["memory"][-1]],
                "time": timing.spread(ratios),
                "seconds_to_open": each["seconds_to_open"],
            }
        )
    header = ["process", "open files", "memory, MiB", "time per record over the first tenth"]
    table = [
        [
            row["process"],
            row["handles"],
            " to ".join(f"{value / 2**20:.0f}" for value in row["memory"]),
            timing.format_spread(row["time"]),
        ]
        for row in rows
    ]
    notes = [
        f"{result['read']:,} of {result['records']:,} records in {result['shards']} shards, each "
        f"once; at most {chosen.handles} open files per process; the order after a restart in the "
        "middle of the epoch is the same"
    ]
    harness.report(__file__, argv, chosen, header, table, notes, {"rows": rows} | result)


if __name__ == "__main__":
    harness.run(main)
