"""Networks applied to weights that are not theirs, and scoring without a second trace."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from maknet_jax import models, predict
from maknet_jax.runs import workdir
from maknet_jax.training import checked, state

SMALL = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (8,)}
NORM = ("stem", "norm", "mean")


@pytest.fixture(scope="module")
def network():
    model = models.build("maknet", 3, **SMALL)
    images = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return model, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), dict(shapes)), images


def changed(variables, kind, path, value):
    """A copy of the variables with another array at a path; None removes it."""
    copy = jax.tree.map(lambda leaf: leaf, variables)
    inner = copy[kind]
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner.pop(path[-1], None)
    if value is not None:
        inner[path[-1]] = value
    return copy


def test_the_networks_own_weights_give_its_outputs(network):
    model, variables, images = network
    expected = model.apply(variables, images, train=False).logits
    np.testing.assert_array_equal(checked.apply(model, variables, images).logits, expected)


@pytest.mark.parametrize(
    "kind, path, value",
    [
        ("params", ("stem", "conv", "kernel"), np.ones((7, 7, 3, 4), np.float32)),
        ("params", ("stem", "conv", "kernel"), None),
        ("params", ("more", "kernel"), np.ones(3, np.float32)),
        ("batch_stats", NORM, np.ones(1, np.float32)),  # would be broadcast
        ("batch_stats", NORM, None),
        ("batch_stats", ("stem", "norm", "more"), np.ones(8, np.float32)),
    ],
)
def test_weights_of_another_network_are_refused(network, kind, path, value):
    model, variables, images = network
    with pytest.raises(checked.OtherWeightsError, match="another network"):
        checked.apply(model, changed(variables, kind, path, value), images)


def test_scoring_does_not_trace_the_initialisation(trained, monkeypatch):
    monkeypatch.setattr(state, "shapes", None)  # calling it fails
    run = workdir.open_run(trained)
    image = np.zeros((8, run.size, run.size, 3), np.int16)
    assert run.predict(run.variables, {"image": image})["logits"].shape == (8, len(run.vocabulary))


def test_predict_imports_neither_matplotlib_nor_the_readers_of_records():
    code = f"import sys, {predict.__name__}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "jax" in loaded and not loaded & {"matplotlib", "grain", "jinja2", "tensorflow"}
