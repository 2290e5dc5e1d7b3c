"""Options of the experiments: values out of range, finished runs of other options."""

import json

import organ_cases
import pytest

from benchmarks.experiments import (
    attribution_organs,
    attribution_sanity,
    finished_runs,
    missing_is_absent,
    parts,
    patients,
    table1_patients,
    table2_patients,
    transfer_patients,
)
from maknet_jax import prepare
from maknet_jax.errors import InputError


@pytest.mark.parametrize(
    ("experiment", "option", "value"),
    [
        (table1_patients, "--seeds", "0,1,0"),
        (table2_patients, "--labelled", "0"),
        (table2_patients, "--labelled", "-3"),  # a slice [:-3] would label nearly all patients
        (table2_patients, "--teacher-steps", "0"),
        (table2_patients, "--student-steps", "-5"),
        (table2_patients, "--rate", "nan"),
        (transfer_patients, "--pretraining-steps", "0"),
        (transfer_patients, "--steps", "0"),
        (transfer_patients, "--rate", "-1"),
        (parts, "--rate", "inf"),
        (parts, "--epochs", "0"),
        (missing_is_absent, "--epochs", "0"),
        (attribution_organs, "--shares", "0"),
        (attribution_sanity, "--stages", "0"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(
    tmp_path, capsys, experiment, option, value
):
    runs = "--workdirs" if experiment in (attribution_organs, attribution_sanity) else "--folder"
    with pytest.raises(SystemExit) as stop:
        experiment.main([f"{option}={value}", runs, str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and option in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_more_labelled_patients_than_there_are_is_an_error():
    names = [("a", "train"), ("b", "train"), ("c", "val")]
    assert dict(patients.split_patients(names, 2, 0)) == dict(names)
    with pytest.raises(InputError, match="only 2 training patients"):
        patients.split_patients(names, 3, 0)


def test_finished_runs_of_other_options_are_not_reported(tmp_path):
    options = {"size": 64, "rate": 0.003, "steps": 1000}
    finished_runs.check_options(tmp_path, **options)  # not finished
    config = {"data": {"size": 64}, "optimizer": {"learning_rate": 0.003}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 1000}))
    finished_runs.check_options(tmp_path, **options)
    for name, value in (("size", 128), ("rate", 0.01), ("steps", 1500)):
        with pytest.raises(InputError, match=f"{options[name]}, not {value}"):
            finished_runs.check_options(tmp_path, **options | {name: value})


def test_a_data_set_of_another_size_is_not_reused(tmp_path):
    organ_cases.write_case(tmp_path / "in" / "pt_1", {"liver": [20] * 12})
    shards = tmp_path / "shards"
    prepare.prepare_segmentations([tmp_path / "in"], shards, size=32)
    with pytest.raises(InputError, match="--size 32, not 64"):
        patients.prepare_data(tmp_path, shards, 64)
    assert patients.prepare_data(tmp_path, shards, 32) == shards
