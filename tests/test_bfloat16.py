"""Training with bfloat16 activations agrees with float32, on CPU."""

import jax
import numpy as np
import pytest
import toy

from maknet_jax.data import pipeline
from maknet_jax.runs import setup
from maknet_jax.training import sharding

STEPS = 6
# bfloat16 keeps 8 bits of the mantissa: one rounding errs by up to 2^-9 = 0.2 %. The roundings of
# the ten layers that an activation passes add up to about 2^-9 sqrt(10) = 0.6 % at random, and to
# 2 % at worst (measured: 0.34 % of the losses, 1.1 % of the largest logit).
RELATIVE = 0.02


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """precision -> (losses of the steps, logits `[B, K]` of the trained network)."""
    results = {}
    for precision in ("float32", "bfloat16"):
        page = toy.config(data, "smoke", {"precision": precision, "optimizer.learning_rate": 0.003})
        ready = setup.set_up(page, tmp_path_factory.mktemp(precision), devices=jax.devices()[:1])
        mesh, state = ready.assembly.mesh, ready.assembly.create(0)
        state, losses = sharding.put_state(mesh, state), []
        batches = pipeline.mixed_batches(ready.sources, ready.batch_sizes, seed=0)
        for _ in range(STEPS):
            batch = sharding.put_batch(mesh, next(batches))
            state, metrics = ready.assembly.train_step(state, batch, jax.random.key(1))
            losses.append(float(metrics["loss"]))
        logits = ready.assembly.predict(state.variables, next(batches))["logits"]
        results[precision] = np.array(losses), logits
    return results


def test_the_losses_of_the_steps_agree(runs):
    np.testing.assert_allclose(runs["bfloat16"][0], runs["float32"][0], rtol=RELATIVE)
    assert not np.array_equal(runs["bfloat16"][0], runs["float32"][0])  # it is another computation


def test_logits_and_labels_agree(runs):
    """Logits by their own scale; labels wherever rounding cannot change them."""
    half, full = runs["bfloat16"][1], runs["float32"][1]
    assert half.dtype == full.dtype == np.float32
    limit = 2 * RELATIVE * np.abs(full).max()  # of the trained weights, which differ as well
    np.testing.assert_allclose(half, full, atol=limit)
    certain = np.abs(full) > limit
    assert certain.mean() > 0.8 and np.array_equal((half > 0)[certain], (full > 0)[certain])
