"""Trunks from torch: the same features, the normalisation with them, other files rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_weights import golden, image

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.models import pretrained

AS_THEY_ARE = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def features(name, params, batch_stats, images):
    """Features of a network with this trunk; its head is zeros."""
    model = models.build(name, 115)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(images), train=False))
    assert jax.tree.map(np.shape, batch_stats) == jax.tree.map(np.shape, like["batch_stats"])
    head = {part: like["params"][part] for part in like["params"].keys() - params.keys()}
    assert head.keys() <= {"classifier", "spl"}
    head = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), head)
    variables = {"params": params | head, "batch_stats": batch_stats}
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, like)
    return jax.jit(lambda v, x: model.apply(v, x, train=False).features)(variables, images)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_trunk_features_are_those_of_torch(name):
    weights, expected = golden(name)
    params, batch_stats, unplaced = pretrained.trunk_from_torch(name, weights, **AS_THEY_ARE)
    assert unplaced == []
    ours = features(name, params, batch_stats, image())
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.1


def test_the_normalisation_travels_with_the_weights():
    """Raw images with mean and std give what normalised images give without."""
    weights, expected = golden("resnet18")
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([0.5, 2.0, 0.25])
    params, batch_stats, _ = pretrained.trunk_from_torch("resnet18", weights, mean=mean, std=std)
    plain = pretrained.trunk_from_torch("resnet18", weights, **AS_THEY_ARE)[1]
    ours = features("resnet18", params, batch_stats, image())
    by_hand = features("resnet18", params, plain, (image() - mean) / std)
    np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-5)
    assert np.abs(ours - expected).max() > 0.1  # and it makes a difference


def test_the_default_normalisation_is_that_of_imagenet():
    batch_stats = pretrained.trunk_from_torch("vgg16", golden("vgg16")[0])[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(batch_stats)} == {np.dtype(np.float32)}
    red = batch_stats["input"]["mean"][0], batch_stats["input"]["std"][0]
    # torchvision shows black as -2.1179 and white as 2.2489 in the red channel.
    np.testing.assert_allclose(
        [(c - red[0]) / red[1] for c in (0, 1)], [-2.1179, 2.2489], rtol=1e-4
    )


def test_arrays_of_the_head_are_reported_and_missing_ones_rejected():
    weights, _ = golden("resnet18")
    head = {"fc.weight": np.zeros((1000, 512), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    assert pretrained.trunk_from_torch("resnet18", weights | head)[2] == ["fc.bias", "fc.weight"]
    with pytest.raises(InputError, match="features.0.weight is missing: .* vgg16"):
        pretrained.trunk_from_torch("vgg16", weights)
    with pytest.raises(InputError, match="'maknet' .* vgg16, resnet18"):
        pretrained.trunk_from_torch("maknet", weights)
    del weights["layer2.0.downsample.0.weight"]
    with pytest.raises(InputError, match=r"layer2\.0\.downsample\.0\.weight"):
        pretrained.trunk_from_torch("resnet18", weights)


def test_larger_networks_of_the_same_names_are_rejected():
    weights, _ = golden("resnet18")
    deeper = weights | {"layer1.2.conv1.weight": weights["layer1.1.conv1.weight"]}  # ResNet34
    with pytest.raises(InputError, match=r"layer1\.2\.conv1\.weight .* resnet18"):
        pretrained.trunk_from_torch("resnet18", deeper)
    narrow = weights | {"layer1.0.conv1.weight": np.zeros((64, 64, 1, 1), np.float32)}  # ResNet50
    with pytest.raises(InputError, match=r"conv1\.weight .*\(64, 64, 1, 1\), not \(64, 64, 3"):
        pretrained.trunk_from_torch("resnet18", narrow)
    flat = weights | {"bn1.running_var": np.zeros((), np.float32)}
    with pytest.raises(InputError, match=r"bn1\.running_var .*\(\), not \(64,\)"):
        pretrained.trunk_from_torch("resnet18", flat)
    broken = weights | {"bn1.bias": np.full(64, np.nan, np.float32)}
    with pytest.raises(InputError, match=r"bn1\.bias "):
        pretrained.trunk_from_torch("resnet18", broken)


def test_weights_of_dataparallel_are_the_same():
    weights, _ = golden("resnet18")
    wrapped = {f"module.{key}": array for key, array in weights.items()}
    ours, theirs = (pretrained.trunk_from_torch("resnet18", each) for each in (wrapped, weights))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert ours[2] == theirs[2] == []


@pytest.mark.parametrize(
    "change", [{"std": (1, 0, 1)}, {"mean": (0, np.nan, 0)}, {"mean": (0.5,)}, {"std": (1, 1, -1)}]
)
def test_an_invalid_normalisation_is_rejected(change):
    ((key, value),) = change.items()
    with pytest.raises(InputError) as raised:
        pretrained.trunk_from_torch("resnet18", {}, **change)
    assert f"{key} {np.float32(value).tolist()}" in str(raised.value)
