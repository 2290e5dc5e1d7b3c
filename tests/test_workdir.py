"""What a config builds; opening a workdir is tested with `predict` and `evaluate`."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from maknet_jax import train
from maknet_jax.errors import InputError
from maknet_jax.runs import build, config, workdir
from maknet_jax.training import sharding


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy data set."""
    return toy.write(tmp_path_factory.mktemp("toy") / "data")


def test_the_learning_rate_falls_from_where_it_should(data):
    def rates(decay_from):
        page = toy.config(data, "linear", {"optimizer.decay_from": decay_from})
        optimizer = build.build_optimizer(page, 40)
        params = {"w": jnp.ones((2, 2))}
        opt_state = optimizer.init(params)
        sizes = []
        for _ in range(40):
            update, opt_state = optimizer.update(params, opt_state, params)
            sizes.append(float(jnp.abs(update["w"]).max()))
        return np.asarray(sizes)

    constant, falling = rates(1.0), rates(0.5)
    np.testing.assert_allclose(falling[:21], constant[:21], rtol=1e-6)
    # Rectified steps without lookahead's syncs: the ratio is the schedule's.
    share = 0.5 * (1 + np.cos(np.pi * np.arange(1, 20) / 20))
    between = [n for n in range(21, 40) if (n + 1) % 6]
    np.testing.assert_allclose(
        falling[between] / constant[between], [share[n - 21] for n in between], rtol=1e-4
    )
    with pytest.raises(InputError, match=r"decay_from 1\.5"):
        build.build_optimizer(toy.config(data, "linear", {"optimizer.decay_from": 1.5}), 40)


def test_the_jitted_step_keeps_the_average_and_rotates_as_asked():
    changes = ["augment.rotation_probability=1.0", "ema_decay=0.75", "data.size=32"]
    page = config.load("linear", changes)
    training, mesh = build.TrainingSet(10, np.full(4, 5), 10), sharding.data_mesh()

    def step(rotation):
        assembly = build.assemble(page, 4, mesh, training=training, rotation=rotation)
        return assembly.train_step

    ones = np.ones((8, 4), np.float32)
    batch = {"image": np.zeros((8, 32, 32, 3), np.int16), "labels": ones, "label_mask": ones}
    batch |= {"weight": np.ones(8, np.float32), "index": np.arange(8, dtype=np.int32)}
    first = build.assemble(page, 4, mesh).create(0)
    before = jax.tree.map(np.array, first.params)
    given = (sharding.put_state(mesh, first), sharding.put_batch(mesh, batch), jax.random.key(0))
    for rotation in ("gather", "shear"):
        text = step(rotation).lower(*given).as_text()
        assert ("stablehlo.gather" in text) == (rotation == "gather")
    after, _ = step("gather")(*given)
    assert given[0].step.is_deleted()
    for old, new, average in zip(
        *map(jax.tree.leaves, (before, after.params, after.ema["params"])), strict=True
    ):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)


def test_a_folder_that_is_no_run_cannot_be_opened(data, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is no workdir of `maknet train`"):
        workdir.open_run(tmp_path)
    page = toy.config(data, "linear")
    monkeypatch.setattr(train._Loop, "run", lambda self: None)
    train.train(page, tmp_path / "run")
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        workdir.open_run(tmp_path / "run")
    with pytest.raises(InputError, match="checkpoint 'newest' is unknown: choose best or last"):
        workdir.open_run(tmp_path / "run", checkpoint_name="newest")


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    before = (tmp_path / "data" / "dataset.json").read_bytes()
    (tmp_path / "file").write_text("mine")
    for taken in ("data", "file"):
        with pytest.raises(InputError, match="choose a new --workdir"):
            train.train(toy.config(data, "linear"), tmp_path / taken)
    assert (tmp_path / "data" / "dataset.json").read_bytes() == before


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("linear", {"loss.gamma": -1.0}, "gamma -1.0 should be 0 or above"),
        ("linear", {"loss.clamp": 0.0}, "clamp 0.0 should be above 0"),
        ("smoke", {"model.options.dropout_rate": 7.0}, "dropout_rate 7.0 should be"),
        ("linear", {"data.window": (5.0, 5.0)}, r"data.window \(5.0, 5.0\) should be"),
        ("linear", {"seed": -1}, "seed -1 should be"),
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
