"""Shared by the tests of training: all noise, stopped runs, and the comparison of runs."""

import contextlib
import json
import os
import pathlib
import signal

import toy

from maknet_jax.data import pipeline
from maknet_jax.runs import build, workdir
from maknet_jax.training import checkpoint, sharding

NOISE = {
    "augment.rotation_probability": 0.5,
    "augment.crop_probability": 0.5,
    "augment.contrast_probability": 0.3,
    "augment.grayscale_probability": 0.3,
    "model.options.dropout_rate": 0.5,
}


def newest_checkpoint(folder, page, which="last", labels=4):
    """The newest checkpoint of a workdir, `checkpoint.Restored`."""
    like = build.assemble(page, labels, sharding.data_mesh()).shapes
    with contextlib.closing(checkpoint.Checkpoints(folder / workdir.FOLDERS[which])) as saved:
        return saved.restore(like)


def equal_runs(one, two, page):
    """Asserts that a run that was stopped and resumed equals one that was not."""
    first, second = newest_checkpoint(one, page), newest_checkpoint(two, page)
    assert int(first[0].step) == int(second[0].step)
    assert checkpoint.digests(first[0]) == checkpoint.digests(second[0])
    assert first[1] == second[1]
    assert newest_checkpoint(one, page, "best")[1:2] == newest_checkpoint(two, page, "best")[1:2]
    assert toy.lines(one) == toy.lines(two)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    for summary in summaries:
        del summary["workdir"], summary["images_per_second"], summary["data_wait"]
    assert summaries[0] == summaries[1]


def signal_after(monkeypatch, count, number=signal.SIGTERM):
    """A signal to this process once the run has taken `count` batches."""
    original = pipeline.train_batches

    def batches(*args, **kwargs):
        for taken, batch in enumerate(original(*args, **kwargs), start=1):
            if taken == count:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", batches)


class Killed(BaseException):
    """Like kill -9: nothing is saved."""


def kill():
    raise Killed


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def on_call(patch, module, name, how, *, count=1, where=""):
    """Calls `how` before the `count`th call of a function (on a path with the part `where`)."""
    original, calls = getattr(module, name), []

    def call(*args, **options):
        if not where or where in pathlib.Path(args[0]).parts:
            calls.append(args)
            if len(calls) == count:
                how()
        return original(*args, **options)

    patch.setattr(module, name, call)
