"""The experiment `organs.py` on a small run: its means, intervals and JSON."""

import json

import numpy as np
import pytest

from benchmarks.experiments import organs
from maknet_jax.errors import InputError


def test_shares_are_averaged_over_patients(trained, phantom, tmp_path, monkeypatch):
    out, rows, measure = tmp_path / "out.json", [], organs.measure

    def recording(*arguments):
        rows[:] = measure(*arguments)
        return rows

    monkeypatch.setattr(organs, "measure", recording)
    argv = ["--workdir", str(trained), "--masks", str(phantom["masks"]), "--images", "4"]
    organs.main([*argv, "--steps", "2", "--least", "0", "--out", str(out)])
    written = json.loads(out.read_text())
    results = organs.summarize(rows)
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
    for values in results.values():
        mean, low, high = values["difference"]
        assert mean == pytest.approx(values["map"][0] - values["random"][0])
        assert low <= mean <= high
    patients = {}
    for row in rows:
        patients.setdefault(row["patient"], []).append(row["inside"])
    mean = np.mean([np.mean(values) for values in patients.values()])
    assert results["mass inside the organ"]["map"][0] == pytest.approx(mean)
    with pytest.raises(InputError, match="'test'.* 1.1 "):
        organs.main([*argv, "--least", "1.1", "--out", str(out)])
