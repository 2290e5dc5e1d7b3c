"""Shared by the networks: two heads, precision, frozen trunks, and which of them take boxes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import dense, drawn, redrawn, trained_parts

from maknet_jax import models

TINY = {"stem": 8, "blocks": (1,) * 4, "growth_rates": (8,) * 4, "widths": (8,) * 4}
LESANET = {"trunk": "maknet", "trunk_options": TINY, "units": 16, "embedding": 8}
NETWORKS = {
    "maknet": TINY | {"blocks": (1, 1), "growth_rates": (8, 8), "widths": (8, 16)},
    "vgg16": {},
    "resnet18": {},
    "lesanet": LESANET,
    "linear": {"edge": 4},
}


@functools.cache
def outputs_of(name):
    """(variables, outputs) of a network whose every weight is drawn, its SPL no identity."""
    model = models.build(name, 5, **NETWORKS[name])
    images = jnp.abs(drawn(2, 64, 64, 3))
    variables = redrawn(
        jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0)),
        by_fan_in=True,
    )
    return variables, jax.jit(lambda v: model.apply(v, images, train=False))(variables)


@pytest.mark.parametrize("name", ["maknet", "resnet18", "lesanet"])
def test_the_logits_are_the_propagated_scores_of_the_first_head(name):
    variables, outputs = outputs_of(name)
    scores = outputs.scores_before_spl
    expected = dense(scores, variables["params"]["spl"]["dense"])
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(outputs.logits - scores).max() > 0.1  # swapped heads would be noticed


@pytest.mark.parametrize("name", ["vgg16", "linear"])
def test_networks_without_score_propagation_have_one_head(name):
    variables, outputs = outputs_of(name)
    assert outputs.scores_before_spl is None and "spl" not in variables["params"]


@pytest.mark.parametrize("name", ["maknet", "vgg16", "resnet18", "linear"])
def test_the_first_head_is_a_dense_layer_on_the_features(name):
    variables, outputs = outputs_of(name)
    scores = outputs.logits if outputs.scores_before_spl is None else outputs.scores_before_spl
    expected = dense(outputs.features, variables["params"]["classifier"])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_only_lesanet_takes_boxes():
    takes_box = {name: models.build(name, 5, **NETWORKS[name]).takes_box for name in NETWORKS}
    assert {name for name, takes in takes_box.items() if takes} == {"lesanet"}
    assert set(NETWORKS) == set(models.MODELS)


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_multiplied_in_full_float32(name):
    """On accelerators too, which default to bfloat16 or TF32 products."""
    model, images = models.build(name, 5, **NETWORKS[name]), jnp.zeros((2, 64, 64, 3))
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    traced = jax.jit(lambda v: model.apply(v, images, train=False)).trace(shapes)
    lines = traced.lower(lowering_platforms=("tpu",)).as_text().splitlines()
    dots = [line for line in lines if "stablehlo.dot_general" in line]
    heads = sum(part in shapes["params"] for part in ("classifier", "spl", "embedding"))
    assert sum("HIGHEST" in line for line in dots) == heads


@pytest.mark.parametrize("name", ["maknet", "vgg16", "resnet18"])
def test_a_frozen_trunk_keeps_its_weights_and_statistics(name):
    variables, _ = outputs_of(name)
    model, images = models.build(name, 5, frozen=True, **NETWORKS[name]), drawn(2, 32, 32, 3)

    assert trained_parts(model, variables, images) == {"classifier", "spl"} & set(
        variables["params"]
    )
