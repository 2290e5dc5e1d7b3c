"""MAKNet: its size, its layers and their order, its types, its dropout, its removed forms."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from arrays import drawn, redrawn

from benchmarks.experiments import parts
from maknet_jax import models, train
from maknet_jax.errors import InputError
from maknet_jax.models import layers
from maknet_jax.runs import build, workdir
from maknet_jax.runs import config as configs
from maknet_jax.training import checked, state

TINY = {"stem": 8, "blocks": (1, 1), "growth_rates": (8, 8), "widths": (8, 16)}
ONE_BLOCK = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (16,)}


def shapes(model, size=256):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def full():
    return shapes(models.build("maknet", 115))


def test_parameters_are_the_papers(full):
    assert 4_495_000 <= parameters(full["params"]) <= 4_505_000
    assert parameters(full["params"]["spl"]) == 13_340
    assert parameters(full["params"]["classifier"]) == 115 * (2 * 384 + 1)


def test_teacher_config_builds_this_network(full):
    config = configs.load("teacher")
    assert build.build_model(config, 115) == models.MAKNet(num_classes=115)
    assert shapes(build.build_model(config, 115), config.data.size) == full


def test_layers_of_a_block_are_three_or_six_and_named_as_in_the_paper(full):
    parts = {f"block_{number}" for number in range(4)} | {f"mixpool_{n}" for n in (1, 2, 3)}
    assert set(full["params"]) == parts | {"stem", "classifier", "spl"}
    for number, count in enumerate((3, 3, 6, 6)):
        block = full["params"][f"block_{number}"]
        inner = {f"{kind}_{layer}" for layer in range(count) for kind in ("makconv", "norm")}
        assert set(block) == inner | {"transition", "cbam"}


def test_channels_fill_the_tiles_of_an_accelerator(full):
    """Every block passes on a multiple of 64 channels, every layer adds a multiple of 16."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(full["params"]):
        names = [entry.key for entry in path]
        if leaf.ndim == 4 and "places" not in names:
            # The channels of a MAKConv come in quarters, one per kernel.
            whole = {"transition": 64}.get(names[1], 4 if "makconv" in names[1] else 16)
            assert leaf.shape[3] % whole == 0, names


# What a plain component takes away from the parameters, and what it adds.
PLAIN = {
    "mixpool": ({"mixpool_1"}, set()),
    "cbam": ({"block_0/cbam", "block_1/cbam"}, set()),
    "spl": ({"spl"}, set()),
    "gcp": (set(), set()),
    "makconv": ({"block_0/makconv_0", "block_1/makconv_0"}, {"block_0/conv_0", "block_1/conv_0"}),
}


def modules(params):
    """The names of the parts of a network and, in its blocks, of their layers."""
    names = {name for name in params if not name.startswith("block")}
    return names | {
        f"{name}/{inner}" for name in params if name[:5] == "block" for inner in params[name]
    }


@pytest.mark.parametrize("component", PLAIN)
def test_plain_components_replace_only_themselves(component):
    paper = shapes(models.build("maknet", 5, **TINY), 32)["params"]
    model = models.build("maknet", 5, **TINY, plain=[component])
    plain = shapes(model, 32)["params"]
    gone, new = PLAIN[component]
    assert modules(plain) == (modules(paper) - gone) | new
    features = 16 if component == "gcp" else 32  # means only, or maxima and means
    assert plain["classifier"]["kernel"].shape == (features, 5)
    outputs = jax.eval_shape(
        functools.partial(model.apply, train=False), shapes(model, 32), jnp.zeros((2, 32, 32, 3))
    )
    assert (outputs.scores_before_spl is None) == (component == "spl")


def test_plain_pooling_takes_the_maximum_and_plain_global_pooling_the_mean():
    one = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (16,)}
    images = drawn(2, 32, 32, 3)
    paper, plain = (models.build("maknet", 5, **one, plain=p) for p in ((), ("gcp",)))
    variables = redrawn(paper.init(jax.random.key(0), images, train=False))
    head = variables["params"]["classifier"]
    params = variables["params"] | {"classifier": head | {"kernel": head["kernel"][16:]}}
    means = plain.apply(variables | {"params": params}, images, train=False).features
    both = paper.apply(variables, images, train=False).features
    np.testing.assert_allclose(means, both[:, 16:], rtol=1e-6)
    assert paper.pools_maxima and not plain.pools_maxima and (both[:, :16] >= both[:, 16:]).all()
    mixed = models.build("maknet", 5, **TINY)
    variables = redrawn(mixed.init(jax.random.key(0), images, train=False))
    variables["params"]["mixpool_1"]["share"] = jnp.float32(1.0)  # the maximum only
    maxima = models.build("maknet", 5, **TINY, plain=("mixpool",))
    params = {name: part for name, part in variables["params"].items() if name != "mixpool_1"}
    np.testing.assert_allclose(
        maxima.apply(variables | {"params": params}, images, train=False).logits,
        mixed.apply(variables, images, train=False).logits,
        rtol=1e-5,
    )


