"""Rates of the input pipeline and of pseudo-labelling relative to their limits.

    python benchmarks/speed/input_pipeline.py  # about ten minutes on two cores; --quick: a minute

Compares the loader (shuffling, threads, batching) with sequential reading and decompression of the
same shards, `maknet pseudo-label` with its prediction step alone on a batch in memory, and both
with many records (shards repeated by symbolic links) and with few. `training_loop.py` measures the
training loop, from records to weights.
"""

import argparse
import itertools
import pathlib
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import harness, timing
from maknet_jax import files, phantom, prepare, pseudo_label, train
from maknet_jax.cli import options
from maknet_jax.data import pipeline, records
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir

ROOFLINE = 1 / 48e-6  # images/s of training on one TPU v5e: 48 us per image, see aot.py


def repeat_shards(
    source: pathlib.Path, out: pathlib.Path, split: str, count: int
) -> records.Dataset:
    """Writes a data set of `count` records or slightly more: symbolic links to shards.

    Args:
      source: the data set with the shards.
      out: the folder to write.
      split: the split to repeat.
      count: records wanted.
    """
    info = files.read_json(source / "dataset.json")
    shards = [shard | {"file": source / shard["file"]} for shard in info["splits"][split]["shards"]]
    entry = {"count": 0, "label_counts": info["splits"][split]["label_counts"], "shards": []}
    (out / split).mkdir(parents=True)
    while entry["count"] < count:
        shard = shards[len(entry["shards"]) % len(shards)]
        name = f"{split}/part-{len(entry['shards']):05d}.array_record"
        (out / name).symlink_to(shard["file"].resolve())
        entry["shards"].append(shard | {"file": name})
        entry["count"] += shard["count"]
    info |= {"fingerprint": f"{info['fingerprint']}-{entry['count']}", "splits": {split: entry}}
    files.write_json(out / "dataset.json", info | {"content": records.content_digest(info)})
    return records.open_dataset(out)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def images_per_second(batches: Iterator[dict[str, Any]], count: int) -> float:
    """The rate of a loader over `count` images after its first batch."""
    size = len(next(batches)["image"])
    start, seen = time.perf_counter(), 0
    while seen < count:
        next(batches)
        seen += size
    return seen / (time.perf_counter() - start)


