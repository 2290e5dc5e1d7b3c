"""VGG16 and ResNet18: the paper's sizes, and the values of torch's networks on the same weights."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maknet_jax import config, models, workdir
from maknet_jax.errors import InputError
from maknet_jax.models import pretrained

GOLDEN = pathlib.Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from network_weights import draw, image  # noqa: E402


def state_dict(name):
    """The weights that `make_networks_golden.py` gave to torch."""
    golden = np.load(GOLDEN / "networks.npz")
    shapes = {
        str(key): tuple(int(part) for part in str(shape).split(",") if part)
        for key, shape in zip(golden[f"{name}_keys"], golden[f"{name}_shapes"], strict=True)
    }
    return draw(shapes), golden[f"{name}_features"]


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


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_trunk_features_are_those_of_torch(name):
    weights, expected = state_dict(name)
    params, batch_stats, unplaced = pretrained.trunk_from_torch(name, weights)
    assert unplaced == []
    whole = shapes(name)
    trunk = set(params)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, {k: v for k, v in whole["params"].items() if k in trunk}
    )
    assert jax.tree.map(np.shape, batch_stats) == jax.tree.map(
        lambda leaf: leaf.shape, whole["batch_stats"]
    )
    head = {
        key: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), leaves)
        for key, leaves in whole["params"].items()
        if key not in trunk
    }
    assert set(head) <= {"classifier", "spl"}
    model = models.build(name, 115)
    variables = {"params": params | head, "batch_stats": batch_stats}
    outputs = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, image())
    assert np.abs(outputs.features - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.1


def test_what_has_no_place_is_reported_and_what_is_missing_refused():
    weights, _ = state_dict("resnet18")
    weights["fc.weight"] = np.zeros((1000, 512), np.float32)
    assert pretrained.trunk_from_torch("resnet18", weights)[2] == ["fc.weight"]
    del weights["layer2.0.downsample.0.weight"]
    with pytest.raises(InputError, match=r"layer2\.0\.downsample\.0\.weight is missing"):
        pretrained.trunk_from_torch("resnet18", weights)
    with pytest.raises(InputError, match="features.0.weight is missing: no vgg16"):
        pretrained.trunk_from_torch("vgg16", weights)
    with pytest.raises(InputError, match="no torch trunk of 'maknet'"):
        pretrained.trunk_from_torch("maknet", weights)
    weights["conv1.weight"] = np.zeros((64, 3), np.float32)
    with pytest.raises(InputError, match=r"conv1\.weight has shape \(64, 3\)"):
        pretrained.trunk_from_torch("resnet18", weights)


@pytest.mark.parametrize("name, heads", [("vgg16", 1), ("resnet18", 2)])
def test_outputs_are_float32_and_dropout_is_for_training(name, heads):
    model = models.build(name, 5, dropout_rate=0.5, dtype=jnp.bfloat16)
    x = jnp.asarray(image()[:, :32, :32])
    variables = jax.jit(lambda key: model.init(key, x, train=False))(jax.random.key(0))
    predict = jax.jit(lambda v: model.apply(v, x, train=False))
    outputs = predict(variables)
    assert outputs.logits.dtype == jnp.float32 and outputs.logits.shape == (2, 5)
    assert (outputs.scores_before_spl is not None) == (heads == 2)
    train = jax.jit(
        lambda v, key: model.apply(
            v, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )[0].logits
    )
    first, second = train(variables, jax.random.key(1)), train(variables, jax.random.key(2))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_the_pages_share_the_teachers_recipe(name):
    page, teacher = config.load(name).to_dict(), config.load("teacher").to_dict()
    assert page.pop("model") == {"name": name, "options": {"dropout_rate": 0.0}}
    teacher.pop("model")
    assert page == teacher
    assert workdir.build_model(config.load(name), 115) == models.build(name, 115)
