"""LesaNet: ROI max pooling against a loop over boxes, its trunks, its scales and its heads."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import dense, redrawn, trained_parts

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.models import lesanet
from maknet_jax.training import transfer

TINY = {"stem": 8, "blocks": (1,) * 4, "growth_rates": (8,) * 4, "widths": (8,) * 4}
BOXES = np.float32([[40, 52, 80, 68], [0, 0, 120, 120], [57.5, 58.5, 61.2, 63.9], [100, 3, 119, 9]])


def loop_pool(x, box, scale, bins=5):
    """Fast R-CNN's operator on one box, in loops: (maxima, positions of the maxima)."""
    height, width, channels = x.shape
    left, top, right, bottom = (math.floor(v * scale + 0.5) for v in box)
    high, wide = max(bottom - top + 1, 1), max(right - left + 1, 1)
    out, places = np.zeros((bins, bins, channels)), {}
    for row in range(bins):
        for column in range(bins):
            rows = [
                max(math.floor(row * high / bins) + top, 0),
                min(math.ceil((row + 1) * high / bins) + top, height),
            ]
            columns = [
                max(math.floor(column * wide / bins) + left, 0),
                min(math.ceil((column + 1) * wide / bins) + left, width),
            ]
            for c in range(channels):
                best = None
                for y in range(*rows):
                    for z in range(*columns):
                        if best is None or x[y, z, c] > x[best]:
                            best = (y, z, c)
                if best is not None:
                    out[row, column, c], places[row, column, c] = x[best], best
    return out, places


@pytest.mark.parametrize("edge, scale", [(120, 1.0), (30, 0.25), (7, 0.0625)])
def test_roi_pooling_and_its_gradient_are_those_of_a_loop(edge, scale):
    rng = np.random.default_rng(edge)
    x = rng.normal(size=(len(BOXES), edge, edge, 2)).astype(np.float32)
    cotangent = rng.normal(size=(len(BOXES), 5, 5, 2)).astype(np.float32)
    pooled, vjp = jax.vjp(lambda x: lesanet.roi_max_pool(x, BOXES, scale), x)
    (gradient,) = vjp(jnp.asarray(cotangent))
    for number, box in enumerate(BOXES):
        out, places = loop_pool(x[number], box, scale)
        np.testing.assert_array_equal(pooled[number], out.astype(np.float32))
        theirs = np.zeros(x.shape[1:])
        for where, place in places.items():
            theirs[place] += cotangent[number][where]
        np.testing.assert_allclose(gradient[number], theirs, rtol=1e-6, atol=1e-6)


def test_a_box_of_one_pixel_is_that_pixel_and_parts_beyond_the_map_are_0():
    x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(lesanet.roi_max_pool(x, np.float32([[2, 1, 2, 1]]), 1.0), 7.0)
    half = np.asarray(lesanet.roi_max_pool(x, np.float32([[0, 0, 3, 9]]), 1.0))[0, :, :, 0]
    assert (half[2:] == 0).all() and (half[:2] > 0).all()  # rows 0 to 9, of which the map has 4
    boxed = jax.grad(lambda x: lesanet.roi_max_pool(x, np.float32([[9, 9, 12, 12]]), 1.0).sum())(x)
    np.testing.assert_array_equal(boxed, 0)


OPTIONS = {"trunk": "maknet", "trunk_options": TINY, "units": 16, "embedding": 8}


@functools.cache
def tiny(frozen=False, size=64):
    """A LesaNet on a tiny MAKNet, its variables, all of them drawn, and its jitted prediction."""
    model = models.build("lesanet", 5, frozen=frozen, **OPTIONS)
    images = jnp.zeros((1, size, size, 3))
    variables = redrawn(
        jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0)),
        by_fan_in=True,
    )
    predict = jax.jit(lambda v, x, box: model.apply(v, x, train=False, box=box))
    return model, variables, predict


