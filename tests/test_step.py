"""The step: one device or eight, randomness by (seed, step, example), donated buffers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maknet_jax import models
from maknet_jax.training import augment, losses, ranger, sharding, state, step

NOISE = {
    "rotation_probability": 0.5,
    "rotation_degrees": 15.0,
    "crop_probability": 0.5,
    "crop_scale": (0.6, 1.0),
    "crop_aspect": (0.8, 1.25),
    "contrast_probability": 0.3,
    "grayscale_probability": 0.3,
}
MAKNET = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (8,), "dropout_rate": 0.5}
LOSS = losses.focal_loss_fn(pos_weight=np.float32([3, 1, 9]), neg_weight=np.float32([1, 2, 0.6]))
TO_INPUT = functools.partial(augment.to_unit, window=(-1024.0, 3071.0))


def batches(count, rows=16, size=32):
    """Batches of blobs whose brightness says the labels; the record numbers run on."""
    for number in range(count):
        rng = np.random.default_rng(number)
        labels = (rng.random((rows, 3)) < 0.4).astype(np.float32)
        image = rng.normal(-600, 200, (rows, size, size, 3))
        image[:, 8:20, 8:20] += 900 * labels[:, None, None]
        yield {
            "image": image.astype(np.int16),
            "labels": labels,
            "label_mask": (rng.random((rows, 3)) < 0.9).astype(np.float32),
            "weight": np.ones(rows, np.float32),
            "index": np.arange(number * rows, (number + 1) * rows, dtype=np.int32),
        }


def unit(image):
    """HU in LesaNet's window to [0, 1], in float64."""
    return np.clip((image + 1024.0) / 4095.0, 0, 1)


def compiled(model, optimizer, mesh, noise=None, **options):
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)
    options |= {"to_input": TO_INPUT, "augment": noise}
    train_step = step.make_train_step(model, LOSS, optimizer, **options)
    return jax.jit(
        train_step,
        in_shardings=(whole, rows, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def run(start, train_step, mesh, count):
    """The states and metrics after each of `count` steps, as NumPy."""
    current = sharding.put_state(mesh, jax.tree.map(np.array, start))
    key = jax.device_put(jax.random.key(5), sharding.replicated(mesh))
    rows = []
    for batch in batches(count):
        current, metrics = train_step(current, sharding.put_batch(mesh, batch), key)
        rows.append(jax.tree.map(np.array, (current, metrics)))
    return rows


@pytest.mark.parametrize("form", ["gather", "shear"])
def test_eight_devices_compute_the_same_as_one(form):
    """Ranger with its first rectified and its first lookahead step, noise and dropout included."""
    model, optimizer = models.build("maknet", 3, **MAKNET), ranger.ranger(0.003)
    start = state.create(model, optimizer, size=32, seed=0)
    results = []
    for count in (1, 8):
        mesh = sharding.data_mesh(jax.devices()[:count])
        noise = augment.make_augment(**NOISE, form=form, to_input=TO_INPUT, devices=count)
        train_step = compiled(model, optimizer, mesh, noise)
        results.append(run(start, train_step, mesh, 8))
        assert train_step._cache_size() == 1  # the state comes back as it went in
    for (one, one_metrics), (eight, eight_metrics) in zip(*results, strict=True):
        for leaf, other in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)
        assert one_metrics["loss"] == pytest.approx(eight_metrics["loss"], rel=1e-5)
    final, metrics = results[0][-1]
    assert int(final.step) == 8
    assert set(metrics) == {"loss", "loss_before_spl", "loss_after_spl", "gradient_norm"}
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(start.params), strict=True)
    ]
    assert min(moved) > 1e-5  # every parameter learns


@pytest.fixture(scope="module")
def linear():
    return models.build("linear", 3, edge=4)


def one_device():
    return sharding.data_mesh(jax.devices()[:1])


def changed(train_step, mesh, start, batch, seed=5):
    """The state and metrics of one step from `start`."""
    current = sharding.put_state(mesh, jax.tree.map(np.array, start))
    key = jax.device_put(jax.random.key(seed), sharding.replicated(mesh))
    return train_step(current, sharding.put_batch(mesh, batch), key)


