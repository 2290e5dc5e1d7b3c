"""`maknet evaluate`: thresholds from the validation split, noise off, and LesaNet's rules."""

import jax
import numpy as np
import pytest
import toy
from runs import NOISE

from maknet_jax import cli, evaluate, files, models, train
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation import protocol
from maknet_jax.runs import workdir

# The direct parents of the toy labels: 2 -> 1 -> 0, and 3 has none.
DIRECT = [[], [0], [1], []]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a barely trained linear network, whose labels have parents."""
    folder = tmp_path_factory.mktemp("run")
    data = toy.write(folder / "data")
    info = files.read_json(data / "dataset.json")
    names = toy.VOCABULARY.names
    for entry, parents in zip(info["labels"], ([], [0], [1, 0], []), strict=True):
        entry["parents"] = [names[k] for k in parents]
    by_name = {name: [names[k] for k in DIRECT[column]] for column, name in enumerate(names)}
    info["about"] = {"direct_parents": by_name}
    files.write_json(data / "dataset.json", info)
    train.train(toy.config(data, "linear", {"epochs": 1.6}), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def scores(run):
    """split -> (scores, labels), computed with the network directly."""
    opened = workdir.open_run(run, devices=jax.devices()[:1])
    dataset = records.open_dataset(run.parent / "data")
    result = {}
    for split in ("train", "val"):
        examples = [dataset.source(split)[k] for k in range(dataset.split(split)["count"])]
        unit = np.clip((np.stack([e.image for e in examples]) + 1024.0) / 4095.0, 0, 1)
        logits = opened.model.apply(opened.variables, unit, train=False).logits
        result[split] = np.asarray(jax.nn.sigmoid(logits)), np.stack([e.labels for e in examples])
    return result


def test_thresholds_are_chosen_on_the_validation_split_not_on_the_scored_one(run, scores):
    by_split = {name: protocol.choose_thresholds(*scores[name]) for name in scores}
    assert (by_split["train"] != by_split["val"]).any()
    summary = evaluate.evaluate(run, splits=["train"])
    assert summary["thresholds"] == "chosen on val"
    out = run / "evaluation"
    np.testing.assert_array_equal(files.read_json(out / "thresholds.json"), by_split["val"])
    opened = workdir.open_run(run)
    report = protocol.evaluate(*scores["train"], by_split["val"], opened.vocabulary.parents)
    for name, value in report.summary.items():
        assert summary["splits"]["train"][name] == pytest.approx(value, abs=1e-6), name


def test_intervals_are_those_of_a_bootstrap_over_patients(run, scores, monkeypatch, capsys):
    """Patients are read from the records; the toy data name none."""
    with pytest.raises(InputError, match="no patient"):
        evaluate.evaluate(run, splits=["train"], intervals=True)
    count = len(scores["train"][0])
    patients = np.arange(count) // 3
    monkeypatch.setattr(evaluate, "patients_of", lambda dataset, split: patients)
    assert cli.main(["evaluate", "--model", str(run), "--split", "train", "--intervals"]) == 0
    values = files.read_json(run / "evaluation" / "train.json")
    intervals = values["intervals"]
    assert intervals["patients"] == patients[-1] + 1
    for metric in ("auc", "f1"):
        mean, low, high = intervals[metric]
        assert (
            mean == pytest.approx(values[metric], abs=1e-5) and low <= mean <= high and low < high
        )
    per_label = protocol.evaluate(
        *scores["train"],
        protocol.choose_thresholds(*scores["val"], unjudged=1.0),
        workdir.open_run(run).vocabulary.parents,
    ).per_label
    for row, (name, entry) in zip(per_label, intervals["labels"].items(), strict=True):
        assert entry["f1"][0] == pytest.approx(row["f1"], abs=1e-5), name
        has = scores["train"][1][:, row["label"]] > 0
        assert entry["patients"] == len(set(patients[has].tolist()))
    assert "macro average" in capsys.readouterr().out


def test_lesanets_rules_take_direct_parents_and_write_to_a_separate_folder(run, scores):
    ours = evaluate.evaluate(run, splits=["train"])
    before = (run / "evaluation" / "train.json").read_bytes()
    summary = evaluate.evaluate(run, splits=["train"], rules="lesanet")
    assert (ours["rules"], summary["rules"]) == ("ours", "lesanet")
    assert (run / "evaluation" / "train.json").read_bytes() == before
    out = run / "evaluation" / "lesanet"
    assert files.read_json(out / "train.json") == summary["splits"]["train"]
    thresholds = protocol.choose_thresholds(*scores["val"], rules="lesanet")
    np.testing.assert_array_equal(files.read_json(out / "thresholds.json"), thresholds)
    report = protocol.evaluate(*scores["train"], thresholds, DIRECT, rules="lesanet")
    for name, value in report.summary.items():
        assert summary["splits"]["train"][name] == pytest.approx(value, abs=1e-6), name
    assert summary["splits"]["train"] != ours["splits"]["train"]


def test_lesanets_rules_need_direct_parents(run, tmp_path):
    dataset = records.open_dataset(run.parent / "data")
    assert evaluate.direct_parents(dataset) == DIRECT
    older = records.Dataset(tmp_path, dataset.info | {"about": {}})
    with pytest.raises(InputError, match="does not record direct parents"):
        evaluate.direct_parents(older)
    for entry in older.info["labels"]:
        entry["parents"] = []
    assert evaluate.direct_parents(older) == [[], [], [], []]
    with pytest.raises(InputError, match="'theirs'"):
        evaluate.evaluate(run, splits=["train"], rules="theirs")


def test_the_command_takes_rules(run, capsys):
    argv = ["evaluate", "--workdir", str(run), "--split=val", "--rules"]
    assert cli.main([*argv, "lesanet"]) == 0
    assert "lesanet" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main([*argv, "theirs"])
    assert caught.value.code == 2


def test_prepare_records_the_direct_parents(shards):
    direct = evaluate.direct_parents(shards)
    assert any(direct)
    for parents, ancestors in zip(direct, shards.vocabulary.parents, strict=True):
        assert set(parents) <= set(ancestors)
    identity = np.eye(len(direct), dtype=bool)
    np.testing.assert_array_equal(
        protocol.add_parents(identity, direct),
        protocol.add_parents(identity, shards.vocabulary.parents),
    )


def test_prediction_has_no_noise_where_training_has_all_of_it(tmp_path):
    """Augmentation and dropout are off: logits are those of a network that has neither."""
    data = toy.write(tmp_path / "data")
    noise = dict.fromkeys(NOISE, 1.0) | {"model.options.dropout_rate": 0.5, "epochs": 1.6}
    config = toy.config(data, "smoke", noise)
    train.train(config, tmp_path / "run")
    run = workdir.open_run(tmp_path / "run")
    images = np.stack([toy.example("val", k).image for k in range(8)])
    options = config.model.options.to_dict() | {"dropout_rate": 0.0}
    model = models.build("maknet", 4, **options)
    unit = np.clip((images + 1024.0) / 4095.0, 0, 1).astype(np.float32)
    expected = model.apply(run.variables, unit, train=False).logits
    for _ in range(2):
        logits = run.predict(run.variables, {"image": images})["logits"]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(logits, run.score({"image": images}))
