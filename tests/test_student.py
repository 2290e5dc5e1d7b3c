"""A student: labelled and pseudo-labelled images in one step, and the average of the weights."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy
from runs import NOISE, equal_runs, newest_checkpoint, signal_after

from maknet_jax import evaluate, files, train
from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.errors import InputError, Stopped
from maknet_jax.runs import build, workdir
from maknet_jax.training import checkpoint, sharding

IMAGE_NOISE = {name: value for name, value in NOISE.items() if "augment" in name}


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory):
    """Pseudo-labels of 29 images, equal to their true labels; 2 images have none."""
    folder = tmp_path_factory.mktemp("pseudo")
    return toy.write_pseudo(folder / "labels", toy.write_unlabelled(folder / "images"))


def config_of(data, pseudo, name="linear", changes=None):
    """A student's tiny config: 40 steps of 8 labelled and 16 other images, with averaging."""
    config = {"pseudo.path": str(pseudo), "pseudo.batch_size": 16, "ema_decay": 0.8}
    return toy.config(data, name, config | IMAGE_NOISE | (changes or {}))


@pytest.fixture(scope="module")
def student(data, pseudo, tmp_path_factory):
    """40 uninterrupted steps of a linear student: (folder, config, summary)."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    config = config_of(data, pseudo)
    return folder, config, train.train(config, folder)


def test_40_steps_are_17_and_a_restart_and_23(student, tmp_path, monkeypatch):
    folder, config, _ = student
    with monkeypatch.context() as patch:
        signal_after(patch, 17)
        with pytest.raises(Stopped, match="17 of 40"):
            train.train(config, tmp_path / "run")
    train.train(config, tmp_path / "run")
    equal_runs(folder, tmp_path / "run", config)
    assert newest_checkpoint(folder, config)[0].ema  # and it was compared too


def test_one_device_gives_the_weights_of_eight(student, tmp_path):
    folder, config, _ = student
    train.train(config, tmp_path / "one", devices=jax.devices()[:1])
    close_runs(folder, tmp_path / "one", config)


def close_runs(one, two, config, atol=1e-5):
    for first, second in zip(toy.lines(one), toy.lines(two), strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)
    states = [jax.tree.leaves(newest_checkpoint(folder, config)[0]) for folder in (one, two)]
    for first, second in zip(*states, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=atol)


@pytest.mark.slow
def test_a_maknet_with_dropout_resumes_and_is_equal_on_any_devices(
    data, pseudo, tmp_path, monkeypatch
):
    config = config_of(data, pseudo, "smoke", NOISE | {"checkpoint_every": 4})
    train.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_after(patch, 17)
        with pytest.raises(Stopped, match="17 of 40"):
            train.train(config, tmp_path / "run")
    train.train(config, tmp_path / "run")
    equal_runs(tmp_path / "whole", tmp_path / "run", config)
    # Rounding differences grow over many steps: compare the first eight.
    config = config_of(data, pseudo, "smoke", NOISE | {"epochs": 1.6})
    for count in (1, 8):
        train.train(config, tmp_path / str(count), devices=jax.devices()[:count])
    close_runs(tmp_path / "1", tmp_path / "8", config)


def test_a_step_takes_both_streams_and_epochs_count_labelled_images(
    student, data, pseudo, tmp_path, monkeypatch
):
    folder, config, summary = student
    assert summary["steps"] == 40  # 8 epochs of 40 labelled images in batches of 8
    message = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["message"]
    assert "40 steps of 24 images" in message
    batches, original = [], sharding.put_batch

    def put_batch(mesh, batch):
        batches.append(batch)
        return original(mesh, batch)

    monkeypatch.setattr(sharding, "put_batch", put_batch)
    short = config_of(data, pseudo, changes={"epochs": 1.0, "data.val_split": "none"})
    train.train(short, tmp_path / "run")
    names = toy.VOCABULARY.names
    sources = [
        records.open_dataset(data).source("train"),
        pseudo_labels.PseudoSource(pseudo, size=toy.SIZE, names=names),
    ]
    assert len(sources[1]) == 27
    expected = pipeline.mixed_batches(sources, (8, 16), seed=0)
    assert len(batches) == 5
    for batch, theirs in zip(batches, expected, strict=False):
        assert len(batch["id"]) == 24
        assert sum(name.startswith("unlabelled") for name in batch["id"]) == 16
        for field in theirs:
            np.testing.assert_array_equal(batch[field], theirs[field])


@pytest.mark.parametrize("balance", [0, 5])
def test_class_weights_follow_from_the_labels_share_in_the_batches(
    data, pseudo, tmp_path, monkeypatch, balance
):
    weights, original = [], build.build_loss

    def build_loss(config, counts, total, *rest):
        weights.append(np.asarray(counts) / total)
        return original(config, counts, total, *rest)

    monkeypatch.setattr(build, "build_loss", build_loss)
    monkeypatch.setattr(train._Loop, "run", lambda *_: None)
    train.train(config_of(data, pseudo, changes={"pseudo.balance": balance}), tmp_path / "run")
    source = records.open_dataset(data).source("train")
    labelled = np.mean([source[k].labels for k in range(len(source))], axis=0)
    source = pseudo_labels.PseudoSource(
        pseudo, size=toy.SIZE, names=toy.VOCABULARY.names, balance=balance
    )
    assert len(source) == (20 if balance else 27)
    others = np.mean([source[k].labels for k in range(len(source))], axis=0)
    np.testing.assert_allclose(weights, [labelled / 3 + others * 2 / 3], rtol=1e-6)


def test_without_pseudo_labels_class_weights_follow_from_labelled_images(
    data, tmp_path, monkeypatch
):
    weights = []
    original = build.build_loss
    monkeypatch.setattr(
        build, "build_loss", lambda *args: weights.append(args[1:]) or original(*args)
    )
    monkeypatch.setattr(train._Loop, "run", lambda *_: None)
    train.train(toy.config(data, "linear"), tmp_path / "run")
    split = records.open_dataset(data).split("train")
    np.testing.assert_allclose(weights[0][0], split["label_counts"], rtol=1e-12)
    assert weights[0][1] == split["count"]


def test_pseudo_labels_teach(pseudo, tmp_path):
    """Four labelled images, alone and with 27 pseudo-labelled ones."""
    few = toy.write(tmp_path / "few", train=4)
    changes = {"epochs": 80.0, "evaluate_every": 80.0, "ema_decay": 0.0}
    changes |= {"optimizer.learning_rate": 0.05}
    alone = toy.config(few, "linear", changes)
    both = config_of(few, pseudo, changes=changes | dict.fromkeys(IMAGE_NOISE, 0.0))
    aucs = [
        train.train(config, tmp_path / name)["val"]["auc"]
        for name, config in (("alone", alone), ("both", both))
    ]
    assert aucs[1] > aucs[0] + 0.1, aucs


def test_other_pseudo_labels_are_rejected_and_moved_ones_are_not(student, data, pseudo, tmp_path):
    folder, _, _ = student
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(pseudo, tmp_path / "moved")
    again = train.train(config_of(data, tmp_path / "moved"), tmp_path / "run")
    assert again["steps"] == 40
    info = files.read_json(pseudo / "pseudo.json")
    files.write_json(tmp_path / "moved" / "pseudo.json", info | {"soft": True})
    with pytest.raises(InputError, match="with dataset.pseudo_labels "):
        train.train(config_of(data, tmp_path / "moved"), tmp_path / "run")
    with pytest.raises(InputError, match="with dataset.pseudo_labels "):
        train.train(config_of(data, ""), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, value",
    [
        ({"pseudo.path": "nowhere"}, "nowhere"),
        ({"pseudo.batch_size": 12}, "pseudo.batch_size 12"),
        ({"pseudo.batch_size": 0}, "pseudo.batch_size 0"),
        ({"pseudo.balance": -1}, "pseudo.balance -1"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"ema_decay": -0.1}, "ema_decay -0.1"),
    ],
)
def test_invalid_values_are_rejected_in_one_line(data, pseudo, tmp_path, changes, value):
    with pytest.raises(InputError, match=value) as caught:
        train.train(config_of(data, pseudo, changes=changes), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_first_process_writes_after_all_have_checked_the_folder(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        sharding,
        "wait_for_all",
        lambda name: calls.append((name, (tmp_path / "run" / "config.json").exists())),
    )
    monkeypatch.setattr(train._Loop, "run", lambda *_: None)
    train.train(toy.config(data, "linear"), tmp_path / "run")
    assert calls == [("checked claim", False), ("claimed", True)]


def test_decay_0_stores_no_average(data, tmp_path):
    config = toy.config(data, "linear", {"epochs": 1.6})
    assert config.ema_decay == 0
    train.train(config, tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run", config)[0].ema == ()


def test_validation_and_the_commands_score_the_average(student):
    folder, config, summary = student
    last = newest_checkpoint(folder, config)[0]
    run = workdir.open_run(folder, checkpoint_name="last")
    assert checkpoint.digests(run.variables) == checkpoint.digests(last.ema)
    weights = {"params": last.params, "batch_stats": last.batch_stats}
    assert checkpoint.digests(run.variables) != checkpoint.digests(weights)
    evaluated = evaluate.evaluate(folder, splits=["val"], checkpoint="last")["splits"]["val"]
    for name, value in summary["val"].items():
        assert value == pytest.approx(evaluated[name], abs=1e-6)
    # init.path takes the average of the best state too.
    best = newest_checkpoint(folder, config, "best")[0]
    params, statistics, _ = workdir.open_weights(folder)[:3]
    initial = {"params": params, "batch_stats": statistics}
    assert checkpoint.digests(initial) == checkpoint.digests(best.ema)


def test_the_average_of_a_run_is_that_of_its_steps(student, data, pseudo, tmp_path, monkeypatch):
    """Compared with the weights after every step, from a run that saves each of them."""
    changes = {"epochs": 1.0, "checkpoint_every": 1}
    config = config_of(data, pseudo, changes=changes)
    states, save = [], checkpoint.Checkpoints.save

    def noted(self, current, meta=None):
        if self.folder.name != "best":
            states.append(jax.tree.map(np.array, current))
        return save(self, current, meta)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    train.train(config, tmp_path / "run")
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5]
    for before, after in zip(states[:-1], states[1:], strict=True):
        for old, new, mean in zip(
            jax.tree.leaves(before.ema),
            jax.tree.leaves(after._replace(ema=()).variables),
            jax.tree.leaves(after.ema),
            strict=True,
        ):
            np.testing.assert_allclose(mean, 0.8 * old + 0.2 * new, rtol=1e-5, atol=1e-6)
