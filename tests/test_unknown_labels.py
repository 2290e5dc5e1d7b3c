"""Unknown labels count in no class weight, loss, threshold or metric; runs record their data."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy

from maknet_jax import evaluate, files, predict, train
from maknet_jax.data import records
from maknet_jax.runs import build, workdir

ORIGIN = {"source": "Ours: four quadrants", "citation": "A. Author 2020", "licence": "CC BY 4.0"}


def masked(split, number):
    """A toy example whose labels are known for some columns; the first is known in half."""
    rng = np.random.default_rng([99, len(split), number])
    example = toy.example(split, number)
    mask = (rng.random(4) < [0.5, 0.8, 1.0, 1.0]).astype(np.uint8)
    return dataclasses.replace(example, label_mask=mask)


def write(out, unknown):
    """The masked toy data; labels that are unknown hold `unknown`, 0 or 1."""
    splits, digests = {}, []
    for split, count in (("train", toy.TRAIN), ("val", toy.VAL)):
        rows = [masked(split, number) for number in range(count)]
        masks = np.stack([row.label_mask for row in rows])
        labels = np.stack([row.labels for row in rows])
        stored = np.where(masks > 0, labels, unknown).astype(np.uint8)
        rows = [dataclasses.replace(r, labels=v) for r, v in zip(rows, stored, strict=True)]
        name = f"{split}/part-00000-of-00001.array_record"
        _, digest = records.write_shard(out / name, map(records.encode, rows))
        splits[split] = {
            "count": count,
            "label_counts": (labels & masks).sum(axis=0, dtype=int).tolist(),
            "known_counts": masks.sum(axis=0, dtype=int).tolist(),
            "shards": [{"file": name, "count": count, "digest": digest}],
        }
        digests.append(digest)
    info = {"format": records.FORMAT, "kind": "segmentations", "size": toy.SIZE, "splits": splits}
    info |= {"labels": toy.VOCABULARY.to_json(), "fingerprint": "".join(digests), "about": ORIGIN}
    files.write_json(out / "dataset.json", info)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two data sets that differ in their unknown labels only: (workdir, summary) each."""
    root = tmp_path_factory.mktemp("unknown")
    results = []
    for unknown in (0, 1):
        data, folder = write(root / f"data{unknown}", unknown), root / f"run{unknown}"
        results.append((folder, train.train(toy.config(data, "linear"), folder)))
    return results


def test_the_loss_thresholds_and_metrics_of_a_run_ignore_unknown_labels(runs):
    (first, summary), (second, other) = runs
    assert toy.lines(first) == toy.lines(second)
    assert summary["val"] == other["val"] and summary["val"]["auc"] is not None
    opened = [workdir.open_run(folder) for folder in (first, second)]
    np.testing.assert_array_equal(opened[0].thresholds, opened[1].thresholds)
    leaves = [jax.tree.leaves(run.variables) for run in opened]
    for one, two in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_scores_of_evaluate_ignore_unknown_labels(runs):
    reports = [evaluate.evaluate(folder, splits=["val"])["splits"]["val"] for folder, _ in runs]
    assert reports[0] == reports[1] and reports[0]["labels_evaluated"] == 4
    tables = [(folder / "evaluation" / "val_labels.csv").read_text() for folder, _ in runs]
    assert tables[0] == tables[1]
    rows = [line.split(",") for line in tables[0].splitlines()]
    known = np.sum([masked("val", n).label_mask for n in range(toy.VAL)], axis=0, dtype=int)
    assert [int(row[rows[0].index("examples")]) for row in rows[1:]] == known.tolist()


def class_weights(data, tmp_path, monkeypatch):
    """(pos_weight, neg_weight) that a training on `data` would use."""
    calls = []
    original = build.losses.class_weights
    monkeypatch.setattr(
        build.losses,
        "class_weights",
        lambda *args, **kwargs: calls.append(original(*args, **kwargs)) or calls[-1],
    )
    monkeypatch.setattr(train._Loop, "run", lambda *_: None)
    train.train(toy.config(data, "linear"), tmp_path / "run")
    return calls[0]


def test_class_weights_follow_from_known_labels(tmp_path, monkeypatch):
    rows = [masked("train", number) for number in range(toy.TRAIN)]
    known = np.sum([row.label_mask for row in rows], axis=0, dtype=float)
    positive = np.sum([row.labels & row.label_mask for row in rows], axis=0, dtype=float)
    assert known[0] < 30 and known[2] == toy.TRAIN
    pos_weight, neg_weight = class_weights(write(tmp_path / "data", 1), tmp_path, monkeypatch)
    np.testing.assert_allclose(pos_weight, known / (2 * positive), rtol=1e-6)
    np.testing.assert_allclose(neg_weight, known / (2 * (known - positive)), rtol=1e-6)


def test_without_unknown_labels_class_weights_are_unchanged(tmp_path, monkeypatch):
    data = toy.write(tmp_path / "data")
    before = class_weights(data, tmp_path / "a", monkeypatch)
    info = files.read_json(data / "dataset.json")
    for split in info["splits"].values():
        assert "known_counts" not in split  # as earlier versions wrote it
        split["known_counts"] = [split["count"]] * 4
    files.write_json(data / "dataset.json", info)
    after = class_weights(data, tmp_path / "b", monkeypatch)
    counts = np.asarray(info["splits"]["train"]["label_counts"], float)
    expected = (toy.TRAIN / (2 * counts)).astype(np.float32)
    for weights in (before, after):
        np.testing.assert_array_equal(weights[0], expected)


def test_a_label_that_is_never_known_is_not_an_error(tmp_path, monkeypatch):
    data = write(tmp_path / "data", 0)
    info = files.read_json(data / "dataset.json")
    info["splits"]["train"]["known_counts"][1] = info["splits"]["train"]["label_counts"][1] = 0
    files.write_json(data / "dataset.json", info)
    pos_weight, neg_weight = class_weights(data, tmp_path, monkeypatch)
    assert np.isfinite(pos_weight).all() and np.isfinite(neg_weight).all()


def test_runs_and_predictions_record_their_training_data(runs, phantom, tmp_path):
    folder, _ = runs[0]
    stored = json.loads((folder / "dataset.json").read_text())
    assert stored["origin"] == {"kind": "segmentations"} | ORIGIN
    assert workdir.open_run(folder).trained_on == ORIGIN["source"]
    summary = predict.predict(folder, phantom["dicom"], tmp_path / "p.csv")
    assert summary["trained_on"] == ORIGIN["source"]
    assert evaluate.evaluate(folder, splits=["val"])["trained_on"] == ORIGIN["source"]


def test_a_run_of_an_earlier_version_resumes_and_opens(runs, tmp_path):
    folder, _ = runs[1]
    stored = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(
        json.dumps({k: stored[k] for k in stored if k != "origin"})
    )
    assert workdir.open_run(folder).trained_on is None
    train.train(toy.config(folder.parent / "data1", "linear"), folder)
    assert json.loads((folder / "dataset.json").read_text()) == stored


def test_generated_and_deeplesion_data_name_their_source(shards):
    assert shards.origin["kind"] == "phantom"
    assert shards.origin["source"] == "a generated CT phantom"
    plain = records.Dataset(shards.path, shards.info | {"about": {}})
    assert plain.origin["source"] == "DeepLesion"
    nothing = records.Dataset(shards.path, {"kind": "table"})
    assert nothing.origin == {"kind": "table", "source": None, "citation": None, "licence": None}
