"""The loop: a stopped run ends like an uninterrupted one, on any devices, on its own data."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy
from runs import NOISE, Killed, equal_runs, kill, newest_checkpoint, on_call, signal_after

from maknet_jax import console, export, train
from maknet_jax.data import pipeline
from maknet_jax.errors import InputError, Stopped
from maknet_jax.evaluation import evaluator
from maknet_jax.runs import build, stopping, workdir
from maknet_jax.training import checkpoint


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """40 steps of MAKNet with all its noise, not stopped; (folder, config, summary)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    page = toy.config(data, "smoke", NOISE)
    return folder, page, train.train(page, folder)


@pytest.fixture(scope="module")
def linear(data, tmp_path_factory):
    """40 steps of the linear model; (folder, config, summary)."""
    folder = tmp_path_factory.mktemp("runs") / "linear"
    page = toy.config(data, "linear")
    return folder, page, train.train(page, folder)


def test_40_steps_equal_17_a_restart_and_23(whole, tmp_path, monkeypatch):
    folder, page, _ = whole
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_after(patch, 17)
        with pytest.raises(Stopped, match="step 17 of 40"):
            train.train(page, tmp_path / "run")
    stopped, _, _ = newest_checkpoint(tmp_path / "run", page)
    assert int(stopped.step) == 17
    assert signal.getsignal(signal.SIGTERM) is before  # handed back
    train.train(page, tmp_path / "run")
    equal_runs(folder, tmp_path / "run", page)


