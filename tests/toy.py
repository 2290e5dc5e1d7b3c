"""A tiny learnable data set and tiny runs on it, for the tests of the loop and of the verbs."""

import json

import numpy as np

from maknet_jax import files
from maknet_jax.data import pseudo_labels, records
from maknet_jax.data.labels import Label, Vocabulary
from maknet_jax.runs import config as configs

SIZE, TRAIN, VAL, BATCH = 32, 40, 13, 8
SPEED = ("train/images_per_second", "train/data_wait")
VOCABULARY = Vocabulary(
    (Label("top left"), Label("top right"), Label("bottom left"), Label("bottom right"))
)


def example(split, number, seed=0):
    """Noisy air, with a bright square in every quadrant whose label is set."""
    rng = np.random.default_rng([seed, ("train", "val", "unlabelled").index(split), number])
    labels = (rng.random(4) < 0.5).astype(np.uint8)
    image = rng.normal(-900, 60, (SIZE, SIZE, 3))
    for quadrant in np.flatnonzero(labels):
        row, column = rng.integers(2, 6, 2) + 16 * np.array(divmod(quadrant, 2))
        image[row : row + 8, column : column + 8] += 1200
    mask = np.ones(4, np.uint8)
    return records.Example(f"{split}-{number}", image.astype(np.int16), labels, mask, {})


def write(out, *, seed=0, train=TRAIN, val=VAL):
    """A finished data set in `out` with two splits, as `maknet prepare` writes it."""
    splits, digests = {}, []
    for split, count in (("train", train), ("val", val)):
        examples = [example(split, number, seed) for number in range(count)]
        entry = {"count": count, "label_counts": [0] * len(VOCABULARY), "shards": []}
        if examples:
            name = f"{split}/part-00000-of-00001.array_record"
            _, digest = records.write_shard(out / name, map(records.encode, examples))
            counts = np.sum([row.labels for row in examples], axis=0, dtype=int)
            shard = {"file": name, "count": count, "digest": digest}
            entry |= {"label_counts": counts.tolist(), "shards": [shard]}
            digests.append(digest)
        splits[split] = entry
    info = {"format": records.FORMAT, "kind": "table", "size": SIZE, "splits": splits}
    info |= {"labels": VOCABULARY.to_json(), "fingerprint": "".join(digests)}
    files.write_json(out / "dataset.json", info)
    return out


def write_unlabelled(out, counts=(10, 7, 12), *, seed=7, labelled=False):
    """A finished data set of one split `unlabelled` in shards of `counts` images.

    Without labels, like real scans; `labelled` keeps the labels that they were drawn from.
    """
    shards, first = [], 0
    none = np.zeros(0, np.uint8)
    for number, count in enumerate(counts):
        rows = [example("unlabelled", k, seed) for k in range(first, first + count)]
        if not labelled:
            rows = [records.Example(row.id, row.image, none, none, {}) for row in rows]
        name = f"unlabelled/part-{number:05d}-of-{len(counts):05d}.array_record"
        _, digest = records.write_shard(out / name, map(records.encode, rows))
        shards.append({"file": name, "count": count, "digest": digest})
        first += count
    split = {"count": first, "label_counts": [], "shards": shards}
    info = {
        "format": records.FORMAT,
        "kind": "dicom",
        "size": SIZE,
        "splits": {"unlabelled": split},
    }
    info |= {"labels": VOCABULARY.to_json() if labelled else []}
    info |= {"fingerprint": "".join(shard["digest"] for shard in shards)}
    files.write_json(out / "dataset.json", info)
    return out


def write_pseudo(out, images, *, seed=7):
    """Pseudo-labels of `write_unlabelled`'s images by a teacher that makes no mistake."""
    dataset = records.open_dataset(images)
    rows = []
    for number in range(dataset.split("unlabelled")["count"]):
        labels = example("unlabelled", number, seed).labels
        confidences = np.where(labels, 0.9 - 0.01 * np.arange(len(labels)), 0.1)[None]
        columns, _ = pseudo_labels.select(
            confidences.astype(np.float32), np.zeros((len(labels),) * 2, bool), top=4
        )
        rows.append(pseudo_labels.rows_of([number], columns, confidences, top=4))
    sha256 = pseudo_labels.write_rows(out / "all.npy", np.concatenate(rows))
    metadata = {"records": str(images), "fingerprint": dataset.fingerprint, "split": "unlabelled"}
    metadata |= {"labels": VOCABULARY.names, "soft": False}
    files.write_json(
        out / "pseudo.json", metadata | {"shards": [{"file": "all.npy", "sha256": sha256}]}
    )
    return out


def overrides(data, name, **changes):
    """Overrides that make a config tiny: 40 steps of 8 images, odd log and checkpoint intervals."""
    values = {
        "epochs": 8.0,
        "data.path": str(data),
        "data.size": SIZE,
        "data.batch_size": BATCH,
        "evaluate_every": 1.6,  # 8 steps
        "checkpoint_every": 15,
        "log_every": 10,
        "domain_components": 0,  # saves a compilation; `test_domain_run` has them
    }
    if name == "linear":
        values |= {"model.options.edge": 4, "optimizer.learning_rate": 0.01}
    else:
        values |= {
            "model.options.stem": 8,
            "model.options.blocks": (1,),
            "model.options.growth_rates": (8,),
            "model.options.widths": (8,),
        }
    return [f"{key}={value}" for key, value in (values | changes).items()]


def config(data, name, changes=None):
    """The tiny `smoke` or `linear` config on `data`."""
    return configs.load(name, overrides(data, name, **(changes or {})))


def lines(folder):
    """The metrics of a run without its `SPEED`, which differs between runs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows]
