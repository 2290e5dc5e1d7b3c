"""Integrated Gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.errors import InputError
from maknet_jax.training import sharding

SHAPE = (6, 8, 3)
LABELS = 4


def linear(variables, images):
    return jnp.einsum("bhwc,hwck->bk", images, variables)


def curved(variables, images):
    """Two smooth layers, like a small trained network."""
    hidden = jnp.tanh(jnp.einsum("bhwc,hwck->bk", images, variables[0]))
    return hidden @ variables[1]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(*SHAPE, LABELS)).astype(np.float32)
    images = rng.random((8, *SHAPE), np.float32)
    baseline = rng.random((8, *SHAPE), np.float32) * 0.2
    targets = rng.integers(LABELS, size=(8, 3))
    head = rng.normal(size=(LABELS, LABELS)).astype(np.float32)
    return {
        "linear": Partial(linear, weights),
        "curved": Partial(curved, (weights * 0.2, head)),
        "weights": weights,
        "images": images,
        "baseline": baseline,
        "targets": targets,
    }


@pytest.mark.parametrize("method", ig.METHODS)
def test_weights_sum_to_1_and_integrate_a_line(method):
    for steps in (1, 2, 7, 50):
        places, weights = ig.quadrature(method, steps)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert places.min() >= 0 and places.max() <= 1
        if method != "right":  # whose error falls with 1 / steps
            assert weights @ places == pytest.approx(0.5, abs=1e-12)


def test_quadrature_errors_on_a_cubic():
    # d/dx x**4 integrates to 1 over [0, 1].
    errors = {}
    for method in ig.METHODS:
        places, weights = ig.quadrature(method, 50)
        errors[method] = abs(weights @ (4 * places**3) - 1)
    assert 0.01 < errors["right"] < 0.05
    assert errors["trapezoid"] < 1e-3
    assert errors["midpoint"] < errors["trapezoid"]
    assert errors["gauss"] < 1e-9


@pytest.mark.parametrize("method", ig.METHODS)
def test_a_linear_model_gives_weight_times_change_exactly(case, method):
    result = ig.integrated_gradients(
        case["linear"],
        case["images"],
        case["targets"],
        case["baseline"],
        steps=5,
        method=method,
        output="logit",
    )
    change = (case["images"] - case["baseline"])[:, None]
    expected = change * np.moveaxis(case["weights"], -1, 0)[case["targets"]]
    np.testing.assert_allclose(result.maps, expected, rtol=1e-5, atol=1e-6)
    assert not result.flagged.any()
    assert np.abs(result.residual).max() < 1e-4


@pytest.mark.parametrize("output", ig.OUTPUTS)
def test_maps_of_a_network_are_complete(case, output):
    result = ig.integrated_gradients(
        case["curved"], case["images"], case["targets"], case["baseline"], steps=50, output=output
    )
    sums = result.maps.sum(axis=(2, 3, 4))
    np.testing.assert_allclose(sums - result.residual, result.end - result.start, atol=1e-5)
    logits = np.asarray(case["curved"](case["images"]))
    expected = np.take_along_axis(logits, case["targets"], 1)
    expected = 1 / (1 + np.exp(-expected)) if output == "probability" else expected
    np.testing.assert_allclose(result.end, expected, atol=1e-5)
    assert not result.flagged.any()


def test_incomplete_maps_are_flagged(case):
    arguments = case["curved"], case["images"], case["targets"], case["baseline"]
    result = ig.integrated_gradients(*arguments, steps=1, method="right", output="logit")
    change = np.abs(result.end - result.start)
    expected = np.abs(result.residual) / np.maximum(change, ig.FLOORS["logit"])
    np.testing.assert_allclose(result.relative, expected, rtol=1e-6)
    np.testing.assert_array_equal(result.flagged, expected > ig.TOLERANCE)
    assert result.flagged.any()
    loose = ig.integrated_gradients(
        *arguments, steps=1, method="right", output="logit", tolerance=1e9
    )
    assert not loose.flagged.any()


def test_refining_equals_the_trapezoid_of_more_steps(case):
    arguments = case["curved"], case["images"], case["targets"], case["baseline"]
    coarse = ig.integrated_gradients(*arguments, steps=2, output="logit")
    again = coarse.flagged.any(axis=1)
    assert again.any() and not again.all()
    once = ig.integrated_gradients(*arguments, steps=2, output="logit", refine=1)
    finer = ig.integrated_gradients(*arguments, steps=4, output="logit")
    np.testing.assert_allclose(once.maps[again], finer.maps[again], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(once.maps[~again], coarse.maps[~again])
    assert not ig.integrated_gradients(*arguments, steps=2, output="logit", refine=6).flagged.any()


def test_a_constant_output_is_divided_by_the_floor():
    constant = Partial(lambda images: jnp.zeros((len(images), 2)) + 0 * images.sum())
    images = np.ones((1, *SHAPE), np.float32)
    result = ig.integrated_gradients(constant, images, np.array([[0]]), 0.0)
    assert result.relative[0, 0] == 0 and not result.flagged.any()


@pytest.mark.parametrize("chunk", (1, 3, 7, 50, 51, 1000))
def test_maps_do_not_depend_on_the_chunk(case, chunk):
    arguments = case["curved"], case["images"], case["targets"], case["baseline"]
    a = ig.integrated_gradients(*arguments, chunk=chunk)
    b = ig.integrated_gradients(*arguments, chunk=None)
    np.testing.assert_allclose(a.maps, b.maps, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ("numpy", "split"))
def test_maps_do_not_depend_on_the_rows(case, kind, monkeypatch):
    network, images, baseline = case["curved"], case["images"], case["baseline"]
    options = {"steps": 3, "output": "logit", "refine": 2}
    targets = np.tile(case["targets"], (3, 1))
    images, baseline = (np.concatenate([x, x / 2, x[::-1]]) for x in (images, baseline))
    whole = ig.integrated_gradients(network, images, targets, baseline, **options)
    rows = 5
    if kind == "split":
        mesh = sharding.data_mesh()
        network = Partial(curved, sharding.put_state(mesh, network.args[0]))
        put = sharding.put_batch(mesh, {"x": images, "b": baseline})
        images, baseline, rows = put["x"], put["b"], 16
    shapes, original = [], ig._path_gradients
    monkeypatch.setattr(
        ig,
        "_path_gradients",
        lambda *args: shapes.append(args[1].shape[0]) or original(*args),
    )
    attributions = ig.integrated_gradients(network, images, targets, baseline, rows=rows, **options)
    assert max(shapes) == rows
    shapes.clear()
    monkeypatch.setattr(ig, "CPU_BUDGET", 1)  # smaller than one node of one image
    result = ig.integrated_gradients(network, images, targets, baseline, **options)
    assert set(shapes) == {8 if kind == "split" else 1}
    for name in ("maps", "start", "end", "residual"):
        for other in (attributions, result):
            np.testing.assert_allclose(
                getattr(other, name), getattr(whole, name), rtol=1e-4, atol=1e-5
            )


def test_images_are_split_only_if_they_do_not_fit(case):
    network, images = case["curved"], np.zeros((9, *SHAPE), np.float32)
    assert ig.fit(network, images, 2, budget=1 << 30)[1] == 9
    assert ig.fit(network, images, 2, budget=1) == (1, 1)
    one = next(b for b in range(1 << 8, 1 << 16, 64) if ig.fit(network, images, 2, budget=b)[1] > 1)
    assert ig.fit(network, images, 2, budget=4 * one)[1] in (5, 9)  # 5 + 4 rather than 8 + 1
    chunk, rows = ig.fit(network, images, 2, budget=64 * one)
    assert rows == 9 and 7 <= chunk <= 15


def test_several_labels_equal_one_by_one(case):
    together = ig.integrated_gradients(
        case["curved"], case["images"], case["targets"], case["baseline"]
    )
    for column in range(case["targets"].shape[1]):
        one = case["targets"][:, [column]]
        alone = ig.integrated_gradients(case["curved"], case["images"], one, case["baseline"])
        np.testing.assert_allclose(together.maps[:, column], alone.maps[:, 0], rtol=1e-4, atol=1e-7)


def test_several_labels_share_their_forward_passes(case):
    calls = []

    def counted(images):
        jax.debug.callback(lambda: calls.append(1))
        return curved(tuple(case["curved"].args[0]), images)

    def forwards(targets):
        calls.clear()
        ig.integrated_gradients(counted, case["images"], targets, 0.0, chunk=10)
        jax.effects_barrier()
        return len(calls)

    assert forwards(case["targets"]) == forwards(case["targets"][:, :1]) > 0


def test_1_device_equals_8_devices(case):
    assert jax.device_count() == 8
    mesh = sharding.data_mesh()
    put = sharding.put_batch(mesh, {"x": case["images"], "b": case["baseline"]})
    network = Partial(curved, sharding.put_state(mesh, case["curved"].args[0]))
    one = ig.integrated_gradients(
        case["curved"], case["images"], case["targets"], case["baseline"], chunk=5
    )
    many = ig.integrated_gradients(network, put["x"], case["targets"], put["b"], chunk=5)
    np.testing.assert_allclose(one.maps, many.maps, rtol=1e-4, atol=1e-7)
    gradients = ig._path_gradients(
        network,
        put["x"],
        put["b"],
        case["targets"].astype(np.int32),
        np.ones(2, np.float32),
        np.ones(2, np.float32),
        "logit",
    )
    assert gradients.sharding.shard_shape(gradients.shape)[0] == 1  # the batch stays sharded


def test_weights_are_arguments_of_one_compiled_program(case):
    ig._path_gradients.clear_cache()
    for shift in (0.0, 0.1):
        network = Partial(curved, jax.tree.map(lambda w, s=shift: w + s, case["curved"].args[0]))
        ig.integrated_gradients(network, case["images"], case["targets"], 0.0, chunk=5)
    assert ig._path_gradients._cache_size() == 1


def test_the_chunk_fits_the_budget(case):
    network = case["curved"]
    small = ig.fit(network, case["images"], 1, budget=1 << 16)[0]
    large = ig.fit(network, case["images"], 1, budget=1 << 22)[0]
    assert 1 <= small < large
    assert ig.fit(network, case["images"], 1, budget=1)[0] == 1
    assert ig.fit(network, case["images"], 5, budget=1 << 22)[0] < large
    # XLA's own estimate is of the size that the shapes predict.
    images = jnp.asarray(case["images"])
    lowered = ig._path_gradients.lower(
        network,
        images,
        images,
        case["targets"][:, :1].astype(np.int32),
        np.ones(large, np.float32),
        np.ones(large, np.float32),
        "probability",
    )
    needed = lowered.compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 << 22


def test_a_flax_module_is_explained():
    from maknet_jax.models.linear import Linear

    model = Linear(num_classes=3, edge=2)
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    logit_fn = Partial(lambda v, x: model.apply(v, x, train=False).logits, variables)
    result = ig.integrated_gradients(logit_fn, images, np.array([[0, 2], [1, 1]]), 0.0)
    assert result.maps.shape == (2, 2, 8, 8, 3) and not result.flagged.any()


@pytest.mark.parametrize(
    "change, expected_text",
    [
        ({"method": "simpson"}, "'simpson'"),
        ({"steps": 0}, "0 steps"),
        ({"output": "loss"}, "'loss'"),
        ({"chunk": 0}, "chunk 0"),
        ({"refine": -1}, "refine -1"),
        ({"refine": 1, "method": "gauss"}, "refine 1"),
        ({"rows": 0}, "rows 0"),
        ({"baseline": np.zeros((3, *SHAPE))}, "baseline of shape"),
        ({"targets": np.array([[4]] * 8)}, "0 to 3"),
        ({"targets": np.array([[-1]] * 8)}, "0 to 3"),
        ({"targets": np.array([0] * 8)}, "targets of shape"),
        ({"targets": np.array([[0]])}, "targets of shape"),
        ({"targets": np.array([[0.5]] * 8)}, "targets of shape"),
    ],
)
def test_invalid_arguments_are_refused(case, change, expected_text):
    arguments = {"targets": case["targets"], "baseline": 0.0} | change
    call = functools.partial(ig.integrated_gradients, case["curved"], case["images"], **arguments)
    with pytest.raises(InputError, match=expected_text):
        call()


def test_doublings_chunks_and_groups_of_images_share_one_program(case):
    for program in (ig._path_gradients, ig._outputs):
        program.clear_cache()
    images = np.concatenate([case["images"], case["images"][:1] / 2])
    targets = np.concatenate([case["targets"], case["targets"][:1]])
    options = {"steps": 3, "output": "logit", "refine": 3, "tolerance": 0.0}
    result = ig.integrated_gradients(
        case["curved"], images, targets, 0.0, rows=2, chunk=3, **options
    )
    assert len(images) % 2 and len(result.maps) == len(images)
    assert ig._path_gradients._cache_size() == ig._outputs._cache_size() == 1
    whole = ig.integrated_gradients(case["curved"], images, targets, 0.0, chunk=50, **options)
    np.testing.assert_allclose(result.maps, whole.maps, rtol=1e-4, atol=1e-6)