@pytest.mark.parametrize("growth_rate", [16, 6, 2])  # 6: kernels of two and one; 2: two kernels
def test_joined_kernels_predict_the_same(growth_rate):
    options = {"stem": 8, "blocks": (2,), "growth_rates": (growth_rate,), "widths": (16,)}
    network = models.build("maknet", 5, **options, form="matmul")
    images = drawn(2, 32, 32, 3)
    variables = redrawn(network.init(jax.random.key(0), images, train=False))
    variables = jax.tree.map(np.asarray, variables)
    joined = variables | {"params": network.for_prediction(variables["params"])}
    assert set(joined["params"]["block_0"]["makconv_1"]) == {layers.JOINED}
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (variables, joined)]
    assert sizes[0] == sizes[1]
    expected = network.apply(variables, images, train=False)
    np.testing.assert_array_equal(
        checked.apply(network, joined, images).logits, np.asarray(expected.logits)
    )
    for other in (network.clone(form="fused"), network.clone(plain=("makconv",))):
        assert other.for_prediction(variables["params"]) is variables["params"]
    wrong = {layers.JOINED: np.zeros((7, 16), np.float32)}
    joined["params"]["block_0"]["makconv_1"] = wrong
    with pytest.raises(checked.OtherWeightsError, match=layers.JOINED):
        checked.apply(network, joined, images)


def test_full_kernels_with_fewer_channels_have_as_many_parameters():
    """The comparison of benchmarks/experiments/parts.py."""
    _, options = parts.VARIANTS["maknet-full-kernels"]
    paper, full = (models.build("maknet", 7, **o) for o in ({}, options))
    counts = [parameters(shapes(model)["params"]) for model in (paper, full)]
    assert abs(counts[1] - counts[0]) < 0.001 * counts[0]


def test_an_unknown_plain_component_is_rejected():
    with pytest.raises(InputError, match="mixpol"):
        shapes(models.build("maknet", 5, **TINY, plain=("mixpol",)), 32)


def test_no_convolution_has_a_bias(full):
    """BatchNorm follows each: the gradient of a bias would be noise, which Ranger amplifies."""
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
    float32 = (variables, outputs, updated["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves(float32)} == {jnp.dtype(jnp.float32)}
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


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_the_network_is_its_layers_in_order(share):
    """Stem at a quarter of the size, Mish, blocks with MixPool between them, GCP, two heads."""
    model, images = models.build("maknet", 5, **TINY), jnp.abs(drawn(2, 32, 32, 3))
    variables = redrawn(shapes(model, 32), by_fan_in=True)
    params, stats = variables["params"], variables["batch_stats"]
    params["mixpool_1"]["share"] = jnp.float32(share)

    def apply(module, x, name, *args):
        layer_variables = {"params": params.get(name, {}), "batch_stats": stats.get(name, {})}
        return module.apply(layer_variables, x, *args)

    x = apply(layers.InputNorm(), images, "input")
    x = layers.mish(apply(layers.ConvNorm(8, (7, 7), 4), x, "stem", False))
    maps = [x]
    assert x.shape == (2, 8, 8, 8)
    x = apply(layers.DenseBlock(1, 8, 8), x, "block_0", False)
    maps.append(x)
    x = apply(layers.MixPool(), x, "mixpool_1")
    x = apply(layers.DenseBlock(1, 8, 16), x, "block_1", False)
    maps.append(x)
    outputs = model.apply(variables, images, train=False)
    expected = layers.global_concat_pool(x)
    np.testing.assert_allclose(outputs.features, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(model.apply(variables, images, False, stages=True), maps, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    fixed = model.clone(mixpool_learned=False)
    del params["mixpool_1"]
    pooled = layers.MixPool(learned=False).apply({}, maps[1])
    expected = layers.global_concat_pool(
        apply(layers.DenseBlock(1, 8, 16), pooled, "block_1", False)
    )
    ours = fixed.apply(variables, images, train=False).features
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("resnet", {}, "'resnet'.* maknet, vgg16"),
        ("maknet", {"depth": 3}, "maknet.*'depth'"),
        ("maknet", {"dropout_rate": 1.0}, r"dropout_rate 1\.0"),
    ],
)
def test_unknown_networks_and_options_are_named(name, options, named):
    with pytest.raises(InputError, match=named):
        models.build(name, 5, **options)


def test_options_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"blocks \(1,\).* \(8, 8\)"):
        shapes(models.build("maknet", 5, **(TINY | {"blocks": (1,)})), 32)
    with pytest.raises(InputError, match="28 x 28 .* 4 blocks"):
        shapes(models.build("maknet", 5), 28)


def test_lists_as_options_make_the_same_network_as_tuples():
    listed = models.build("maknet", 5, blocks=[3, 3, 6, 6])
    assert listed == models.build("maknet", 5, blocks=(3, 3, 6, 6))
    assert hash(listed) == hash(models.build("maknet", 5))


@pytest.mark.parametrize("old, new", [("wide", "split"), ("wide_fused", "fused")])
def test_a_removed_form_builds_its_equal_with_a_warning(old, new):
    with pytest.warns(UserWarning, match=f"'{old}'.*'{new}'"):
        assert models.build("maknet", 5, form=old) == models.build("maknet", 5, form=new)
    with pytest.warns(UserWarning, match=f"'{old}'.*'{new}'"):
        trunk = models.build("lesanet", 5, trunk="maknet", trunk_options={"form": old})
    assert trunk == models.build("lesanet", 5, trunk="maknet", trunk_options={"form": new})


def test_a_run_of_a_removed_form_opens_and_resumes(tmp_path):
    data, folder = toy.write(tmp_path / "data"), tmp_path / "run"
    config = toy.config(data, "smoke", {"model.options.form": "split", "epochs": 0.4})
    train.train(config, folder)
    batch = {"image": np.stack([toy.example("val", number).image for number in range(8)])}
    expected = np.asarray(workdir.open_run(folder).score(batch))
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written["model"]["options"]["form"] = "wide"
    path.write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="'wide'"):
        logits = workdir.open_run(folder).score(batch)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    old = toy.config(data, "smoke", {"model.options.form": "wide", "epochs": 0.4})
    with pytest.warns(UserWarning, match="'wide'"):
        assert train.train(old, folder)["steps"] == 2
    assert json.loads(path.read_text()) == written
