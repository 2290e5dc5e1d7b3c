"""From files to scores: a small LesaNet memorises 256 lesions of the phantom."""

import json

import lesion_runs
import pytest

from maknet_jax import evaluate, phantom, train
from maknet_jax.data import records

SIZE = 64


@pytest.mark.slow
def test_a_small_lesanet_memorises_256_lesions(tmp_path):
    drawn = phantom.write_phantom(
        tmp_path / "phantom", patients=62, unlabelled_volumes=0, size=96, slices=12
    )
    data = lesion_runs.write(drawn, tmp_path / "data", SIZE)
    dataset = records.open_dataset(data)
    assert dataset.split("train")["count"] >= 180
    assert sum(split["count"] for split in dataset.info["splits"].values()) >= 256
    changes = {"optimizer.learning_rate": 0.03, "epochs": 50.0, "evaluate_every": 25.0}
    config = lesion_runs.make_config(data, SIZE, **changes)
    train.train(config, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line for line in lines if "train/loss" in line]
    for name in ("loss", "loss_before_spl", "loss_after_spl", "loss_triplet"):
        first, last = losses[0][f"train/{name}"], losses[-1][f"train/{name}"]
        assert last < 0.6 * first, (name, first, last)
    summary = evaluate.evaluate(tmp_path / "run", splits=["train", "test"], checkpoint="last")
    learned, new = summary["splits"]["train"], summary["splits"]["test"]
    print({k: {m: v[m] for m in ("auc", "f1")} for k, v in summary["splits"].items()})
    assert learned["auc"] > 0.95
    assert new["auc"] > 0.6
    assert all(group["auc"] > 0.9 for group in learned["groups"].values() if group["labels"])
