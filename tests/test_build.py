"""What a config builds: the learning rate, the jitted steps, and what scoring omits."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from maknet_jax.errors import InputError
from maknet_jax.runs import build, config
from maknet_jax.training import sharding


def test_the_learning_rate_is_constant_and_then_decays(data):
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
    arguments = (
        sharding.put_state(mesh, first),
        sharding.put_batch(mesh, batch),
        jax.random.key(0),
    )
    for rotation in ("gather", "shear"):
        text = step(rotation).lower(*arguments).as_text()
        assert ("stablehlo.gather" in text) == (rotation == "gather")
    after, _ = step("gather")(*arguments)
    assert arguments[0].step.is_deleted()
    for old, new, average in zip(
        *map(jax.tree.leaves, (before, after.params, after.ema["params"])), strict=True
    ):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)


def test_only_gpus_have_compiler_options():
    assert build.compiler_options(sharding.data_mesh()) == {}
    for platform in ("cuda", "gpu"):  # of a topology, of a device
        devices = np.array([types.SimpleNamespace(platform=platform)])
        options = build.compiler_options(types.SimpleNamespace(devices=devices))
        assert options == {"xla_allow_excess_precision": False}
    assert jax.jit(jnp.sin, compiler_options=options)(0.0) == 0  # XLA knows the option
    with pytest.raises(RuntimeError, match="xla_allow_no_precision"):
        jax.jit(jnp.sin, compiler_options={"xla_allow_no_precision": True})(0.0)


def test_scoring_builds_no_training_step_and_the_same_shapes(monkeypatch):
    page = config.load("linear", ["ema_decay=0.5", "data.size=32", "optimizer.decay_from=0.5"])
    mesh = sharding.data_mesh()
    training = build.assemble(page, 4, mesh, training=build.TrainingSet(10, np.full(4, 5), 10))
    monkeypatch.delattr(build, "build_loss")
    scoring = build.assemble(page, 4, mesh)
    assert scoring.train_step is None and training.train_step is not None
    assert scoring.shapes == training.shapes and scoring.ema
    state = scoring.create(3)
    assert jax.tree.structure(state) == jax.tree.structure(scoring.shapes)
    batch = {"image": np.zeros((8, 32, 32, 3), np.int16), "index": np.arange(8)}
    outputs = scoring.predict(sharding.put_state(mesh, state.variables), batch)
    assert set(outputs) == {"logits", "index"} and outputs["logits"].shape == (8, 4)
