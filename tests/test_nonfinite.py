"""Steps without a finite gradient are skipped, and a state that is not finite is never saved."""

import contextlib
import json

import jax
import numpy as np
import pytest
import test_step
import toy
from runs import equal_runs, newest_checkpoint, signal_after

from benchmarks.speed import safeguards
from maknet_jax import models, train
from maknet_jax.data import pipeline
from maknet_jax.errors import InputError, Stopped
from maknet_jax.runs import setup
from maknet_jax.training import checkpoint, ranger, sharding, state


def poison(monkeypatch, *steps):
    """The batches of these steps have a weight that is not finite."""
    original = pipeline.mixed_batches

    def batches(*args, start, **options):
        for number, batch in enumerate(original(*args, start=start, **options), start + 1):
            if number in steps:
                batch["weight"] = np.full_like(batch["weight"], np.nan)
            yield batch

    monkeypatch.setattr(pipeline, "mixed_batches", batches)


def batch_of(page, folder):
    """A run before its first step, and its first batch."""
    ready = setup.set_up(page, folder)
    batch = next(pipeline.mixed_batches(ready.sources, ready.batch_sizes, seed=0))
    return ready, batch


@pytest.mark.parametrize("name", ["linear", "smoke"])
def test_a_step_that_is_skipped_changes_only_its_number(data, tmp_path, name):
    ready, batch = batch_of(toy.config(data, name, {"ema_decay": 0.5}), tmp_path)
    step, mesh, key = ready.assembly.train_step, ready.assembly.mesh, jax.random.key(0)

    def apply(batch):
        state = sharding.put_state(mesh, ready.assembly.create(0))
        after, values = step(state, sharding.put_batch(mesh, batch), key)
        return checkpoint.digests(after), values

    before = checkpoint.digests(ready.assembly.create(0))
    after, values = apply(batch)
    assert not values["skipped"] and len({*before.items()} & {*after.items()}) < len(before) / 2
    after, values = apply(batch | {"weight": np.full_like(batch["weight"], np.inf)})
    assert values["skipped"]
    assert {path for path in before if before[path] != after[path]} == {".step"}


def test_with_finite_gradients_the_option_changes_nothing(data, tmp_path):
    states = []
    for most in (0, 10):
        page = toy.config(data, "smoke", {"skip_nonfinite": most, "epochs": 0.6})
        train.train(page, tmp_path / str(most))
        states.append(newest_checkpoint(tmp_path / str(most), page).state)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("devices, parts", [(1, 1), (4, 2)])
def test_one_row_of_one_device_skips_the_step_on_all(devices, parts):
    """Of a finite step, every bit is that of the step without the option."""
    model, optimizer = models.build("linear", 3, edge=4), ranger.ranger(0.01)
    mesh = sharding.data_mesh(jax.devices()[:devices])
    start = state.create(model, optimizer, size=32, seed=0)
    batch = next(test_step.batches(1))
    options = {"accumulate": parts, "devices": devices}
    plain, safe = (
        test_step.compiled(model, optimizer, mesh, skip_nonfinite=skip, **options)
        for skip in (False, True)
    )

    def digests(train_step, batch):
        after, values = test_step.changed(train_step, mesh, start, batch)
        return checkpoint.digests(after), values.get("skipped")

    assert digests(safe, batch) == (digests(plain, batch)[0], False)
    batch["weight"][-1] = np.inf
    assert digests(safe, batch) == (checkpoint.digests(start._replace(step=start.step + 1)), True)


def test_no_second_state_is_kept_until_the_gradient_is_known():
    """Beyond the gradient, of which each parameter has one number, nothing is stored."""
    model, optimizer = models.build("linear", 3, edge=32), ranger.ranger(0.01)
    like = state.shapes(model, optimizer, size=32)
    mesh, batch = test_step.one_device(), next(test_step.batches(1))
    memory = [
        test_step.compiled(model, optimizer, mesh, skip_nonfinite=skip)
        .lower(like, sharding.put_batch(mesh, batch), jax.random.key(0))
        .compile()
        .memory_analysis()
        for skip in (False, True)
    ]
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(like.params))
    assert memory[1].temp_size_in_bytes - memory[0].temp_size_in_bytes <= size
    assert memory[1].alias_size_in_bytes == memory[0].alias_size_in_bytes > 4 * size