def sequential(paths: Sequence[pathlib.Path], count: int) -> float:
    """Images per second when reading, decompressing and decoding records one by one."""
    source, done = records.RecordSource(paths), 0
    start = time.perf_counter()
    while done < count:
        for index in range(min(len(source), count - done)):
            np.ascontiguousarray(source[index].image)
            done += 1
    return done / (time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes data to a temporary folder, measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--records", type=options.count, help="records of the large data set")
    parser.add_argument("--volumes", type=options.count, help="generated CT volumes")
    full = {"size": 256, "repeats": 3, "records": 100_000, "volumes": 12}
    quick = {"size": 64, "repeats": 2, "records": 4_000, "volumes": 4}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        rows, notes = measure(chosen, pathlib.Path(folder))
    header = ["", "images/s", "share of limit", "limit"]
    table = [
        [
            row["what"],
            timing.format_spread(row["rate"]),
            timing.format_spread(row["share"]),
            row["limit"],
        ]
        for row in rows
    ]
    harness.report(__file__, argv, chosen, header, table, notes, {"rows": rows})


def measure(
    chosen: argparse.Namespace, folder: pathlib.Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs all measurements; returns the rows of the JSON and the notes."""
    paths = phantom.write_phantom(
        folder / "phantom", patients=4, unlabelled_volumes=chosen.volumes, size=chosen.size
    )
    for size in {chosen.size, 32}:
        prepare.prepare_dicom(
            paths["dicom"],
            folder / f"shards-{size}",
            salt_file=folder / "salt",
            min_slices=30,
            size=size,
        )
    shards, split, cores = folder / f"shards-{chosen.size}", "unlabelled", options.cores()
    dataset = records.open_dataset(shards)
    source = dataset.source(split)
    count = max(64, min(4 * len(source), 20 * len(source) * 64 // chosen.size))
    shard_paths = [shards / shard["file"] for shard in dataset.split(split)["shards"]]
    batch = 16

    def load(threads: int) -> float:
        batches = pipeline.train_batches(source, batch_size=batch, seed=0, threads=threads)
        return images_per_second(batches, count)

    plain, loaded = [], []
    for _ in range(chosen.repeats):
        plain.append(sequential(shard_paths, count))
        loaded.append(load(1))
    threaded = [load(cores) for _ in range(chosen.repeats)]
    rows = [
        row_of("loader, one thread", loaded, plain, "sequential read of the same shards"),
        row_of(
            f"loader, {cores} threads",
            threaded,
            [cores * rate for rate in plain],
            f"{cores} x the sequential read",
        ),
    ]
    per_core = float(np.median(threaded)) / cores
    notes = [
        f"records of {chosen.size} x {chosen.size} x 3; {per_core:.0f} images/s per core; a TPU "
        f"v5e at {ROOFLINE:,.0f} images/s, the roofline of the compiled step (aot.py; nothing "
        f"ran on a TPU), needs {ROOFLINE / per_core:.0f} such cores",
    ]
    row, overhead = labelling(chosen, folder, shards, split)
    size_rows, note = at_size(chosen, folder, split)
    return [*rows, row, *size_rows], [*notes, overhead, note]


def row_of(
    name: str, rates: Sequence[float], limits: Sequence[float], limit: str
) -> dict[str, Any]:
    """A row of the JSON.

    Args:
      name: of the row.
      rates: images per second, one per turn.
      limits: the upper bound of each rate.
      limit: describes the bound.
    """
    share = [rate / bound for rate, bound in zip(rates, limits, strict=True)]
    return {
        "what": name,
        "rate": timing.spread(rates),
        "share": timing.spread(share),
        "limit": limit,
    }


def write_labelled(
    out: pathlib.Path, data: pathlib.Path, labels: int, counts: Mapping[str, int]
) -> pathlib.Path:
    """Writes a labelled data set: images of an unlabelled one, with arbitrary labels.

    Args:
      out: the folder to write.
      data: the data set of unlabelled images.
      labels: number of labels K.
      counts: records by split; images are repeated if there are too few.

    Returns:
      `out`.
    """
    info = files.read_json(data / "dataset.json")
    images = records.open_dataset(data).source("unlabelled")
    vocabulary = [
        {"name": f"label {n}", "class": "", "parents": [], "exclusive": []} for n in range(labels)
    ]
    splits, digests = {}, []
    for split, count in counts.items():
        examples = []
        for number in range(count):
            one_hot = np.arange(labels) == number % labels
            image, mask = images[number % len(images)].image, np.ones(labels, np.uint8)
            name = f"{split}-{number}"
            examples.append(records.Example(name, image, one_hot.astype(np.uint8), mask, {}))
        name = f"{split}/part-0.array_record"
        _, digest = records.write_shard(out / name, map(records.encode, examples))
        known = np.sum([example.labels for example in examples], axis=0, dtype=int).tolist()
        shard = {"file": name, "count": count, "digest": digest}
        splits[split] = {"count": count, "label_counts": known, "shards": [shard]}
        digests.append(digest)
    info |= {"labels": vocabulary, "splits": splits, "fingerprint": "".join(digests)}
    files.write_json(out / "dataset.json", info | {"content": records.content_digest(info)})
    return out


def train_teacher(
    folder: pathlib.Path, data: pathlib.Path, name: str, size: int, labels: int = 5
) -> pathlib.Path:
    """Trains one step on images of `data` with arbitrary labels.

    Args:
      folder: where to write the data set and the run.
      data: a data set of unlabelled images.
      name: the config.
      size: pixels per side of the images.
      labels: number of labels.

    Returns:
      The workdir.
    """
    out = write_labelled(folder / f"labelled-{name}-{size}", data, labels, {"train": 8})
    config = configs.load(
        name,
        [
            f"data.path={out}",
            f"data.size={size}",
            "data.batch_size=8",
            "epochs=1.0",
            "evaluate_every=99",
        ],
    )
    train.train(config, folder / f"run-{name}-{size}", devices=jax.devices()[:1])
    return folder / f"run-{name}-{size}"


def labelling(
    chosen: argparse.Namespace, folder: pathlib.Path, shards: pathlib.Path, split: str
) -> tuple[dict[str, Any], str]:
    """Compares `maknet pseudo-label` with its prediction step alone; returns (row, note).

    The rate is that of the additional images of a larger set, because the start and the end take
    the same time for any number of images.
    """
    name = "smoke" if chosen.quick else "teacher"
    trained = train_teacher(folder, shards, name, chosen.size)
    run = workdir.open_run(trained)
    batch = {"image": np.zeros((16, chosen.size, chosen.size, 3), np.int16)}
    measure_step = timing.timer(lambda calls: timing.elapsed(lambda: run.score(batch), calls))
    sizes = (120, 240) if chosen.quick else (240, 960)
    sets = [repeat_shards(shards, folder / f"repeated-{size}", split, size) for size in sizes]
    few, many = (data.split(split)["count"] for data in sets)
    rates, limits, overheads = [], [], []
    for turn in range(chosen.repeats + 1):
        seconds = []
        for number, data in enumerate(sets):
            start = time.perf_counter()
            out = folder / f"pseudo-{turn}-{number}"
            pseudo_label.pseudo_label(trained, data.path, out, batch_size=16)
            seconds.append(time.perf_counter() - start)
        if turn:  # the first turn compiles
            rates.append((many - few) / (seconds[1] - seconds[0]))
            limits.append(16 / measure_step())
            overheads.append(seconds[0] - few / rates[-1])
    limit = f"the prediction step alone ({name}, batch 16; target: 0.9)"
    note = (
        f"pseudo-label: {np.median(overheads):.1f} s to start and to end, for any number of images"
    )
    return row_of("pseudo-label, additional images", rates, limits, limit), note


def at_size(
    chosen: argparse.Namespace, folder: pathlib.Path, split: str
) -> tuple[list[dict[str, Any]], str]:
    """Loads and labels many records and fewer, with a linear network at 32 x 32.

    The rate of labelling is that of the additional records: start, compilation and the contact
    sheets at the end take the same time for any number of records.

    Returns:
      (rows, note): rows of the JSON and a note with the peak memory.
    """
    trained = train_teacher(folder, folder / "shards-32", "linear", 32)
    memory: dict[int, int] = {}
    seconds: dict[int, tuple[int, float]] = {}
    sizes = (1_000, max(2_000, chosen.records // 10), chosen.records)
    rates = {}
    for count in (sizes[0], *sizes):  # the first pass warms up
        data = repeat_shards(
            folder / "shards-32", folder / f"repeated-{len(seconds)}-{count}", split, count
        )
        total = data.split(split)["count"]
        batches = pipeline.train_batches(data.source(split), batch_size=64, seed=0, threads=2)
        rates[count] = images_per_second(batches, min(chosen.records, 20_000))
        out = folder / f"many-{len(seconds)}-{count}"
        start = time.perf_counter()
        pseudo_label.pseudo_label(trained, data.path, out, batch_size=256)
        seconds[count] = total, time.perf_counter() - start
        memory[count] = peak_memory()
        shutil.rmtree(out)
    added = []
    for smaller, larger in itertools.pairwise(sizes):
        (few, first), (many, second) = seconds[smaller], seconds[larger]
        added.append((many - few) / (second - first))
    small, middle, large = (f"{size:,}" for size in sizes)
    rows = [
        row_of(
            f"load, {large} records",
            [rates[sizes[2]]],
            [rates[sizes[0]]],
            f"{small} records (target: 0.9), 32 x 32",
        ),
        row_of(
            f"label, records {middle} to {large}",
            added[1:],
            added[:1],
            f"records {small} to {middle} (target: 0.9), linear network",
        ),
    ]
    note = "peak memory: " + ", ".join(
        f"{peak / 2**20:.0f} MiB after {count:,} records" for count, peak in memory.items()
    )
    return rows, note


if __name__ == "__main__":
    harness.run(main)
