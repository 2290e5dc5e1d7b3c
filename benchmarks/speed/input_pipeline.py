"""The student's input and the labelling of images: how far from their limits, and at what size.

    python benchmarks/speed/input_pipeline.py  # about ten minutes on two cores; --quick: a minute

The loader (shuffled, threads, batches) stands beside a plain sequential read and decompression of
the same shards; `maknet pseudo-label` beside its bare prediction step on a batch that is there
already; and both with many records (shards repeated as links) beside few of them.
"""

import itertools
import pathlib
import resource
import shutil
import tempfile
import time

import jax
import numpy as np

from benchmarks import harness
from maknet_jax import files, phantom, prepare, pseudo_label, train
from maknet_jax.cli import options
from maknet_jax.data import pipeline, records
from maknet_jax.runs import config as configs

ROOFLINE = 1 / 48e-6  # images/s of one TPU v5e: 48 us an image of a training step


def grown(source, out, split, count):
    """A data set of `count` records or a little more: links to the shards of `source`."""
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
    info["fingerprint"] = f"{info['fingerprint']}-{entry['count']}"
    files.write_json(out / "dataset.json", info | {"splits": {split: entry}})
    return records.open_dataset(out)


def memory():
    """Bytes that this process held at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def images_per_second(batches, count):
    """The rate of a loader over `count` images, after its first batch."""
    size = len(next(batches)["image"])
    began, seen = time.perf_counter(), 0
    while seen < count:
        next(batches)
        seen += size
    return seen / (time.perf_counter() - began)


def sequential(paths, count):
    """The rate of reading, decompressing and decoding records one after another."""
    source, done = records.RecordSource(paths), 0
    began = time.perf_counter()
    while done < count:
        for index in range(min(len(source), count - done)):
            np.ascontiguousarray(source[index].image)
            done += 1
    return done / (time.perf_counter() - began)


def main(argv=None):
    """Makes the data in a temporary folder, measures, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--records", type=options.count, help="of the large data set")
    parser.add_argument("--volumes", type=options.count, help="generated CT volumes")
    full = {"size": 256, "repeats": 3, "records": 100_000, "volumes": 12}
    quick = {"size": 64, "repeats": 2, "records": 4_000, "volumes": 4}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        rows, notes = measure(chosen, pathlib.Path(folder))
    header = ["", "images/s", "of the limit", "what the limit is"]
    table = [
        [row["what"], harness.shown(row["rate"]), harness.shown(row["share"]), row["limit"]]
        for row in rows
    ]
    harness.report(__file__, argv, chosen, header, table, notes, {"rows": rows})


def measure(chosen, folder):
    """(rows, notes) of everything."""
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
    files_ = [shards / shard["file"] for shard in dataset.split(split)["shards"]]
    batch = 16

    def loading(threads):
        batches = pipeline.train_batches(source, batch_size=batch, seed=0, threads=threads)
        return images_per_second(batches, count)

    plain, loaded = [], []
    for _ in range(chosen.repeats):
        plain.append(sequential(files_, count))
        loaded.append(loading(1))
    threaded = [loading(cores) for _ in range(chosen.repeats)]
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
        f"records of {chosen.size} x {chosen.size} x 3; {per_core:.0f} images/s a core: a TPU v5e "
        f"at {ROOFLINE:,.0f} images/s, its compiler's roofline (`tpu_aot.py`; nothing ran on one), "
        f"needs {ROOFLINE / per_core:.0f} such cores",
    ]
    row, start = labelling(chosen, folder, shards, split)
    more, note = at_size(chosen, folder, split)
    return [*rows, row, *more], [*notes, start, note]


def row_of(what, rates, limits, limit):
    """One line of the table: rates, and their share of what they could be at most, in turns."""
    share = [rate / most for rate, most in zip(rates, limits, strict=True)]
    return {
        "what": what,
        "rate": harness.spread(rates),
        "share": harness.spread(share),
        "limit": limit,
    }


