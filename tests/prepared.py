"""Reads the output of `maknet prepare`: its tables, and its examples by split."""

import csv

from maknet_jax.data import records


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def examples(out):
    dataset = records.open_dataset(out)
    return {
        split: [source[k] for k in range(len(source))]
        for split in dataset.info["splits"]
        for source in [dataset.source(split)]
    }
