"""MAKNet: its size, its layers' names, its types and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import state

TINY = {"stem": 8, "blocks": (1, 1), "growth_rates": (8, 8), "widths": (8, 16)}
ONE_BLOCK = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (16,)}


def shapes(model, size=256):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def full():
    return shapes(models.build("maknet", 115))


def test_parameters_are_the_papers(full):
    assert 4_495_000 <= count(full["params"]) <= 4_505_000
    assert count(full["params"]["spl"]) == 13_340
    assert count(full["params"]["classifier"]) == 115 * (2 * 384 + 1)


def test_teacher_config_builds_this_network(full):
    page = configs.load("teacher")
    assert build.build_model(page, 115) == models.MAKNet(num_classes=115)
    assert shapes(build.build_model(page, 115), page.data.size) == full


def test_layers_of_a_block_are_three_or_six_and_named_as_in_the_paper(full):
    parts = {f"block_{number}" for number in range(4)} | {f"mixpool_{n}" for n in (1, 2, 3)}
    assert set(full["params"]) == parts | {"stem", "classifier", "spl"}
    for number, layers in enumerate((3, 3, 6, 6)):
        block = full["params"][f"block_{number}"]
        inner = {f"{kind}_{layer}" for layer in range(layers) for kind in ("makconv", "norm")}
        assert set(block) == inner | {"transition", "cbam"}


def test_channels_fill_the_tiles_of_an_accelerator(full):
    """Every block passes on a multiple of 64 channels, every layer adds a multiple of 16."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(full["params"]):
        names = [entry.key for entry in path]
        if leaf.ndim == 4 and "places" not in names:
            # A layer's channels come in quarters, one a kernel.
            whole = {"transition": 64}.get(names[1], 4 if "makconv" in names[1] else 16)
            assert leaf.shape[3] % whole == 0, names


def test_no_convolution_has_a_bias(full):
    """BatchNorm follows each: the bias' gradient would be pure noise, which Ranger amplifies."""
    params, kernels = full["params"], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.ndim == 4:
            kernels += 1
            module = params
            for entry in path[:-1]:
                module = module[entry.key]
            assert list(module) == ["kernel"], jax.tree_util.keystr(path)
    assert kernels == 1 + 18 * 4 + 4 * 2  # the stem, MAKConvs, transitions and CBAM's places


def test_bfloat16_activations_leave_logits_statistics_and_parameters_in_float32():
    model = models.build("maknet", 5, dtype=jnp.bfloat16, **TINY)
    images = jnp.zeros((2, 32, 32, 3))

    def run(key):
        variables = model.init(key, images, train=False)
        outputs, updated = model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )
        return variables, outputs, updated

    variables, outputs, updated = jax.eval_shape(run, jax.random.key(0))
    kept = (variables, outputs, updated["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
    inside = updated["intermediates"]
    for name in ("stem", "block_0", "mixpool_1", "block_1"):
        assert inside[name]["__call__"][0].dtype == jnp.bfloat16, name
    inner = jax.tree.leaves({k: v for k, v in inside["block_1"].items() if k != "__call__"})
    assert {leaf.dtype for leaf in inner} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def tiny():
    """A tiny network with dropout, its variables, and images."""
    model = models.build("maknet", 5, dropout_rate=0.5, **ONE_BLOCK)
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    variables = state.create(model, optax.sgd(0.1), size=32, seed=0).variables
    return model, variables, images


def test_prediction_needs_no_randomness_and_starts_with_equal_heads(tiny):
    model, variables, images = tiny
    outputs = model.apply(variables, images, train=False)
    assert outputs.logits.shape == (4, 5) and outputs.features.shape == (4, 32)
    np.testing.assert_array_equal(outputs.logits, outputs.scores_before_spl)  # SPL is an identity
    # The classifier sees the features as they are: nothing is dropped in prediction.
    dense = variables["params"]["classifier"]
    theirs = np.float64(outputs.features) @ np.float64(dense["kernel"]) + dense["bias"]
    np.testing.assert_allclose(outputs.logits, theirs, rtol=1e-4, atol=1e-5)
    alone = model.apply(variables, images[:1], train=False).logits
    np.testing.assert_allclose(alone, outputs.logits[:1], rtol=1e-4, atol=1e-5)


def test_dropout_works_in_training_only(tiny):
    model, variables, images = tiny

    def scores(seed, rate):
        rngs = {"dropout": jax.random.key(seed)}
        changed = model.clone(dropout_rate=rate)
        outputs, _ = changed.apply(variables, images, True, mutable=["batch_stats"], rngs=rngs)
        return outputs

    first, again, other = scores(0, 0.5), scores(0, 0.5), scores(1, 0.5)
    np.testing.assert_array_equal(first.logits, again.logits)
    assert np.abs(first.logits - other.logits).max() > 1e-3
    np.testing.assert_array_equal(first.features, other.features)  # taken before dropout
    np.testing.assert_array_equal(scores(0, 0.0).logits, scores(1, 0.0).logits)


def test_mistakes_in_the_options_are_one_line():
    with pytest.raises(InputError, match="model 'resnet' is unknown: choose one of maknet, vgg16"):
        models.build("resnet", 5)
    with pytest.raises(InputError, match="model maknet: .*'depth'"):
        models.build("maknet", 5, depth=3)
    with pytest.raises(InputError, match=r"blocks \(1,\).* differ in length"):
        shapes(models.build("maknet", 5, **(TINY | {"blocks": (1,)})), 32)
    with pytest.raises(InputError, match="images of 28 x 28 are too small: 4 blocks leave nothing"):
        shapes(models.build("maknet", 5), 28)


def test_lists_as_options_make_the_same_network_as_tuples():
    listed = models.build("maknet", 5, blocks=[3, 3, 6, 6])
    assert listed == models.build("maknet", 5, blocks=(3, 3, 6, 6))
    assert hash(listed) == hash(models.build("maknet", 5))
