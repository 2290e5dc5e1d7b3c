"""`experiments/organs.py` in small: on all devices, and over which images it counts."""

import json

import numpy as np
import pytest

from benchmarks.experiments import organs
from maknet_jax.errors import InputError


def test_maps_are_measured_against_organs_by_patient(
    trained, phantom, tmp_path, capsys, monkeypatch
):
    out, rows, measure = tmp_path / "out.json", [], organs.measure

    def recorded(*arguments):
        rows[:] = measure(*arguments)
        return rows

    monkeypatch.setattr(organs, "measure", recorded)
    argv = ["--workdir", str(trained), "--masks", str(phantom["masks"]), "--images", "4"]
    organs.main([*argv, "--steps", "2", "--least", "0", "--out", str(out)])
    written = json.loads(out.read_text())
    results = organs._summary(rows)
    for name, values in results.items():
        for kind in values:
            assert written["results"][name][kind] == pytest.approx(values[kind])
    assert sum(label["maps"] for label in written["rows"]) == len(rows)
    for label in written["rows"]:
        inside = [row["inside"] for row in rows if row["label"] == label["label"]]
        assert label["inside"] == pytest.approx(np.mean(inside))
    assert len({row["id"] for row in rows}) > 1
    for row in rows:
        assert row["id"].startswith(row["patient"]) and len(row["patient"]) == 6
        assert 0 < row["chance"] < 1 and 0 <= row["inside"] <= 1
    for found in results.values():
        mean, low, high = found["difference"]
        assert mean == pytest.approx(found["map"][0] - found["random"][0])
        assert low <= mean <= high
    patients = {}
    for row in rows:
        patients.setdefault(row["patient"], []).append(row["inside"])
    mean = np.mean([np.mean(values) for values in patients.values()])
    assert results["mass inside the organ"]["map"][0] == pytest.approx(mean)
    assert f"of {len(patients)} patients" in capsys.readouterr().out
    with pytest.raises(InputError, match="no organ of test"):
        organs.main([*argv, "--least", "1.1", "--out", str(out)])
