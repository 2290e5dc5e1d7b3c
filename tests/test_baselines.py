"""VGG16 and ResNet18: the paper's sizes. test_pretrained tests their values against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maknet_jax import models
from maknet_jax.runs import build, config


def shapes(name):
    """Parameter and statistics shapes at 115 labels."""
    model = models.build(name, 115)
    return jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 256, 256, 3)), train=False), jax.random.key(0)
    )


@pytest.mark.parametrize(
    "name, parameters, paper", [("vgg16", 14_777_907, 14.78), ("resnet18", 11_248_847, 11.25)]
)
def test_the_parameter_column_of_table_1(name, parameters, paper):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(name)["params"]))
    assert count == parameters
    assert round(count / 1e6, 2) == paper


@pytest.mark.parametrize("name, heads", [("vgg16", 1), ("resnet18", 2)])
def test_outputs_are_float32_and_dropout_is_for_training(name, heads):
    model = models.build(name, 5, dropout_rate=0.5, dtype=jnp.bfloat16)
    x = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(lambda key: model.init(key, x, train=False))(jax.random.key(0))
    predict = jax.jit(lambda v: model.apply(v, x, train=False))
    outputs = predict(variables)
    assert outputs.logits.dtype == jnp.float32 and outputs.logits.shape == (2, 5)
    assert (outputs.scores_before_spl is not None) == (heads == 2)
    train = jax.jit(
        lambda v, key: (
            model.apply(v, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0].logits
        )
    )
    first, second = train(variables, jax.random.key(1)), train(variables, jax.random.key(2))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_configs_build_these_networks(name):
    assert build.build_model(config.load(name), 115) == models.build(name, 115)
