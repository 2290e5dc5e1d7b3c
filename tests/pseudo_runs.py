"""A linear teacher of the toy data, its confidences, and the rows of its pseudo-labels."""

import jax
import numpy as np
import toy

from maknet_jax import files, train
from maknet_jax.runs import workdir

COUNTS = (10, 7, 12)
SHARDS = [f"part-{number:05d}-of-00003.npy" for number in range(3)]


def train_teacher(folder):
    """The workdir of a linear teacher whose first and last label exclude each other."""
    data = toy.write(folder / "data")
    info = files.read_json(data / "dataset.json")
    info["labels"][0]["exclusive"] = [info["labels"][3]["name"]]
    files.write_json(data / "dataset.json", info)
    changes = {"epochs": 16.0, "optimizer.learning_rate": 0.05, "loss.gamma": 0.0}
    train.train(toy.config(data, "linear", changes), folder / "run")
    return folder / "run"


def confidences_of(teacher, images):
    """The teacher's confidences, computed with its network directly."""
    run = workdir.open_run(teacher, devices=jax.devices()[:1])
    unit = np.clip((np.stack(images) + 1024.0) / 4095.0, 0, 1)
    return np.asarray(jax.nn.sigmoid(run.model.apply(run.variables, unit, train=False).logits))


def greedy(values, top=15, threshold=0.5):
    """The selected columns of an image; 0 and 3 exclude each other."""
    chosen = []
    for column in np.argsort(-values, kind="stable")[:top]:
        if values[column] > threshold and {0: 3, 3: 0}.get(int(column)) not in chosen:
            chosen.append(int(column))
    return chosen


def read_rows(out):
    return np.concatenate([np.load(out / name) for name in SHARDS])


def labels_of(row):
    return row["labels"][row["labels"] >= 0].tolist()
