"""Gradient accumulation and rematerialisation: the same result with less memory."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step
import toy
from flax import linen as nn

from maknet_jax import models, train
from maknet_jax.errors import InputError
from maknet_jax.models import network
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import augment, ranger, sharding, state, step


class Plain(network.Network):
    """Convolutions without BatchNorm, and two heads."""

    @nn.compact
    def __call__(self, images, train):
        x = images
        for _ in range(2):
            x = nn.gelu(nn.Conv(8, (3, 3))(x))
        features = x.mean(axis=(1, 2))
        scores = nn.Dense(self.num_classes)(features)
        return network.Outputs(nn.Dense(self.num_classes)(scores), scores, features)


def unequal(count, rows=16):
    """Batches whose padding and unknown labels differ between the parts."""
    for number, batch in enumerate(test_step.batches(count, rows)):
        batch["weight"][: rows // 4 + number] = 0
        batch["label_mask"][-rows // 4 :, 1:] = 0
        yield batch


def run(model, mesh, parts, *, optimizer, steps=3, start=None, noisy=False):
    """The states and metrics after each step."""
    noise = None
    if noisy:
        noise = augment.make_augment(
            **test_step.NOISE, to_input=test_step.TO_INPUT, devices=mesh.size, form="gather"
        )
    train_step = test_step.compiled(
        model, optimizer, mesh, noise, accumulate=parts, devices=mesh.size
    )
    start = start or state.create(model, optimizer, size=32, seed=0)
    current = sharding.put_state(mesh, jax.tree.map(np.array, start))
    rows = []
    for batch in unequal(steps):
        on_mesh = sharding.put_batch(mesh, batch)
        current, metrics = train_step(current, on_mesh, jax.random.key(5))
        rows.append(jax.tree.map(np.array, (current, metrics)))
    return rows


def close(one, other, limit=1e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("devices, parts", [(1, 8), (2, 4)])
def test_without_batch_norm_the_parts_give_the_gradient_of_the_whole_batch(devices, parts):
    """Losses, gradient norms and weights; SGD, so that the weights follow the gradients."""
    mesh = sharding.data_mesh(jax.devices()[:devices])
    options = {"optimizer": optax.sgd(0.3), "noisy": devices > 1}
    whole = run(Plain(num_classes=3), test_step.one_device(), 1, **options)
    summed = run(Plain(num_classes=3), mesh, parts, **options)
    for one, other in zip(whole, summed, strict=True):
        close(one, other)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[0][0].params, whole[2][0].params)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_batch_norm_takes_the_statistics_of_each_part():
    """The running mean is that of the whole batch; constants keep every bit."""
    model, optimizer = models.build("maknet", 3, **test_step.MAKNET), optax.sgd(0.1)
    start = state.create(model, optimizer, size=32, seed=0)
    start.batch_stats["input"]["mean"] += jnp.float32([0.1, 0.2, 0.3])
    mesh = test_step.one_device()
    (whole, _), (summed, metrics) = (
        run(model, mesh, parts, optimizer=optimizer, steps=1, start=start)[0] for parts in (1, 2)
    )
    one, two = whole.batch_stats, summed.batch_stats
    close(one["stem"]["norm"]["mean"], two["stem"]["norm"]["mean"])  # before any other norm
    np.testing.assert_array_equal(two["input"]["mean"], start.batch_stats["input"]["mean"])
    # The variance of the parts lacks that between their means.
    assert np.all(two["stem"]["norm"]["var"] <= one["stem"]["norm"]["var"] + 1e-7)
    assert np.any(two["stem"]["norm"]["var"] < one["stem"]["norm"]["var"] - 1e-6)
    assert np.isfinite(metrics["loss"])


def test_a_frozen_trunk_has_no_statistics_of_a_part():
    options = test_step.MAKNET | {"dropout_rate": 0.0}
    model = models.build("maknet", 3, frozen=True, **options)
    optimizer, mesh = ranger.ranger(0.01), test_step.one_device()
    results = [run(model, mesh, parts, optimizer=optimizer, steps=1) for parts in (1, 4)]
    close(results[0][0][1], results[1][0][1])
    for one, other in zip(*(jax.tree.leaves(r[0][0].batch_stats) for r in results), strict=True):
        np.testing.assert_array_equal(one, other)


def compile_step(model, parts=1, *, devices=1, rows=16, size=32):
    """The compiled step of a network on `devices` simulated devices."""
    mesh, optimizer = sharding.data_mesh(jax.devices()[:devices]), optax.sgd(0.1)
    train_step = test_step.compiled(model, optimizer, mesh, accumulate=parts, devices=devices)
    batch = sharding.put_batch(mesh, next(test_step.batches(1, rows, size)))
    like = state.shapes(model, optimizer, size=size)
    return train_step.lower(like, batch, jax.random.key(0)).compile()


def temporary(program):
    """Bytes of temporary memory."""
    return program.memory_analysis().temp_size_in_bytes


def test_parts_need_less_memory():
    whole, parts = (temporary(compile_step(Plain(num_classes=3), n, rows=64)) for n in (1, 8))
    assert parts < whole / 3


@pytest.mark.slow
def test_rematerialised_blocks_give_the_same_step_with_less_memory():
    """Loss, gradients (by SGD) and statistics; the tree of parameters is that of the network."""
    options = {"stem": 8, "blocks": (1, 1), "growth_rates": (8, 16), "widths": (16, 32)}
    results, bytes_ = [], []
    for remat in (False, True):
        model = models.build("maknet", 3, remat=remat, form="split", **options)
        start = state.create(model, optax.sgd(0.1), size=64, seed=0)
        program = compile_step(model, rows=8, size=64)
        batch = sharding.put_batch(test_step.one_device(), next(test_step.batches(1, 8, 64)))
        bytes_.append(temporary(program))
        results.append(jax.tree.map(np.array, program(start, batch, jax.random.key(0))))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    close(*results)
    assert bytes_[1] < 0.9 * bytes_[0], bytes_


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "lesanet"])
def test_rematerialised_networks_have_the_same_parameters(name):
    shapes = []
    for remat in (False, True):
        model, images = models.build(name, 3, remat=remat), jnp.zeros((1, 64, 64, 3))
        init = functools.partial(model.init, train=False)
        shapes.append(jax.eval_shape(init, jax.random.key(0), images))
    assert shapes[0] == shapes[1]


def test_a_run_may_switch_to_rematerialisation_even_if_its_config_lacks_the_field(data, tmp_path):
    changes = {"epochs": 0.4, "checkpoint_every": 1}
    train.train(toy.config(data, "smoke", changes), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["remat"], stored["accumulate"]
    path.write_text(json.dumps(stored))
    train.train(toy.config(data, "smoke", changes | {"remat": True}), tmp_path / "run")
    assert json.loads(path.read_text())["remat"] is True
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    with pytest.raises(InputError, match="remat"):
        build.build_model(configs.load("linear", ["remat=True"]), 3)


def test_no_image_moves_to_another_device():
    """Beyond the gradients' all-reduce there is no collective operation."""
    text = compile_step(Plain(num_classes=3), 2, devices=8, rows=32).as_text()
    kinds = set(re.findall(r"(all-reduce|all-gather|all-to-all|collective-permute)", text))
    assert kinds == {"all-reduce"}


def test_parts_hold_equal_shares_of_both_streams():
    """Labelled and pseudo-labelled images alternate in a batch; each part has both."""
    kinds = jnp.asarray(np.tile([0, 0, 1], 16))
    parts = step._parts(kinds, 4, 2)
    assert parts.shape == (4, 12) and parts.sum(axis=1).tolist() == [4] * 4


def test_a_run_in_parts(data, tmp_path):
    page = toy.config(data, "linear", {"accumulate": 2, "epochs": 0.4})
    summary = train.train(page, tmp_path / "run", devices=jax.devices()[:4])
    assert summary["steps"] == 2 and summary["skipped_steps"] == 0
    with pytest.raises(InputError, match="accumulate 1, not 2|accumulate 2, not 1"):
        train.train(toy.config(data, "linear", {"epochs": 0.4}), tmp_path / "run")
    with pytest.raises(InputError, match="batch_size 8 .* 8 device.* accumulate 2"):
        train.train(page, tmp_path / "other")


def test_losses_over_the_whole_batch_are_refused():
    page = configs.load("lesanet", ["accumulate=2"])
    with pytest.raises(InputError, match="accumulate 2 is not supported for loss lesion"):
        build.build_loss(page, np.ones(3), 9, np.zeros((3, 3), bool))
