"""The focal loss: identities, a plain NumPy loop, extreme logits and padding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maknet_jax.errors import InputError
from maknet_jax.training import losses


class Outputs(NamedTuple):
    logits: Any
    scores_before_spl: Any


def drawn(seed=0, batch=6, labels=5):
    """Logits of both heads, and a batch with unknown labels and two padding rows."""
    rng = np.random.default_rng(seed)
    outputs = Outputs(
        logits=jnp.asarray(3 * rng.normal(size=(batch, labels)), jnp.float32),
        scores_before_spl=jnp.asarray(3 * rng.normal(size=(batch, labels)), jnp.float32),
    )
    weight = np.ones(batch, np.float32)
    weight[-2:] = 0
    return outputs, {
        "labels": (rng.random((batch, labels)) < 0.4).astype(np.float32),
        "label_mask": (rng.random((batch, labels)) < 0.8).astype(np.float32),
        "weight": weight,
    }


def focal_loop(logits, labels, pos_weight, neg_weight, gamma):
    """The formula in float64, one element at a time."""
    loss = np.zeros(logits.shape)
    for b in range(logits.shape[0]):
        for k in range(logits.shape[1]):
            p = 1 / (1 + np.exp(-np.float64(logits[b, k])))
            y = np.float64(labels[b, k])
            loss[b, k] = -(
                pos_weight[k] * y * (1 - p) ** gamma * np.log(p)
                + neg_weight[k] * (1 - y) * p**gamma * np.log(1 - p)
            )
    return loss


def test_gamma_0_is_binary_cross_entropy():
    outputs, batch = drawn()
    ours = losses.weighted_focal_loss(
        outputs.logits, batch["labels"], pos_weight=1.0, neg_weight=1.0, gamma=0.0
    )
    theirs = optax.sigmoid_binary_cross_entropy(outputs.logits, batch["labels"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_equal_weights_are_optax_focal_loss():
    outputs, batch = drawn()
    ours = losses.weighted_focal_loss(
        outputs.logits, batch["labels"], pos_weight=0.25, neg_weight=0.75, gamma=2.0
    )
    theirs = optax.sigmoid_focal_loss(outputs.logits, batch["labels"], alpha=0.25, gamma=2.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_equals_a_loop_in_float64(soft):
    outputs, batch = drawn(1)
    labels = np.random.default_rng(2).random((6, 5)) if soft else batch["labels"]
    pos_weight = np.array([0.5, 1.0, 7.0, 300.0, 2.0])
    neg_weight = np.array([4.0, 1.0, 0.6, 0.5, 2.0])
    expected = focal_loop(np.asarray(outputs.logits), labels, pos_weight, neg_weight, 2.0)
    ours = losses.weighted_focal_loss(
        outputs.logits, labels, pos_weight=pos_weight, neg_weight=neg_weight
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_extreme_logits_stay_finite(gamma, logit, label):
    def loss(z):
        return losses.weighted_focal_loss(
            z, label, pos_weight=300.0, neg_weight=0.5, gamma=gamma
        ).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.float32(logit))
    assert np.isfinite(value) and value >= 0
    assert np.isfinite(gradient)
    if label == 1.0 and logit == -1e4:  # far off: the loss is linear, its gradient the weight
        assert value == pytest.approx(300.0 * 1e4)
        assert gradient == pytest.approx(-300.0)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray([[1.0, -2.0, 4.0]], jnp.bfloat16)  # exact in both types
    labels = np.array([[1, 0, 1]], np.uint8)
    ours = losses.weighted_focal_loss(logits, labels, pos_weight=1.0, neg_weight=1.0)
    assert ours.dtype == jnp.float32
    expected = focal_loop(np.asarray(logits, np.float32), labels, np.ones(3), np.ones(3), 2.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_class_weights_balance_each_label():
    positives = np.array([1, 100, 500, 900])
    pos_weight, neg_weight = losses.class_weights(positives, 1000)
    np.testing.assert_allclose(pos_weight, [300.0, 5.0, 1.0, 1000 / 1800], rtol=1e-6)
    np.testing.assert_allclose(neg_weight, [1000 / 1998, 1000 / 1800, 1.0, 5.0], rtol=1e-6)
    # Identity: below the clamp, each of the two classes of a label weighs half of the examples.
    np.testing.assert_allclose((pos_weight * positives)[1:], 500, rtol=1e-6)
    np.testing.assert_allclose(neg_weight * (1000 - positives), 500, rtol=1e-6)


def test_class_weights_of_an_absent_class():
    pos_weight, neg_weight = losses.class_weights([0, 1000], 1000, clamp=50.0)
    np.testing.assert_allclose(pos_weight, [50.0, 0.5])
    np.testing.assert_allclose(neg_weight, [0.5, 50.0])


def test_class_weights_with_counts_per_label():
    pos_weight, neg_weight = losses.class_weights([2, 2], [10, 4])
    np.testing.assert_allclose(pos_weight, [2.5, 1.0])
    np.testing.assert_allclose(neg_weight, [10 / 16, 1.0])


@pytest.mark.parametrize(("positives", "total"), [([3, 11], 10), ([3, -1], 10), ([0, 0], 0)])
def test_class_weights_refuse_impossible_counts(positives, total):
    with pytest.raises(InputError, match="label [01] "):
        losses.class_weights(positives, total)


def test_loss_is_the_mean_over_known_elements_of_real_examples():
    outputs, batch = drawn(3)
    pos_weight, neg_weight = np.linspace(1, 5, 5), np.linspace(2, 0.5, 5)
    loss_fn = losses.focal_loss_fn(
        pos_weight=pos_weight, neg_weight=neg_weight, head_weights=(0.5, 2.0)
    )
    loss, metrics = jax.jit(loss_fn)(outputs, batch)
    means = []
    for logits in outputs:
        values = focal_loop(np.asarray(logits), batch["labels"], pos_weight, neg_weight, 2.0)
        counted = (batch["label_mask"] > 0) & (batch["weight"] > 0)[:, None]
        means.append(values[counted].mean())
    after, before = means
    assert float(metrics["loss_after_spl"]) == pytest.approx(after, rel=1e-5)
    assert float(metrics["loss_before_spl"]) == pytest.approx(before, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 * before + 2.0 * after, rel=1e-5)
    assert float(metrics["loss"]) == float(loss)


def test_a_network_with_one_head_has_one_loss():
    outputs, batch = drawn(4)
    loss_fn = losses.focal_loss_fn(pos_weight=1.0, neg_weight=1.0, gamma=0.0)
    loss, metrics = loss_fn(outputs._replace(scores_before_spl=None), batch)
    assert set(metrics) == {"loss", "loss_after_spl"}
    assert float(loss) == float(metrics["loss_after_spl"])


@pytest.mark.parametrize("garbage", [1e4, np.inf, np.nan])
def test_padding_and_unknown_labels_do_not_count(garbage):
    outputs, batch = drawn(5)
    loss_fn = losses.focal_loss_fn(pos_weight=3.0, neg_weight=0.5)
    uncounted = (batch["label_mask"] == 0) | (batch["weight"] == 0)[:, None]
    corrupted = Outputs(*(jnp.where(uncounted, garbage, logits) for logits in outputs))
    other = batch | {"labels": np.where(uncounted, 1 - batch["labels"], batch["labels"])}
    assert float(loss_fn(corrupted, other)[0]) == float(loss_fn(outputs, batch)[0])
    if np.isfinite(garbage):
        gradient = jax.grad(lambda o: loss_fn(o, batch)[0])(corrupted)
        for head in gradient:
            assert (np.asarray(head)[uncounted] == 0).all()
            assert np.isfinite(head).all()


def test_fractional_weights_weigh_and_a_batch_of_padding_is_zero():
    values = jnp.asarray([[1.0, 3.0], [5.0, 7.0]])
    mask = jnp.asarray([[1, 1], [1, 0]])
    assert float(losses.masked_mean(values, mask, jnp.asarray([1.0, 2.0]))) == 14 / 4
    assert float(losses.masked_mean(values, mask, jnp.zeros(2))) == 0.0
