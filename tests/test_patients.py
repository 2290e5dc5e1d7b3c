"""The experiments on real patients, on generated ones: splits, resuming, missing runs, tables."""

import collections
import json

import numpy as np
import organ_cases
import pytest

from benchmarks.experiments import (
    parts,
    patient_metrics,
    patients,
    table1_patients,
    table2_patients,
    transfer_patients,
)
from maknet_jax import evaluate, train
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import config as configs

ORGANS = (
    "brainstem",
    "esophagus",
    "larynx",
    "mandible",
    "parotid_gland_left",
    "parotid_gland_right",
    "spinal_cord",
)


@pytest.fixture(scope="module")
def openkbp(tmp_path_factory):
    """Generated patients in OpenKBP's folders: 24 for training, 6 for validation."""
    folder = tmp_path_factory.mktemp("openkbp")
    for number in range(30):
        part = "train" if number < 24 else "validation"
        masks = {organ: [0, 0, *[20] * 6, 0, 0, 0, 0] for organ in ORGANS}
        organ_cases.write_case(folder / part / f"pt_{number:02d}", masks, number)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that all experiments share."""
    return tmp_path_factory.mktemp("runs")


def run(experiment, openkbp, folder, *extra):
    """The JSON of an experiment's quick form."""
    out = folder / "out.json"
    argv = ["--quick", "--patients", str(openkbp), "--folder", str(folder), "--out", str(out)]
    experiment.main([*argv, "--size", "32", *extra])
    return json.loads(out.read_text())


def test_a_few_training_patients_keep_their_labels(openkbp, tmp_path):
    runs = patients.Runs(tmp_path, openkbp)
    fixed = dict(patients.case_splits(runs.data(32)))
    assert collections.Counter(fixed.values())["test"] == 6
    data = runs.few_labels(tmp_path / "few", 5, size=32, seed=0, organs=ORGANS[:2])
    few = dict(patients.case_splits(data))
    assert collections.Counter(few.values())["train"] == 5
    for case, split in few.items():
        assert split == fixed[case] or (split, fixed[case]) == ("unlabelled", "train")
    assert tuple(records.open_dataset(data).vocabulary.names) == ORGANS[:2]
    other = dict(patients.split_patients(list(fixed.items()), 5, seed=1))
    assert collections.Counter(other.values()) == collections.Counter(few.values())
    assert other != few


def test_records_name_their_patients(openkbp, folder):
    dataset = records.open_dataset(patients.Runs(folder, openkbp).data(32))
    numbers = evaluate.patients_of(dataset, "test")
    assert sorted(set(numbers.tolist())) == list(range(6))
    source = dataset.source("test")
    cases = [source[index].meta["case"] for index in range(len(source))]
    assert len(set(zip(cases, numbers.tolist(), strict=True))) == 6


def test_missing_patients_are_named(tmp_path):
    with pytest.raises(InputError, match="validation"):
        (tmp_path / "train").mkdir()
        patients.Runs(tmp_path / "runs", tmp_path).data(32)


def test_the_number_of_steps_is_that_asked_for(openkbp, folder):
    data = patients.Runs(folder, openkbp).data(32)
    count = records.open_dataset(data).split("train")["count"]
    changes = dict(change.split("=") for change in patients.step_changes(data, 77, 0.01))
    assert round(float(changes["epochs"]) * count / patients.BATCH) == 77


@pytest.mark.slow
def test_table_1_reads_finished_runs_and_names_missing_ones(openkbp, folder, monkeypatch):
    monkeypatch.setattr(table1_patients, "TUNED_AT", 32)
    result = run(table1_patients, openkbp, folder, "--networks", "linear,maknet")
    assert [row["network"] for row in result["networks"]] == ["linear", "maknet"] * 2
    assert len(result["grid"]) == 12 and result["missing"] == []
    best = max(
        (row for row in result["grid"] if row["network"] == "maknet"),
        key=lambda row: row["tuning_auc"],
    )
    row = result["networks"][1]
    assert (row["form"], row["recipe"]) == ("best", [best["rate"], best["epochs"]])
    assert {row["network"] for row in result["comparisons"]} == {"linear"}
    again = run(
        table1_patients, openkbp, folder, "--networks", "linear,maknet,resnet18", "--report"
    )
    assert [row for row in again["networks"] if row["form"] == "best"] == result["networks"][:2]
    assert again["missing"] and all("resnet18" in name for name in again["missing"])
    assert "common" not in {row["form"] for row in again["networks"]}


@pytest.mark.slow
def test_parts_are_compared_with_maknet(openkbp, folder):
    result = run(parts, openkbp, folder)
    assert [row["variant"] for row in result["variants"]] == list(parts.VARIANTS)
    for row in result["variants"][1:]:
        assert np.isfinite(row["auc_difference"]).all()


@pytest.mark.slow
def test_students_are_compared_with_labels_only(openkbp, folder):
    result = run(table2_patients, openkbp, folder, "--labelled", "5")
    names = ["teacher", "round 1", "round 2", "labels only", "all labelled"]
    assert [row["network"] for row in result["networks"]] == names
    first = result["comparisons"][0]
    assert (first["network"], first["control"]) == ("round 2", "labels only")
    report = run(table2_patients, openkbp, folder, "--labelled", "5", "--report", "--seeds", "0,1")
    assert len(report["missing"]) == 5
    assert report["networks"] == result["networks"]


@pytest.mark.slow
def test_trunks_are_compared_on_the_organs_left_out(openkbp, folder):
    result = run(transfer_patients, openkbp, folder, "--labelled", "5")
    names = [transfer_patients.STUDENT, transfer_patients.PHANTOM, transfer_patients.RANDOM]
    assert [row["network"] for row in result["networks"]] == names
    configs = {
        name: json.loads((path / "config.json").read_text())
        for name in names
        for path in [folder / "transfer" / "5-labelled" / "seed-0" / name.replace(" ", "-")]
    }
    assert configs[transfer_patients.RANDOM]["init"]["path"] == ""
    assert configs[transfer_patients.STUDENT]["init"]["path"].endswith("seed-0/student")
    seen = records.open_dataset(configs[transfer_patients.RANDOM]["data"]["path"])
    assert set(seen.vocabulary.names) == set(transfer_patients.LEFT_OUT)
    taught = records.open_dataset(folder / "transfer" / "5-labelled" / "seed-0" / "five-organs")
    assert not set(taught.vocabulary.names) & set(transfer_patients.LEFT_OUT)


@pytest.mark.slow  # two trainings, about five minutes
def test_maknet_beats_the_linear_model_on_20_real_patients(shared_data, tmp_path):
    runs = patients.Runs(tmp_path, shared_data / "openkbp")
    data = runs.few_labels(tmp_path / "shards", 20, size=64, seed=0)
    aucs = {}
    for network, rate in (("linear", 0.003), ("maknet", 0.01)):  # the best of table 1
        changes = (*patients.step_changes(data, 400, rate), f"data.path={data}")
        config = configs.load("openkbp", changes)
        if network == "linear":
            config.model = configs.load("linear").model
        train.train(config, tmp_path / network)
        scores = patients.split_scores(tmp_path / network, patients.TUNING)
        draws = patient_metrics.metric_draws(scores, np.ones((1, len(scores.patients))))
        aucs[network] = float(patient_metrics.macro(draws["auc"])[0])
    assert aucs["maknet"] > max(0.95, aucs["linear"] + 0.005), aucs