def test_the_outputs_are_scores_and_an_embedding_of_length_1():
    _, variables, predict = tiny()
    images = jax.random.uniform(jax.random.key(1), (3, 64, 64, 3))
    boxes = np.float32([[20, 20, 40, 44]] * 3)
    outputs = predict(variables, images, boxes)
    assert outputs.logits.shape == (3, 5) and outputs.features.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(outputs.features, axis=1), 1, rtol=1e-5)
    other = predict(variables, images, boxes + 5)
    assert np.abs(other.logits - outputs.logits).max() > 1e-3
    whole = predict(variables, images, np.float32([[0, 0, 64, 64]] * 3))
    np.testing.assert_array_equal(predict(variables, images, None).logits, whole.logits)


def test_a_new_network_has_equal_heads():
    model = models.build("lesanet", 5, **OPTIONS)
    images = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3))
    outputs, _ = jax.jit(lambda key: model.init_with_output(key, images, train=False))(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(outputs.logits, outputs.scores_before_spl)  # SPL is an identity


def test_three_of_five_scales_see_the_lesion_and_two_the_whole_patch():
    """At 120 pixels, as the configs have it: maps of 30, 30, 15, 7 and 3."""
    _, variables, predict = tiny(size=120)
    images = jax.random.uniform(jax.random.key(1), (2, 120, 120, 3))
    boxes = np.float32([[20, 30, 70, 66], [57, 3, 61, 119]])
    outputs = predict(variables, images, boxes)
    params = variables["params"]
    trunk = models.build("maknet", 5, **TINY)
    variables = {
        "params": {name: part for name, part in params.items() if not name.startswith("roi_")},
        "batch_stats": variables["batch_stats"],
    }
    maps = trunk.apply(variables, images, False, stages=True)
    units = []
    for number, (x, scale) in enumerate(zip(maps, (4, 4, 8, 16, 32), strict=True), 1):
        pooled = [
            loop_pool(np.asarray(image), box if number <= 3 else (0, 0, 120, 120), 1 / scale)[0]
            for image, box in zip(x, boxes, strict=True)
        ]
        units.append(dense(np.reshape(pooled, (2, -1)), params[f"roi_{number}"]))
    x = np.concatenate(units, axis=1)
    scores = dense(x, params["classifier"])
    np.testing.assert_allclose(outputs.scores_before_spl, scores, rtol=1e-4, atol=1e-4)
    embedding = dense(x, params["embedding"])
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(outputs.features, embedding, rtol=1e-4, atol=1e-4)


def test_a_frozen_trunk_has_no_gradient_and_keeps_its_statistics():
    model, variables, _ = tiny(frozen=True)
    images = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3))

    assert trained_parts(model, variables, images) == {
        "roi_1",
        "roi_2",
        "roi_3",
        "roi_4",
        "roi_5",
        "classifier",
        "spl",
    }


@pytest.mark.parametrize("trunk", ["vgg16", "resnet18", "maknet"])
def test_every_weight_of_a_trunk_is_placed(trunk):
    def shapes(name, **options):
        model = models.build(name, 4, **options)
        images = jnp.zeros((1, 120, 120, 3))
        return jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))

    alone, whole = shapes(trunk), shapes("lesanet", trunk=trunk)
    sevens = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), alone)
    placed, names, fresh = transfer.place(whole, **sevens, head=False)
    heads = {"classifier", "spl", "embedding", *(f"roi_{k}" for k in range(1, 6))}
    assert {name.split("/")[1] for name in fresh} == heads
    trunks = set(alone["params"]) - {"classifier", "spl"}
    assert {name.split("/")[1] for name in names if name.startswith("params")} == trunks
    kernel = jax.tree.leaves({k: placed["params"][k] for k in trunks})[0]
    np.testing.assert_array_equal(kernel, 7)
    if trunk == "vgg16":
        assert [whole["params"][f"roi_{k}"]["kernel"].shape for k in range(1, 6)] == [
            (25 * channels, 256) for channels in (64, 128, 256, 512, 512)
        ]


@pytest.mark.parametrize(
    "options, named",
    [
        ({"trunk": "vgg16", "trunk_options": {"blocks": (1,)}}, "vgg16.*'blocks'"),
        ({"trunk": "alexnet"}, "'alexnet'.* vgg16, resnet18"),
    ],
)
def test_an_unknown_trunk_or_option_is_named(options, named):
    model = models.build("lesanet", 4, **options)
    with pytest.raises(InputError, match=named):
        model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
