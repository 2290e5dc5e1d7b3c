"""Opening a workdir; `predict` and `evaluate` test scoring."""

import shutil

import pytest
import toy

from maknet_jax import train
from maknet_jax.errors import InputError
from maknet_jax.runs import workdir


def test_only_a_run_with_a_checkpoint_can_be_opened(data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not a `maknet train` workdir: it has no config.json"):
        workdir.open_run(tmp_path)
    page = toy.config(data, "linear")
    monkeypatch.setattr(train._Loop, "run", lambda self: None)
    train.train(page, tmp_path / "run")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        workdir.open_run(tmp_path / "run")
    with pytest.raises(InputError, match="'newest' .*best or last"):
        workdir.open_run(tmp_path / "run", checkpoint_name="newest")


def test_a_folder_of_other_files_is_refused_and_unchanged(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    before = (tmp_path / "data" / "dataset.json").read_bytes()
    (tmp_path / "file").write_text("mine")
    for occupied in ("data", "file"):
        with pytest.raises(InputError, match="--workdir"):
            train.train(toy.config(data, "linear"), tmp_path / occupied)
    assert (tmp_path / "data" / "dataset.json").read_bytes() == before


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("linear", {"loss.gamma": -1.0}, "gamma -1.0 "),
        ("linear", {"loss.clamp": 0.0}, "clamp 0.0, the largest weight, should"),
        ("smoke", {"model.options.dropout_rate": 7.0}, "dropout_rate 7.0 "),
        ("linear", {"data.window": (5.0, 5.0)}, r"data.window \(5.0, 5.0\) "),
        ("linear", {"seed": -1}, "seed -1 "),
        (
            "smoke",
            {"augment.crop_probability": 1.0, "augment.crop_scale": (0.5, 2.0)},
            "crop_scale",
        ),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(
    data, tmp_path, name, change, message
):
    with pytest.raises(InputError, match=message):
        train.train(toy.config(data, name, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
