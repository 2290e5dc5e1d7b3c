"""SGD against torch's rules, slow and frozen trunks, LesaNet and fine-tuning through `train`."""

import json

import jax
import jax.numpy as jnp
import lesion_runs
import ml_collections
import numpy as np
import optax
import pytest
import toy

from maknet_jax import models, train
from maknet_jax.errors import InputError
from maknet_jax.runs import build, workdir
from maknet_jax.runs import config as configs
from maknet_jax.training import sgd, transfer

PARAMS = {
    "stage": {"kernel": jnp.float32([1.0, -2.0]), "bias": jnp.float32([0.5])},
    "roi_1": {"kernel": jnp.float32([3.0]), "bias": jnp.float32([1.0])},
}


def steps(optimizer, gradients, params=PARAMS):
    opt_state = optimizer.init(params)
    for gradient in gradients:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def scaled(factor):
    return jax.tree.map(lambda leaf: factor * jnp.ones_like(leaf), PARAMS)


def test_sgd_is_torchs_with_lesanets_groups():
    """v = 0.9 v + g + decay w, w -= rate v; biases at twice the rate and without decay."""
    result = steps(sgd.sgd(0.1, weight_decay=0.2), [scaled(1.0), scaled(-0.5), scaled(2.0)])
    for layer, params in PARAMS.items():
        for name, leaf in params.items():
            w, v = np.float64(leaf), 0.0
            for gradient in (1.0, -0.5, 2.0):
                v = 0.9 * v + gradient + (0.2 * w if name == "kernel" else 0)
                w = w - (0.2 if name == "bias" else 0.1) * v
            np.testing.assert_allclose(result[layer][name], w, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    large = steps(sgd.sgd(1.0, weight_decay=0.0, bias_rate=1.0), [scaled(100.0)])
    moved = jax.tree.map(lambda a, b: a - b, PARAMS, large)
    assert float(optax.tree.norm(moved)) == pytest.approx(10.0, rel=1e-6)
    small = steps(sgd.sgd(1.0, weight_decay=0.0, bias_rate=1.0), [scaled(1.0)])
    np.testing.assert_allclose(PARAMS["roi_1"]["kernel"] - small["roi_1"]["kernel"], 1.0)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_trunk_rate_multiplies_the_trunks_updates_only(rate):
    whole = steps(sgd.sgd(0.1), [scaled(1.0)])
    result = steps(sgd.sgd(0.1, trunk_rate=rate), [scaled(1.0)])
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(result["roi_1"][name], whole["roi_1"][name])
        start = PARAMS["stage"][name]
        np.testing.assert_allclose(
            result["stage"][name] - start, rate * (whole["stage"][name] - start), atol=1e-6
        )


def of_page(name, data, **changes):
    """A page in tiny: MAKNet in four small blocks, on `data`."""
    page = configs.load(name).to_dict()
    page["model"] = {"name": "lesanet" if name == "lesanet" else "maknet"}
    page["model"]["options"] = toy_options(name)
    page = ml_collections.ConfigDict(page)
    values = {
        "data.path": str(data),
        "data.size": toy.SIZE,
        "data.batch_size": 8,
        "epochs": 4.0,
        "evaluate_every": 2.0,
        "checkpoint_every": 100,
        "log_every": 5,
    }
    with page.unlocked():
        for key, value in (values | changes).items():
            *parents, last = key.split(".")
            node = page
            for part in parents:
                node = node[part]
            node[last] = value
    return page.lock()


TRUNK = {"stem": 8, "blocks": (1, 1), "growth_rates": (8, 8), "widths": (8, 8)}


def toy_options(name):
    if name == "lesanet":
        return {"trunk": "maknet", "trunk_options": TRUNK, "units": 16, "embedding": 16}
    return TRUNK | {"dropout_rate": 0.0}


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """The workdir of a toy MAKNet that fine-tuning starts from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train.train(of_page("finetune", data, **{"optimizer.trunk_rate": 1.0, "epochs": 2.0}), folder)
    return folder


def last(folder):
    config = configs.from_json(json.loads((folder / "config.json").read_text()))
    run = workdir.open_run(folder, checkpoint_name="last")
    return config, run.variables


def test_the_schedule_drops_once_and_stays(data):
    page = of_page(
        "finetune",
        data,
        **{"optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0, "optimizer.decay_from": 0.5},
    )
    optimizer = build.build_optimizer(page, 10)
    params, sizes = PARAMS, []
    opt_state = optimizer.init(params)
    for _ in range(10):
        updates, opt_state = optimizer.update(scaled(1.0), opt_state, params)
        sizes.append(-float(updates["roi_1"]["kernel"][0]))
    np.testing.assert_allclose(sizes, [0.01] * 5 + [0.001] * 5, rtol=1e-6)


def test_a_frozen_trunk_is_bit_for_bit_that_of_the_base(data, base, tmp_path):
    changes = {"optimizer.trunk_rate": 0.0, "init.path": str(base)}
    summary = train.train(of_page("finetune", data, **changes), tmp_path / "frozen")
    assert summary["init"]["fresh"] == ["classifier", "spl"]
    (_, before), (_, after) = last(base), last(tmp_path / "frozen")
    best = workdir.open_weights(base)
    source = {"params": best[0], "batch_stats": best[1]}
    for kind in ("params", "batch_stats"):
        for layer, leaves in source[kind].items():
            same = all(
                np.array_equal(a, b)
                for a, b in zip(*map(jax.tree.leaves, (leaves, after[kind][layer])), strict=True)
            )
            assert same == (layer not in transfer.HEAD), layer
    assert before.keys() == after.keys()
    train.train(
        of_page("finetune", data, **changes | {"optimizer.trunk_rate": 0.1}), tmp_path / "slow"
    )
    kernel = last(tmp_path / "slow")[1]["params"]["stem"]["conv"]["kernel"]
    assert not np.array_equal(kernel, source["params"]["stem"]["conv"]["kernel"])


@pytest.mark.parametrize(
    "page, changes, says",
    [
        ("lesanet", {}, "box .*--lesions`"),
        ("lesanet", {"augment.crop_probability": 0.5}, "lesanet .*augment.crop_probability"),
        ("lesanet", {"augment.translation_probability": 0.5}, "augment.translation_probability"),
        ("finetune", {"optimizer.trunk_rate": 2.0}, r"trunk_rate 2\.0 "),
        ("finetune", {"optimizer.clip": 0.0}, r"clip 0\.0 "),
    ],
)
def test_invalid_configs_are_refused_before_anything_is_written(
    data, tmp_path, page, changes, says
):
    with pytest.raises(InputError, match=says):
        train.train(of_page(page, data, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lesanet_starts_from_imported_weights_of_vgg16(phantom, tmp_path, monkeypatch):
    """LesaNet's own code keeps them in a dict that nothing reads."""
    model = models.build("vgg16", 1)
    like = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    source = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), dict(like))
    del source["params"]["classifier"]
    weights = tmp_path / "vgg16.safetensors"
    transfer.write(weights, source["params"], source["batch_stats"], {"model": "vgg16"})
    runs = []
    monkeypatch.setattr(train._Loop, "run", lambda loop: runs.append(loop.setup))
    data = lesion_runs.write(phantom, tmp_path / "data", 32)
    page = configs.load(
        "lesanet",
        [f"data.path={data}", "data.size=32", "data.batch_size=8", f"init.path={weights}"],
    )
    train.train(page, tmp_path / "run")
    created = runs[0].assembly.create(0, runs[0].place)
    for kind in ("params", "batch_stats"):
        for layer, leaves in source[kind].items():
            for a, b in zip(
                *map(jax.tree.leaves, (leaves, getattr(created, kind)[layer])), strict=True
            ):
                np.testing.assert_array_equal(a, b)
    assert "stage1_0" in source["params"] and "input" in source["batch_stats"]