def teacher(folder, data, name, size, labels=5):
    """A workdir of one training step on the images of `data`, with made-up labels."""
    info = files.read_json(data / "dataset.json")
    examples = records.open_dataset(data).source("unlabelled")
    vocabulary = [
        {"name": f"label {n}", "class": "", "parents": [], "exclusive": []} for n in range(labels)
    ]
    made = []
    for number in range(8):
        one = np.arange(labels) == number % labels
        image, full = examples[number].image, np.ones(labels, np.uint8)
        made.append(records.Example(f"x{number}", image, one.astype(np.uint8), full, {}))
    out = folder / f"labelled-{name}-{size}"
    _, digest = records.write_shard(out / "train/part-0.array_record", map(records.encode, made))
    shard = {"file": "train/part-0.array_record", "count": 8, "digest": digest}
    entry = {"count": 8, "label_counts": [2] * labels, "shards": [shard]}
    info |= {"labels": vocabulary, "splits": {"train": entry}, "fingerprint": digest}
    files.write_json(out / "dataset.json", info)
    page = configs.load(
        name,
        [
            f"data.path={out}",
            f"data.size={size}",
            "data.batch_size=8",
            "epochs=1.0",
            "evaluate_every=99",
        ],
    )
    train.train(page, folder / f"run-{name}-{size}", devices=jax.devices()[:1])
    return folder / f"run-{name}-{size}"


def labelling(chosen, folder, shards, split):
    """`maknet pseudo-label` with the teacher's network beside its bare prediction step."""
    from maknet_jax.runs import workdir

    name = "smoke" if chosen.quick else "teacher"
    trained = teacher(folder, shards, name, chosen.size)
    run = workdir.open_run(trained)
    batch = {"image": np.zeros((16, chosen.size, chosen.size, 3), np.int16)}
    timer = harness.timer(lambda calls: harness.elapsed(lambda: run.score(batch), calls))
    sizes = (120, 240) if chosen.quick else (240, 960)
    sets = [grown(shards, folder / f"grown-{size}", split, size) for size in sizes]
    less, more = (data.split(split)["count"] for data in sets)
    rates, limits, starts = [], [], []
    for turn in range(chosen.repeats + 1):
        took = []
        for number, data in enumerate(sets):
            began = time.perf_counter()
            out = folder / f"pseudo-{turn}-{number}"
            pseudo_label.pseudo_label(trained, data.path, out, batch_size=16)
            took.append(time.perf_counter() - began)
        if turn:  # the first one compiles
            rates.append((more - less) / (took[1] - took[0]))
            limits.append(16 / timer())
            starts.append(took[0] - less / rates[-1])
    limit = f"the bare prediction step ({name}, batch 16; aim: 0.9)"
    note = f"pseudo-label: {np.median(starts):.1f} s more to start and to end, whatever the number"
    return row_of("pseudo-label, what more images add", rates, limits, limit), note


def at_size(chosen, folder, split):
    """Loading and labelling of many records beside a tenth, by a trivial network at 32 x 32.

    Labelling is judged by what more records add: starting, compiling and the last pictures cost the
    same whatever the number.
    """
    trained, held, took = teacher(folder, folder / "shards-32", "linear", 32), {}, {}
    sizes = (1_000, max(2_000, chosen.records // 10), chosen.records)
    rates = {}
    for count in (sizes[0], *sizes):  # the first one warms up
        data = grown(folder / "shards-32", folder / f"grown-{len(took)}-{count}", split, count)
        total = data.split(split)["count"]
        batches = pipeline.train_batches(data.source(split), batch_size=64, seed=0, threads=2)
        rates[count] = images_per_second(batches, min(chosen.records, 20_000))
        out = folder / f"many-{len(took)}-{count}"
        began = time.perf_counter()
        pseudo_label.pseudo_label(trained, data.path, out, batch_size=256)
        took[count] = total, time.perf_counter() - began
        held[count] = memory()
        shutil.rmtree(out)
    added = []
    for few, many in itertools.pairwise(sizes):
        (less, first), (more, second) = took[few], took[many]
        added.append((more - less) / (second - first))
    one, ten = f"{sizes[0]:,}", f"{sizes[1]:,}"
    rows = [
        row_of(
            f"load, {sizes[2]:,} records",
            [rates[sizes[2]]],
            [rates[sizes[0]]],
            f"{one} records (aim: 0.9), 32 x 32",
        ),
        row_of(
            f"label, the records from {ten} to {sizes[2]:,}",
            added[1:],
            added[:1],
            f"those from {one} to {ten} (aim: 0.9), linear network",
        ),
    ]
    note = "memory held at most: " + ", ".join(
        f"{most / 2**20:.0f} MiB after {count:,} records" for count, most in held.items()
    )
    return rows, note


if __name__ == "__main__":
    harness.run(main)
