"""The benchmark of growth: cost per unit of work relative to the smallest task."""

import json

import pytest

from benchmarks.speed import growth
from maknet_jax.errors import InputError


def test_growth_is_the_cost_per_unit_of_work_relative_to_the_first_value():
    costs = {("train", 7): [2.0, 4.0], ("train", 30): [9.0, 12.0]}
    first, second = growth.rows_of("labels", [7, 30], ["train"], costs, {7: 1.0, 30: 3.0})
    assert first["growth"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["growth"] == {"median": 1.25, "low": 1.0, "high": 1.5}
    assert second["us"]["high"] == pytest.approx(12e6) and second["work"] == 3.0


@pytest.mark.slow
def test_growth_times_every_axis(tmp_path):
    out = tmp_path / "growth.json"
    growth.main(["--quick", "--out", str(out)])
    written = json.loads(out.read_text())
    measured = [(row["axis"], row["column"], row["value"]) for row in written["rows"]]
    for axis, values in growth.QUICK.items():
        columns = ("open", "read") if axis == "records" else growth.COLUMNS
        assert {m for m in measured if m[0] == axis} == {
            (axis, column, value) for column in columns for value in values
        }
    work = {row["value"]: row["work"] for row in written["rows"] if row["axis"] == "size"}
    assert work[64] == pytest.approx(4 * work[32], rel=0.05)
    with pytest.raises(InputError, match="--axes 'height'"):
        growth.main(["--axes", "height"])