def test_skipped_steps_are_counted_and_logged_also_after_a_restart(data, tmp_path, monkeypatch):
    page = toy.config(data, "linear", {"skip_nonfinite": 3})
    poison(monkeypatch, 5, 12, 13)
    summary = train.train(page, tmp_path / "whole")
    assert summary["skipped_steps"] == 3
    entries = map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines())
    skipped = {entry["step"]: entry["skipped"] for entry in entries if "skipped" in entry}
    assert list(skipped) == [5, 12, 13] and all(len(ids) == toy.BATCH for ids in skipped.values())
    rows = [row for row in toy.lines(tmp_path / "whole") if "train/loss" in row]
    assert len(rows) == 4 and all(np.isfinite(row["train/loss"]) for row in rows)
    with monkeypatch.context() as patch:
        signal_after(patch, 13)
        with pytest.raises(Stopped, match="step 13 "):
            train.train(page, tmp_path / "run")
    train.train(page, tmp_path / "run")
    equal_runs(tmp_path / "whole", tmp_path / "run", page)


def test_too_many_in_a_row_stop_the_run_and_the_last_checkpoint_resumes(
    data, tmp_path, monkeypatch
):
    page = toy.config(data, "linear", {"skip_nonfinite": 3, "checkpoint_every": 10})
    with monkeypatch.context() as patch:
        poison(patch, 3, *range(16, 30))
        with pytest.raises(InputError, match="step 18 .*images train-.* 3 such steps"):
            train.train(page, tmp_path / "run")
    assert int(newest_checkpoint(tmp_path / "run", page).state.step) == 16
    train.train(page, tmp_path / "run")
    assert int(newest_checkpoint(tmp_path / "run", page).state.step) == 40


def test_a_state_that_is_not_finite_is_neither_saved_nor_resumed(data, tmp_path, monkeypatch):
    page = toy.config(data, "linear")
    state = setup.set_up(page, tmp_path / "run").assembly.create(0)
    bad = jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype.kind == "f" else leaf, state)
    bad = bad._replace(step=state.step + 2)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "saved")) as saved:
        saved.save(state._replace(step=state.step + 1))
        with pytest.raises(InputError, match=r"step 2 .*\.params.* not finite.* step 1,"):
            saved.save(bad)
        assert saved.steps() == [1]
        with monkeypatch.context() as patch:  # as earlier versions did
            patch.setattr(checkpoint, "first_nonfinite", lambda tree: None)
            saved.save(bad)
        for like in (state, None):
            restored = saved.restore(like)
            assert int(restored.state.step) == 1
            assert "not finite" in restored.damaged[2]


def test_checkpoints_by_time(data, tmp_path, monkeypatch):
    saved, original = [], checkpoint.Checkpoints.save

    def save(self, state, metadata=None):
        saved.extend([int(state.step)] * (self.folder.name == "checkpoints"))
        original(self, state, metadata)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    changes = {"epochs": 1.0, "checkpoint_every": 1000, "evaluate_every": 5.0}
    for minutes, expected in ((0.0, [5]), (1e-9, [1, 2, 3, 4, 5]), (60.0, [5])):
        saved.clear()
        page = toy.config(data, "linear", changes | {"checkpoint_minutes": minutes})
        train.train(page, tmp_path / str(minutes))
        assert saved == expected


@pytest.mark.slow
def test_the_cost_of_the_safeguards_is_measured(tmp_path):
    argv = ["--quick", "--repeats", "2", "--out", str(tmp_path / "s.json")]
    safeguards.main(argv)
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    names = ["skip_nonfinite, linear", "stop flag, with", "stop flag, with an all-gather"]
    assert [row["what"] for row in rows] == names
    assert all(0.1 < row["ratio"]["median"] < 50 for row in rows)
