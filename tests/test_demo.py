"""`maknet demo`: the promise of the README, in small here and in full in `make test-all`."""

import pytest

from maknet_jax import cli, config, demo

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
        {"patients": 12, "unlabelled_volumes": 1, "size": 64, "slices": 12},
    )
    load = config.load

    def small(name, overrides=()):
        changes = TINY if name == "smoke" else TINY[:3]
        return load(name, [*changes, *overrides])

    monkeypatch.setattr(demo.configs, "load", small)


def test_ends_with_a_table_and_paths_that_exist(tiny, tmp_path, capsys):
    out = tmp_path / "demo"
    results = demo.demo(out)
    printed = capsys.readouterr().out
    for title in ("MAKNet", "linear"):
        assert title in printed
    paths = [word for line in printed.splitlines() for word in line.split()[:1] if str(out) in word]
    assert len(paths) == 5
    for path in paths:
        assert (out.parent / path).stat().st_size > 0
    assert results["predict"]["slices"] == 12 * 2 // 3  # the last series is the shorter one
    assert set(results["smoke"]["splits"]) == {"test", "hand"}


def test_a_second_run_repeats_nothing(tiny, tmp_path):
    demo.demo(tmp_path / "demo")
    kept = [
        tmp_path / "demo" / name
        for name in ("phantom/phantom.json", "shards/dataset.json", "smoke/summary.json")
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    demo.demo(tmp_path / "demo")
    assert [path.stat().st_mtime_ns for path in kept] == before


@pytest.mark.slow  # four minutes
def test_the_real_one_beats_the_linear_model(tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    results = demo.demo(tmp_path / "demo")  # again: reads what is there
    network, linear = (results[name]["splits"]["hand"] for name in ("smoke", "linear"))
    assert network["auc"] > linear["auc"] + 0.02
    assert network["f1"] > linear["f1"] + 0.05