def test_a_run_that_predates_a_field_resumes_without_it(linear, tmp_path, monkeypatch, capfd):
    folder, page, _ = linear
    with monkeypatch.context() as patch:
        signal_after(patch, 17)
        with pytest.raises(Stopped):
            train.train(page, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    for name in ("translation_probability", "translation_range"):
        del stored["augment"][name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    newer = page.copy_and_resolve_references().unlock()
    newer.augment.translation_probability = 0.5
    train.train(newer.lock(), tmp_path / "run")
    equal_runs(folder, tmp_path / "run", page)
    assert "augment.translation_probability" in capfd.readouterr().err
    newer = newer.copy_and_resolve_references().unlock()
    newer.augment.rotation_probability = 0.5  # a field that the run has
    with pytest.raises(InputError, match="rotation_probability"):
        train.train(newer.lock(), tmp_path / "run")


@pytest.mark.parametrize("stops", [(1,), (15, 16, 1), (39,)])
def test_a_run_may_stop_anywhere_and_often(linear, tmp_path, monkeypatch, stops):
    folder, page, _ = linear
    for count in stops:
        with monkeypatch.context() as patch:
            signal_after(patch, count, signal.SIGINT)
            with pytest.raises(Stopped):
                train.train(page, tmp_path / "run")
    train.train(page, tmp_path / "run")
    equal_runs(folder, tmp_path / "run", page)


@pytest.mark.parametrize("step", [32, 40])
def test_a_signal_interrupts_validation_and_the_next_run_repeats_it(
    linear, tmp_path, monkeypatch, step
):
    folder, page, _ = linear
    with monkeypatch.context() as patch:
        signal_after(patch, step)
        with pytest.raises(Stopped, match=f"step {step} of 40"):
            train.train(page, tmp_path / "run")
    assert {row["step"] for row in toy.lines(tmp_path / "run") if "val/auc" in row} < {
        row["step"] for row in toy.lines(folder) if "val/auc" in row
    }
    with monkeypatch.context() as patch:  # while the checkpoint is replaced by one with the results
        on_call(patch, checkpoint.Checkpoints, "_check_written", kill)
        with pytest.raises(Killed):
            train.train(page, tmp_path / "run")
    train.train(page, tmp_path / "run")
    equal_runs(folder, tmp_path / "run", page)


def test_a_killed_run_resumes_from_its_last_checkpoint(linear, tmp_path, monkeypatch):
    """Steps 16 to 26 were logged and even evaluated, but not saved: they are repeated.

    The best state is then newer than the last one, and must not stand in the way of an older best.
    """
    folder, page, _ = linear

    class Killed(BaseException):
        pass

    def batches(*args, **kwargs):
        for count, batch in enumerate(original(*args, **kwargs), start=1):
            if count == 27:
                raise Killed
            yield batch

    def lost(self, current, meta=None):
        if self.folder.name == "best" or int(current.step) not in (16, 24):
            save(self, current, meta)

    original, save = pipeline.train_batches, checkpoint.Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", batches)
        patch.setattr(checkpoint.Checkpoints, "save", lost)
        with pytest.raises(Killed):
            train.train(page, tmp_path / "run")
    assert int(newest_checkpoint(tmp_path / "run", page)[0].step) == 15
    assert int(newest_checkpoint(tmp_path / "run", page, "best")[0].step) == 24
    train.train(page, tmp_path / "run")
    equal_runs(folder, tmp_path / "run", page)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_a_damaged_last_checkpoint_is_skipped(linear, tmp_path, capsys):
    folder, page, _ = linear
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints" / "40" / "state").rglob("d/*"):  # where the arrays lie
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    train.train(page, run)
    stderr = capsys.readouterr().err
    assert "checkpoint 40 is damaged" in stderr and "from step 32" in stderr
    assert (run / "checkpoints_damaged" / "40").is_dir()
    equal_runs(folder, run, page)
    time.sleep(0.2)  # see test_checkpoint.py


def test_one_device_and_eight_give_equal_losses(data, tmp_path):
    """The whole loop; test_step.py has the network with dropout too."""
    page = toy.config(data, "linear", {k: v for k, v in NOISE.items() if "augment" in k})
    results = []
    for count in (1, 8):
        run = tmp_path / str(count)
        summary = train.train(page, run, devices=jax.devices()[:count])
        assert summary["devices"].startswith(f"{count} x ")
        results.append((toy.lines(run), newest_checkpoint(run, page)[0]))
    (one_lines, one), (eight_lines, eight) = results
    for first, second in zip(one_lines, eight_lines, strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_a_run_learns_and_saves_its_best_state(linear):
    folder, page, summary = linear
    rows = toy.lines(folder)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert list(losses) == [10, 20, 30, 40] and losses[40] < 0.85 * losses[10]
    aucs = {row["step"]: row["val/auc"] for row in rows if "val/auc" in row}
    assert list(aucs) == [8, 16, 24, 32, 40] and max(aucs.values()) > 0.9
    best, meta, _ = newest_checkpoint(folder, page, "best")
    assert aucs[int(best.step)] == max(aucs.values()) == summary["best_val_auc"]
    assert int(best.step) == summary["best_step"] == meta["best_step"]
    assert len(meta["thresholds"]) == 4
    assert summary["steps"] == 40 and summary["val"]["auc"] == aucs[40]
    assert summary["parameters"] == 4 * (4 * 4 * 3 + 1)
    on_disk = json.loads((folder / "summary.json").read_text())
    assert on_disk == summary
    assert "classifier/kernel" in (folder / "parameters.txt").read_text()
    messages = [
        json.loads(line)["message"] for line in (folder / "log.jsonl").read_text().splitlines()
    ]
    assert "196 parameters, 40 steps of 8 images on 8 cpu" in messages[0]
    run = workdir.open_run(folder)
    assert (run.name, run.step) == ("best", int(best.step))
    assert workdir.open_run(folder, checkpoint_name="last").step == 40


def test_the_best_state_is_the_last_of_the_best_aucs(data, tmp_path, monkeypatch):
    aucs = iter([0.6, 0.8, 0.8, None, 0.7])
    original = evaluator.Scores.report

    def scripted(self, thresholds, parents):
        report = original(self, thresholds, parents)
        report.summary["auc"] = next(aucs)
        return report

    monkeypatch.setattr(evaluator.Scores, "report", scripted)
    page = toy.config(data, "linear")
    summary = train.train(page, tmp_path / "run")
    assert (summary["best_val_auc"], summary["best_step"]) == (0.8, 24)
    best, meta, _ = newest_checkpoint(tmp_path / "run", page, "best")
    assert int(best.step) == 24 and meta["metrics"]["auc"] == 0.8


def test_a_finished_run_has_nothing_to_do(linear, tmp_path):
    folder, page, summary = linear
    shutil.copytree(folder, tmp_path / "run")
    before = (tmp_path / "run" / "summary.json").read_text()
    again = train.train(page, tmp_path / "run")
    differing = {"workdir": "", "images_per_second": 0, "data_wait": 0}
    assert again | differing == summary | differing
    assert (tmp_path / "run" / "summary.json").read_text() == before
    assert toy.lines(tmp_path / "run") == toy.lines(folder)


def test_the_step_is_compiled_once(data, tmp_path, monkeypatch):
    runs = []
    original = train._Loop.run

    def run(self):
        runs.append(self.setup.assembly)
        return original(self)

    monkeypatch.setattr(train._Loop, "run", run)
    page = toy.config(data, "linear")
    with monkeypatch.context() as patch:
        signal_after(patch, 9)
        with pytest.raises(Stopped):
            train.train(page, tmp_path / "run")
    train.train(page, tmp_path / "run")
    assert [assembly.train_step._cache_size() for assembly in runs] == [1, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate 0.01, not 0.5"),
        ({"seed": 3}, "seed 0, not 3: .*--workdir"),
        ({"model.options.edge": 8}, "model.options.edge 4, not 8"),
    ],
)
def test_a_workdir_of_another_config_is_refused(linear, data, changes, message):
    folder, page, _ = linear
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match=message):
        train.train(toy.config(data, "linear", changes), folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_diverging_run_is_an_error_and_its_state_is_not_saved(data, tmp_path):
    changes = {"optimizer.learning_rate": 1e38, "checkpoint_every": 1, "skip_nonfinite": 0}
    page = toy.config(data, "linear", changes)
    with pytest.raises(InputError, match="(step 2 is not saved|at step 3).*learning_rate"):
        train.train(page, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == ["1"]
    changes["checkpoint_every"] = 1000  # nothing is saved before the loss is not finite
    with pytest.raises(InputError, match="(nan|inf) at step .*learning_rate"):
        train.train(toy.config(data, "linear", changes | {"evaluate_every": 800.0}), tmp_path / "b")


def test_other_data_is_refused_and_moved_data_is_not(linear, data, tmp_path):
    folder, _, summary = linear
    other = toy.write(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="dataset.fingerprint .*--workdir"):
        train.train(toy.config(other, "linear"), folder)
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(data, tmp_path / "moved")
    page = toy.config(tmp_path / "moved", "linear", {"data.threads": 1})  # may change too
    assert train.train(page, tmp_path / "run")["steps"] == 40
    dataset = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert dataset["path"] == str(tmp_path / "moved")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.size": 64}, "data.size 64 .* 32 of .*toy"),
        ({"data.batch_size": 12}, "data.batch_size 12 .* 8 device"),
        ({"data.batch_size": 0}, "data.batch_size 0 "),
        ({"epochs": 0.0}, "epochs 0.0 "),
        ({"log_every": 0}, "log_every 0 "),
        ({"data.train_split": "trian"}, "'trian' .* train, val"),
        ({"data.path": "nowhere"}, "nowhere"),
        ({"optimizer.name": "adam"}, "optimizer 'adam' .*ranger"),
        ({"optimizer.k": 0}, "optimizer ranger: k=0.* 1"),
        ({"loss.name": "bce"}, "loss 'bce' .*weighted_focal"),
        ({"model.name": "vgg"}, "model 'vgg' .*maknet, vgg16"),
        ({"model.options.edge": 5}, "32 .*edge 5"),
        ({"precision": "half"}, "precision 'half'"),
    ],
)
def test_invalid_configs_are_refused_in_one_line(data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        train.train(toy.config(data, "linear", changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_an_empty_training_split_is_refused(tmp_path):
    empty = toy.write(tmp_path / "empty", train=0)
    with pytest.raises(InputError, match="empty .*train"):
        train.train(toy.config(empty, "linear"), tmp_path / "run")


def test_a_run_without_validation_examples_logs_that(tmp_path, capsys):
    """Where no validation image was downloaded, the split is there and empty."""
    alone = toy.write(tmp_path / "alone", val=0)
    page = toy.config(alone, "linear", {"epochs": 1.6})
    summary = train.train(page, tmp_path / "run")
    assert summary["best_val_auc"] is None and summary["val"] == {}
    assert "'val'" in capsys.readouterr().err
    run = workdir.open_run(tmp_path / "run")
    assert (run.name, run.step) == ("last", 8)
    assert run.thresholds.tolist() == [0.5] * 4


def lines_of(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_labels_without_a_validation_image_are_named(tmp_path, capsys):
    data = toy.write(tmp_path / "data", val=1)
    train.train(toy.config(data, "linear", {"epochs": 0.2}), tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "get no threshold" in line]
    assert all(name in line for name in toy.VOCABULARY.names)  # one image: all or none have it
    export.export(tmp_path / "run", tmp_path / "out", checkpoint="last")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Without a threshold: " in card


def test_the_augmentation_knows_the_number_of_devices(data, tmp_path, monkeypatch):
    asked = []

    def build_augment(config, devices, form):
        asked.append((devices, form))

    monkeypatch.setattr(build, "build_augment", build_augment)
    page = toy.config(data, "linear", {"epochs": 0.1})
    train.train(page, tmp_path / "run", devices=jax.devices()[:2])
    assert asked == [(2, "auto")]


def test_a_signal_may_arrive_while_rich_prints(monkeypatch, capfd):
    """As it did while rich imported its emoji for the first line."""

    def half_imported(*_, **__):
        raise ImportError("partially initialized module")

    monkeypatch.setattr(console._console, "print", half_imported)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with stopping.noted_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "stopping after this step; its state will be saved\n"


def test_sigterm_to_the_command_exits_75_and_the_same_command_finishes(data, tmp_path):
    run = tmp_path / "run"
    # Long enough to be caught at work, whatever the machine.
    changes = {"epochs": 200.0, "evaluate_every": 50.0, "checkpoint_every": 10_000}
    fields = [f"--config.{text}" for text in toy.overrides(data, "linear", **changes)]
    command = [sys.executable, "-m", "maknet_jax", "train", "--config", "linear"]
    command += ["--workdir", str(run), *fields]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).resolve().parents[1])
    options = {"env": environment, "cwd": tmp_path, "text": True, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 120
    while lines_of(run) < 3 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, output = child.communicate(timeout=120)
    assert child.returncode == 75, output
    assert " of 1000 is saved in " in output and "run the same command to resume" in output
    assert "Traceback" not in output and not (run / "summary.json").exists()
    again = subprocess.run(command, timeout=120, **options)
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 1000 and summary["best_val_auc"] > 0.9
    steps = [row["step"] for row in toy.lines(run) if "train/loss" in row]
    assert steps == list(range(10, 1001, 10))
