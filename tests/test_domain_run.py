"""Out-of-domain statistics of a run: written by training, read by predict, carried by bundles."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import toy

import maknet_jax
from maknet_jax import cli, export, predict, train
from maknet_jax.data import records
from maknet_jax.errors import InputError, Stopped
from maknet_jax.evaluation import domain_fit, evaluator
from maknet_jax.runs import config as configs
from maknet_jax.runs import domain_file, workdir

CHANGES = {"domain_components": 8, "epochs": 2.0, "evaluate_every": 1.0}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished linear run with statistics."""
    folder = tmp_path_factory.mktemp("domain") / "run"
    train.train(toy.config(data, "linear", CHANGES), folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture(scope="module")
def ct():
    """HU of air and of a cube [Z, Y, X], and noise that no training image resembles."""
    hu = np.full((6, 32, 32), -900, np.int16)
    hu[:, 4:12, 4:12] = 300
    return hu, np.random.default_rng(0).integers(-1000, 3000, (6, 32, 32)).astype(np.int16)


def judge(folder, hu):
    (result,) = maknet_jax.load(folder).predict(hu, spacing=(3, 1, 1), orientation="IPL").series
    return result


def test_training_writes_the_statistics_of_the_best_checkpoint(run, data):
    opened = workdir.open_run(run)
    statistics = domain_file.read(run, opened.step)
    assert statistics.about["training_slices"] == toy.TRAIN
    assert statistics.about["tuning_slices"] == toy.VAL
    assert statistics.about["components"] <= 8 and statistics.about["judges"] == ["slices"]
    assert statistics.about["tuning_patients"] == toy.VAL  # the toy records name no patient
    assert "series" in domain_file.not_judged(statistics.about)
    assert domain_file.not_judged({"judges": ["slices", "order"]}).startswith("series as a whole (")
    assert domain_file.not_judged({"judges": ["slices", "series", "order"]}) == ""
    source = records.open_dataset(data).source("train")
    images = np.stack([source[number].image for number in range(len(source))])
    features = maknet_jax.load(run).features(images)
    np.testing.assert_allclose(statistics.arrays["mean"], features.mean(axis=0), rtol=1e-4)
    assert domain_file.read(run, opened.step + 1) is None


def test_statistics_of_maknet_use_the_means_only(trained):
    """Global concatenate pooling puts the maxima first."""
    statistics = domain_file.read(trained, workdir.open_run(trained).step)
    maxima, means = np.split(statistics.arrays["projection"], 2, axis=1)
    assert not maxima.any() and means.any(axis=0).all()


def test_predict_marks_unlike_slices(run, ct, tmp_path):
    usual, unlike = (judge(run, hu) for hu in ct)
    assert unlike.verdict.outside.all() and "outside" in unlike.flags
    assert all("outside" in row["flags"] for row in unlike.table())
    assert unlike.verdict.distances.min() > usual.verdict.distances.max()
    written = json.loads(json.dumps(unlike.to_json()))
    assert written["domain"]["outside"] == [0, 1, 2, 3, 4, 5]
    assert written["slice_flags"]["3"] == ["outside"] and written["domain"]["order"] is None
    assert all(row["flags"] == ["outside"] for row in unlike.slice_rows())


def test_the_tables_and_the_summary_have_the_flags(trained, phantom, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    assert (
        cli.main(["predict", str(phantom["dicom"]), "--model", str(trained), "--out", str(out)])
        == 0
    )
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert summary["domain"]["components"] > 1
    for name, column in (("labels.csv", "slice"), ("labels.series.csv", "series")):
        with (tmp_path / name).open(newline="") as file:
            flags = {row[column]: row["flags"].split("|") for row in csv.DictReader(file)}
        assert all(
            set(each) <= {"", "outside", "order", "phantom", "tag"} for each in flags.values()
        )
    expected = maknet_jax.load(trained).predict(phantom["dicom"])
    outside = sum("outside" in series.flags for series in expected.series)
    assert summary["flags"].get("outside", 0) == outside
    assert "not judged: series as a whole" in predict.text(summary)


def test_a_run_without_statistics_predicts_and_says_so(copy, ct, phantom, tmp_path):
    expected = judge(copy, ct[0])
    (copy / domain_file.FILE).unlink()
    result = judge(copy, ct[0])
    assert result.verdict is None and result.flags == () and result.slice_flags == {}
    np.testing.assert_allclose(result.confidences, expected.confidences, atol=1e-6)
    assert result.to_json()["domain"] is None
    summary = predict.predict(copy, phantom["dicom"], tmp_path / "labels.csv")
    assert summary["domain"] is None
    assert "no out-of-domain statistics" in predict.text(summary)
    info = export_info(copy, tmp_path / "bundle")
    assert info["out_of_domain"] is None and domain_file.FILE not in info["files"]
    assert workdir.open_run(tmp_path / "bundle").domain is None


def export_info(folder, out):
    export.export(folder, out)
    return json.loads((out / "bundle.json").read_text())


def test_training_again_adds_missing_statistics_and_changes_nothing_else(copy, data):
    before = (copy / domain_file.FILE).read_bytes()
    summary, weights = (copy / "summary.json").read_bytes(), workdir.open_run(copy).variables
    (copy / domain_file.FILE).unlink()
    train.train(toy.config(data, "linear", CHANGES), copy)
    assert (copy / domain_file.FILE).read_bytes() == before
    assert (copy / "summary.json").read_bytes() == summary
    again = workdir.open_run(copy).variables
    np.testing.assert_array_equal(
        again["params"]["classifier"]["kernel"], weights["params"]["classifier"]["kernel"]
    )


def test_a_run_of_an_earlier_version_gets_statistics(copy, data):
    (copy / domain_file.FILE).unlink()
    config = json.loads((copy / "config.json").read_text())
    del config["domain_components"]
    (copy / "config.json").write_text(json.dumps(config))
    train.train(toy.config(data, "linear", CHANGES), copy)
    assert workdir.open_run(copy).domain is not None


def test_a_signal_stops_the_statistics_and_the_next_run_writes_them(copy, data, monkeypatch):
    (copy / domain_file.FILE).unlink()
    original = evaluator.Evaluator.outputs

    def outputs(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "outputs", outputs)
        with pytest.raises(Stopped):
            train.train(toy.config(data, "linear", CHANGES), copy)
    assert not (copy / domain_file.FILE).exists()
    train.train(toy.config(data, "linear", CHANGES), copy)
    assert (copy / domain_file.FILE).exists()


def test_no_statistics_on_request_or_with_too_few_patients(data, tmp_path, monkeypatch):
    train.train(toy.config(data, "linear", CHANGES | {"domain_components": 0}), tmp_path / "none")
    assert not (tmp_path / "none" / domain_file.FILE).exists()
    monkeypatch.setattr(domain_fit, "PATIENTS", toy.TRAIN + 1)
    train.train(toy.config(data, "linear", CHANGES), tmp_path / "few")
    assert not (tmp_path / "few" / domain_file.FILE).exists()
    assert "too few patients" in (tmp_path / "few" / "log.jsonl").read_text()
    with pytest.raises(InputError, match="domain_components 65"):
        train.train(toy.config(data, "linear", {"domain_components": 65}), tmp_path / "many")


@pytest.mark.parametrize("place", [-1, 9])
def test_damaged_statistics_are_rejected(copy, ct, place):
    payload = bytearray((copy / domain_file.FILE).read_bytes())
    payload[place] ^= 1
    (copy / domain_file.FILE).write_bytes(payload)
    with pytest.raises(InputError, match=domain_file.FILE):
        workdir.open_run(copy)


def test_a_bundle_carries_the_statistics(run, ct, tmp_path):
    info = export_info(run, tmp_path / "bundle")
    expected = workdir.open_run(run).domain
    assert info["out_of_domain"] == expected.about
    for hu in ct:
        one, two = judge(run, hu).verdict, judge(tmp_path / "bundle", hu).verdict
        np.testing.assert_allclose(one.distances, two.distances, rtol=1e-5)
        np.testing.assert_array_equal(one.outside, two.outside)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert f"{toy.TRAIN} training slices" in card and "left and right swapped" in card
    assert "not judged: series as a whole" in " ".join(card.split())
    again = export_info(tmp_path / "bundle", tmp_path / "again")
    assert again["out_of_domain"] == info["out_of_domain"]
    (tmp_path / "again" / domain_file.FILE).unlink()
    with pytest.raises(InputError, match=f"{domain_file.FILE} is missing"):
        workdir.open_run(tmp_path / "again")


def test_the_config_fields_default():
    assert configs.load("teacher").domain_components == domain_fit.COMPONENTS
