"""The linear model on pixels, against NumPy: weights times standardised cells."""

import jax
import numpy as np
import pytest

from maknet_jax import models
from maknet_jax.errors import InputError


def images(count=6, size=16):
    return np.random.default_rng(0).random((count, size, size, 3), np.float32)


def cells(pixels, edge):
    """Means of square cells, one at a time."""
    cell = pixels.shape[1] // edge
    out = np.zeros((len(pixels), edge, edge, 3))
    for i, j in np.ndindex(edge, edge):
        part = pixels[:, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
        out[:, i, j] = np.float64(part).mean(axis=(1, 2))
    return out.reshape(len(pixels), -1)


@pytest.mark.parametrize("edge", [4, 16])
def test_logits_are_weights_times_standardised_pixels(edge):
    model = models.build("linear", 5, edge=edge)
    variables = model.init(jax.random.key(0), images(), train=False)
    outputs, updated = model.apply(variables, images(), train=True, mutable=["batch_stats"])
    x = cells(images(), edge)
    standard = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    dense = variables["params"]["classifier"]
    theirs = standard @ np.float64(dense["kernel"]) + dense["bias"]
    np.testing.assert_allclose(outputs.logits, theirs, rtol=1e-3, atol=1e-4)
    assert outputs.scores_before_spl is None and outputs.features.shape == (6, edge * edge * 3)
    running = updated["batch_stats"]["norm"]
    np.testing.assert_allclose(running["mean"], 0.1 * x.mean(axis=0), rtol=1e-4)
    predicted = model.apply(variables | updated, images(), train=False).logits
    standard = (x - running["mean"]) / np.sqrt(np.float64(running["var"]) + 1e-5)
    np.testing.assert_allclose(
        predicted, standard @ np.float64(dense["kernel"]) + dense["bias"], rtol=1e-4, atol=1e-5
    )


def test_parameters_are_one_dense_layer():
    variables = models.build("linear", 7, edge=8).init(jax.random.key(0), images(), train=False)
    assert jax.tree.map(np.shape, variables["params"]) == {
        "classifier": {"kernel": (8 * 8 * 3, 7), "bias": (7,)}
    }


def test_an_edge_that_does_not_divide_the_size_is_rejected():
    with pytest.raises(InputError, match="size 16 .* edge 5"):
        models.build("linear", 5, edge=5).init(jax.random.key(0), images(), train=False)
