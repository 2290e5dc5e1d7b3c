"""The metadata of checkpoints: the keys on disk, and files of earlier versions."""

import json

import jax.numpy as jnp

from maknet_jax.runs.progress import Progress

ON_DISK = {
    "best": 0.75,
    "best_step": 8,
    "thresholds": [0.25, 1.0],
    "metrics": {"auc": 0.75},
    "validated_step": 8,
    "init": None,
    "pending": [{"loss": 0.5}],
}


def test_progress_is_json_with_the_keys_of_earlier_versions():
    pending = [{"loss": jnp.float32(0.5)}]
    progress = Progress(0.75, 8, [0.25, 1.0], {"auc": 0.75}, validated_step=8, pending=pending)
    assert json.loads(json.dumps(progress.to_json())) == ON_DISK
    assert Progress.from_json(ON_DISK).to_json() == ON_DISK
    best = progress.best_to_json()
    assert best == {key: value for key, value in ON_DISK.items() if key != "pending"}
    assert Progress.from_json(best).pending == []


def test_an_interrupted_validation_is_on_disk_only_while_it_is_due():
    progress = Progress(evaluation_due=True)
    assert progress.to_json()["evaluation_due"] is True
    assert Progress.from_json(progress.to_json()) == progress
    assert "evaluation_due" not in progress.best_to_json()
    assert "evaluation_due" not in Progress().to_json()


def test_metadata_without_later_fields_are_read():
    assert Progress.from_json({"best": 0.5, "from_a_later_version": 1}) == Progress(best=0.5)
