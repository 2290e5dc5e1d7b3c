"""Two processes (gloo on CPU) train and label like one: each reads its part of the images."""

import json

import jax
import numpy as np
import pytest
import toy
import two_processes

from maknet_jax import pseudo_label, train

SCRIPT = """
import toy
from maknet_jax import pseudo_label, train
from maknet_jax.data import pseudo_labels
data, folder = arguments
train.train(toy.config(data, "linear"), folder)
written, original = [], pseudo_labels.write_rows
pseudo_labels.write_rows = lambda path, rows: written.append(path.name) or original(path, rows)
pseudo_label.pseudo_label(folder, data + "/unlabelled", folder + "/../labels")
print("wrote", *written)
pseudo_label.pseudo_label(folder, data + "/unlabelled", folder + "/../precise", precision=0.9)
assert jax.process_count() == 2 and jax.device_count() == 2
"""


def test_two_processes_are_one(tmp_path):
    data = toy.write(tmp_path / "data")
    toy.write_unlabelled(data / "unlabelled")
    printed = two_processes.run(SCRIPT, data, tmp_path / "two", timeout=180)
    train.train(toy.config(data, "linear"), tmp_path / "one", devices=jax.devices()[:2])
    two, one = (toy.lines(tmp_path / name) for name in ("two", "one"))
    assert len(two) == len(one) > 5
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    entries = [
        json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    ]
    assert len([line for line in entries if line["message"].startswith("linear:")]) == 1
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")
    ]
    np.testing.assert_allclose(*(s["best_val_auc"] for s in summaries), atol=1e-5)
    # The processes share the shards; with as many images per device the bytes are equal.
    wrote = [line.split()[1:] for lines in printed for line in lines if "wrote" in line]
    shards = [f"part-{number:05d}-of-00003.npy" for number in range(3)]
    assert wrote == [[shards[0], shards[2]], [shards[1]]]
    one, two = tmp_path / "one-labels", tmp_path / "labels"
    options = {"devices": jax.devices()[:1]}
    pseudo_label.pseudo_label(tmp_path / "two", data / "unlabelled", one, **options)
    for name in [*shards, "counts.csv", "sweep.csv", "pseudo.json", "claim.json"]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert len((two / "log.jsonl").read_text().splitlines()) == 1
    pseudo_label.pseudo_label(
        tmp_path / "two", data / "unlabelled", tmp_path / "alone", precision=0.9, **options
    )
    for name in [*shards, "pseudo.json", "thresholds.json"]:
        assert (tmp_path / "alone" / name).read_bytes() == (
            tmp_path / "precise" / name
        ).read_bytes()
