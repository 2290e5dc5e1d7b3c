"""`maknet demo`: a small form here, the full one (`make demo`) in `make test-all`."""

import pathlib

import pytest

from maknet_jax import cli, demo
from maknet_jax.runs import config

TINY = (
    "data.size=32",
    "epochs=2",
    "evaluate_every=1",
    "model.options.stem=8",
    "model.options.blocks=1,1",
    "model.options.growth_rates=8,8",
    "model.options.widths=16,16",
)


@pytest.fixture
def tiny(monkeypatch):
    """The demo with a small phantom and a small network."""
    monkeypatch.setattr(
        demo,
        "PHANTOM",
        {"patients": 12, "unlabelled_volumes": 2, "size": 64, "slices": 12},
    )
    monkeypatch.setattr(demo, "MIN_SLICES", 9)
    monkeypatch.setattr(demo, "STUDENT", ("epochs=2.0",))
    load = config.load

    def small(name, overrides=()):
        changes = {"linear": TINY[:3], "noisy_student": ()}.get(name, TINY)
        return load(name, [*changes, *overrides])

    monkeypatch.setattr(demo.configs, "load", small)


def test_prints_a_row_per_network_and_paths_that_exist(tiny, tmp_path, capsys):
    out = tmp_path / "demo"
    results = demo.demo(out)
    printed = capsys.readouterr().out
    for title in ("teacher", "student, round 1", "linear"):
        assert title in printed
    paths = [word for line in printed.splitlines() for word in line.split()[:1] if str(out) in word]
    assert len(paths) == 7
    for path in paths:
        assert (out.parent / path).stat().st_size > 0
    assert paths[0] == results["report"]
    assert "<h2>Best cases" in pathlib.Path(paths[0]).read_text()
    assert results["predict"]["slices"] == 12 + 12 * 2 // 3  # the last series is the shorter one
    assert set(results["student"]["splits"]) == {"test", "hand"}
    assert "4 unlabelled images" in printed  # triplets of the longer series


def test_a_second_run_repeats_nothing(tiny, tmp_path):
    demo.demo(tmp_path / "demo")
    results = [
        tmp_path / "demo" / name
        for name in ("phantom/phantom.json", "shards/dataset.json", "rounds/round-1/summary.json")
    ]
    before = [path.stat().st_mtime_ns for path in results]
    demo.demo(tmp_path / "demo")
    assert [path.stat().st_mtime_ns for path in results] == before


@pytest.mark.slow  # seven minutes
def test_the_network_beats_the_linear_model(tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    results = demo.demo(tmp_path / "demo")  # reads the stored results
    network, linear = (results[name]["splits"]["hand"] for name in ("student", "linear"))
    assert network["auc"] > linear["auc"] + 0.02
    assert network["f1"] > linear["f1"] + 0.05