def test_a_step_of_sgd_is_the_gradient_of_the_loss(linear):
    start = state.create(linear, optax.sgd(0.5), size=32, seed=0)
    mesh, batch = one_device(), next(batches(1))

    def loss(params):
        variables = {"params": params, "batch_stats": start.batch_stats}
        images = unit(batch["image"])
        outputs, updated = linear.apply(variables, images, train=True, mutable=["batch_stats"])
        return LOSS(outputs, batch)[0], updated

    (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(start.params)
    after, metrics = changed(compiled(linear, optax.sgd(0.5), mesh), mesh, start, batch)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    for name, leaf in start.params["classifier"].items():
        theirs = leaf - 0.5 * gradient["classifier"][name]
        np.testing.assert_allclose(after.params["classifier"][name], theirs, rtol=1e-5, atol=1e-5)
    for name, leaf in updated["batch_stats"]["norm"].items():
        np.testing.assert_allclose(after.batch_stats["norm"][name], leaf, rtol=1e-5, atol=1e-7)


def test_noise_follows_the_record_the_step_and_the_seed_not_the_place_in_the_batch(linear):
    mesh, optimizer = one_device(), optax.sgd(0.5)
    train_step = compiled(linear, optimizer, mesh, augment.make_augment(**NOISE, to_input=TO_INPUT))
    start = state.create(linear, optimizer, size=32, seed=0)
    batch = next(batches(1))

    def loss(start=start, batch=batch, seed=5):
        return float(changed(train_step, mesh, start, batch, seed)[1]["loss"])

    order = np.random.default_rng(0).permutation(16)
    assert loss() == loss()
    assert loss(batch={k: v[order] for k, v in batch.items()}) == pytest.approx(loss(), rel=1e-5)
    others = [
        loss(seed=6),
        loss(start=start._replace(step=jnp.int32(1))),
        loss(batch=batch | {"index": batch["index"] + 16}),
    ]
    assert all(abs(other - loss()) > 1e-4 * loss() for other in others), others


def test_padding_rows_and_unknown_labels_do_not_count_in_the_loss(linear):
    mesh, optimizer = one_device(), optax.sgd(0.5)
    train_step = compiled(linear, optimizer, mesh)
    start = state.create(linear, optimizer, size=32, seed=0)
    batch = next(batches(1))
    batch["weight"][12:] = 0
    other = {**batch, "labels": batch["labels"].copy()}
    other["labels"][12:] = 1 - other["labels"][12:]
    other["labels"][batch["label_mask"] == 0] = 0.5
    assert not np.array_equal(other["labels"], batch["labels"])
    first = changed(train_step, mesh, start, batch)
    second = changed(train_step, mesh, start, other)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_moving_average_of_two_steps(linear):
    """At decay 1/2: a quarter of the start, a quarter of the first step, half of the second."""
    mesh, optimizer = one_device(), ranger.ranger(0.01)
    start = state.create(linear, optimizer, size=32, seed=0, ema=True)
    one, two = (s for s, _ in run(start, compiled(linear, optimizer, mesh, ema_decay=0.5), mesh, 2))
    weights = [{"params": s.params, "batch_stats": s.batch_stats} for s in (start, one, two)]
    for first, second, third, average, half in zip(
        *map(jax.tree.leaves, (*weights, two.ema, one.ema)), strict=True
    ):
        np.testing.assert_allclose(half, first / 2 + second / 2, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(
            average, first / 4 + second / 4 + third / 2, rtol=1e-6, atol=1e-7
        )
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (weights[2], two.ema)), strict=True)
    ]
    assert min(moved) > 1e-4  # the statistics too


def test_the_moving_average_does_not_change_the_steps(linear):
    mesh, optimizer = one_device(), ranger.ranger(0.01)
    results = []
    for ema in (False, True):
        start = state.create(linear, optimizer, size=32, seed=0, ema=ema)
        train_step = compiled(linear, optimizer, mesh, ema_decay=0.9 if ema else 0.0)
        results.append(run(start, train_step, mesh, 3))
    for (plain, metrics), (other, other_metrics) in zip(*results, strict=True):
        assert plain.ema == () and other.ema
        for a, b in zip(
            jax.tree.leaves(plain), jax.tree.leaves(other._replace(ema=())), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert metrics == other_metrics


def test_the_step_donates_its_state(linear):
    """Donation: nothing of the old state stays in memory. (A refusal would be a warning.)"""
    optimizer = ranger.ranger(0.01)
    mesh = sharding.data_mesh()
    train_step = compiled(linear, optimizer, mesh)
    current = sharding.put_state(mesh, state.create(linear, optimizer, size=32, seed=0))
    key = jax.device_put(jax.random.key(5), sharding.replicated(mesh))
    for batch in batches(2):
        before = jax.tree.leaves(current)
        current, _ = train_step(current, sharding.put_batch(mesh, batch), key)
        assert all(leaf.is_deleted() for leaf in before)


def test_prediction_gives_logits_in_float32_with_running_statistics(linear):
    start = state.create(linear, optax.sgd(0.5), size=32, seed=0)
    images = next(batches(1))["image"]
    bfloat16 = linear.clone(dtype=jnp.bfloat16)
    for model in (linear, bfloat16):
        logits = step.make_predict_step(model, to_input=TO_INPUT)(start.variables, images)
        theirs = model.apply(start.variables, unit(images), train=False).logits
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, theirs, rtol=1e-5, atol=1e-5)
