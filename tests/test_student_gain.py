"""The experiment `student_gain.py`: its statistics and its runs."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments import student_gain
from maknet_jax.errors import InputError


def test_the_interval_is_students_t():
    values = [0.1, 0.3, 0.2, 0.6]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert student_gain.interval(values) == pytest.approx((0.3, *expected))
    assert student_gain.interval([0.25]) == (0.25, None, None)


def test_gains_over_both_controls():
    teacher, control = [0.8, 0.2], [0.85, 0.1]
    metrics = np.array([[teacher, control, [0.9, 0.3], [0.7, 0.4]]] * 2)
    metrics[1, 2] -= 0.06
    gains = student_gain.gains(metrics)
    first = gains["round 1"]
    assert first["teacher"]["AUC"]["gain"][0] == pytest.approx(0.07)
    assert first["teacher"]["AUC"]["above"] == 2
    assert first["labels only, same noise"]["AUC"]["gain"][0] == pytest.approx(0.02)
    assert first["labels only, same noise"]["AUC"]["above"] == 1
    assert first["labels only, same noise"]["F1"]["above"] == 2
    second = gains["round 2"]["teacher"]
    assert second["AUC"]["above"] == 0 and second["F1"]["gain"][0] == pytest.approx(0.2)


def test_seeds_are_integers(capsys):
    with pytest.raises(SystemExit) as stop:
        student_gain.main(["--seeds", "5,six"])
    assert stop.value.code == 2 and "'5,six'" in capsys.readouterr().err


@pytest.mark.slow  # eight short trainings
def test_the_control_has_the_students_steps_and_no_pseudo_labels(tmp_path):
    form = student_gain.QUICK | {"student": ("epochs=3",)}  # unlike the teacher's
    values = student_gain.measure(tmp_path, 0, form)
    runs = ("rounds/round-0", "labels-only", "rounds/round-1", "rounds/round-2")
    assert len(values) == len(runs) == len(student_gain.TITLES)
    for numbers, run in zip(values, runs, strict=True):
        written = json.loads((tmp_path / run / "evaluation" / "hand.json").read_text())
        assert numbers == [written[metric] for metric in student_gain.METRICS]
    configs = [
        json.loads((tmp_path / run / "config.json").read_text())
        for run in ("rounds/round-1", "labels-only")
    ]
    for config in configs:
        config["pseudo"].pop("path")
    assert configs[0] == configs[1]
    steps = [
        json.loads((tmp_path / run / "summary.json").read_text())["steps"]
        for run in ("rounds/round-1", "rounds/round-2", "labels-only")
    ]
    assert len(set(steps)) == 1
    with pytest.raises(InputError, match="labels another|holds"):
        student_gain.measure(tmp_path, 0, form | {"student": ("epochs=4",)})
