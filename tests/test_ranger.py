"""Ranger: golden values of an independent package, then the requirements of training."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maknet_jax.training import ranger as ranger_lib
from maknet_jax.training.ranger import ranger

GOLDEN = pathlib.Path(__file__).parent / "golden" / "ranger.npz"
LEARNING_RATE = 0.01  # as in make_ranger_golden.py
# Measured: at most 8.4e-7 of a tensor's largest element (2.3e-7 with the defaults), rounding.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def golden():
    """Arrays by kind (start, gradients, params, decayed) and name."""
    kinds = {}
    with np.load(GOLDEN) as arrays:
        for key in arrays.files:
            kind, name = key.split("/")
            kinds.setdefault(kind, {})[name] = arrays[key]
    return kinds


@functools.cache
def step_of(optimizer):
    """Returns the jitted step, compiled once per optimiser."""

    @jax.jit
    def step(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def follow(optimizer, golden, steps=60, start=None, opt_state=None, first=0):
    """Returns the parameters after each step, [steps, ...] by name, and the last state."""
    params = golden["start"] if start is None else start
    params = jax.tree.map(jnp.array, params)
    opt_state = jax.jit(optimizer.init)(params) if opt_state is None else opt_state
    step = step_of(optimizer)
    visited = []
    for number in range(first, first + steps):
        gradients = {name: values[number] for name, values in golden["gradients"].items()}
        params, opt_state = step(params, opt_state, gradients)
        visited.append(jax.device_get(params))
    return {name: np.stack([v[name] for v in visited]) for name in params}, opt_state


def distance(ours, theirs):
    """Returns the largest difference of any tensor, relative to that tensor's largest element."""
    return max(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max() for n in theirs)


def test_equals_pytorch_ranger(golden):
    params, _ = follow(ranger(LEARNING_RATE), golden)
    # Step by step, so that the plain (1 to 5), the first rectified (6) and the synchronising
    # (6, 12, ..., 60) steps are all held to the tolerance.
    for number in range(60):
        ours = {name: values[number] for name, values in params.items()}
        theirs = {name: values[number] for name, values in golden["params"].items()}
        assert distance(ours, theirs) < TOLERANCE, f"step {number + 1}"


def test_equals_pytorch_ranger_with_other_options(golden):
    params, _ = follow(ranger(LEARNING_RATE, weight_decay=0.1, k=5, alpha=0.8), golden)
    assert distance(params, golden["decayed"]) < TOLERANCE


def test_optax_radam_takes_other_steps(golden):
    """It adds eps after the bias correction: the steps differ wherever gradients are small."""
    optax_ranger = optax.chain(
        optax.radam(LEARNING_RATE, b1=0.95, b2=0.999, eps=1e-5), ranger_lib.lookahead_slow()
    )
    params, _ = follow(optax_ranger, golden)
    theirs = golden["params"]
    for name, least in {"1e-5": 1.0, "1e-3": 0.02}.items():
        assert distance({name: params[name]}, {name: theirs[name]}) > least


def test_step_sizes_equal_the_formula_in_float64():
    sizes, first = ranger_lib._step_sizes(0.95, 0.999, 5.0)
    assert first == 6
    n_max = 2 / (1 - 0.999) - 1
    for t in (6, 7, 100, 5000):
        b2t = 0.999**t
        n = n_max - 2 * t * b2t / (1 - b2t)
        expected = np.sqrt(
            (1 - b2t) * (n - 4) / (n_max - 4) * (n - 2) / n * n_max / (n_max - 2)
        ) / (1 - 0.95**t)
        assert sizes[t - 1] == pytest.approx(expected, rel=1e-7)
    assert sizes[:5] == pytest.approx([1 / (1 - 0.95**t) for t in range(1, 6)], rel=1e-7)
    # The end of the table is the limit.
    assert sizes[-1] == 1.0


def test_short_averages_are_never_rectified():
    sizes, first = ranger_lib._step_sizes(0.9, 0.5, 5.0)  # N_sma stays below 3
    assert first > 10**9
    assert np.isfinite(sizes).all()


def test_alpha_1_turns_lookahead_off(golden):
    """Identity: alpha 1 takes the fast weights, so that k does not matter."""
    often, _ = follow(ranger(LEARNING_RATE, alpha=1.0, k=2), golden, steps=12)
    never, _ = follow(ranger(LEARNING_RATE, alpha=0.5, k=100), golden, steps=12)
    assert distance(often, never) < TOLERANCE


def test_slow_weights_are_params_after_synchronising(golden):
    params, opt_state = follow(ranger(LEARNING_RATE), golden, steps=12)
    slow = opt_state[-1].slow
    assert int(opt_state[-1].count) == 12
    assert distance({n: params[n][-1] for n in params}, jax.device_get(slow)) < 1e-6


def test_params_stay_a_plain_tree(golden):
    optimizer = ranger(LEARNING_RATE)
    start = golden["start"]
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), start)
    assert jax.tree.structure(updates) == jax.tree.structure(start)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.filterwarnings("error:Some donated buffers")
def test_state_and_params_can_be_donated(golden, jitted):
    """If slow weights and params shared a buffer, the first donated step would fail."""
    optimizer = ranger(LEARNING_RATE)

    def fresh():
        params = jax.tree.map(jnp.array, golden["start"])
        return params, optimizer.init(params)

    params, opt_state = jax.jit(fresh)() if jitted else fresh()
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, opt_state))]
    assert len(set(pointers)) == len(pointers)

    def step(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, donate_argnums=(0, 1))
    for number in range(8):
        donated = params
        gradients = {name: values[number] for name, values in golden["gradients"].items()}
        params, opt_state = step(params, opt_state, gradients)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    theirs = {name: values[7] for name, values in golden["params"].items()}
    assert distance(jax.device_get(params), theirs) < TOLERANCE


def test_schedules_count_updates_from_0(golden):
    # Zero from the fourth update on: counted from 0, so three updates move the weights.
    stopped = ranger(lambda count: jnp.where(count < 3, LEARNING_RATE, 0.0), k=100)
    params, _ = follow(stopped, golden, steps=6)
    theirs = {name: values[:3] for name, values in golden["params"].items()}
    assert distance({name: values[:3] for name, values in params.items()}, theirs) < TOLERANCE
    for values in params.values():
        assert (values[2] == values[5]).all()
        assert (values[1] != values[2]).any()


def test_resumes_bit_for_bit(golden):
    optimizer = ranger(LEARNING_RATE)
    whole, _ = follow(optimizer, golden, steps=20)
    first, opt_state = follow(optimizer, golden, steps=9)  # between two synchronisations
    saved = jax.device_get(({n: first[n][-1] for n in first}, opt_state))
    params, opt_state = jax.tree.map(jnp.asarray, saved)
    resumed, _ = follow(optimizer, golden, steps=11, start=params, opt_state=opt_state, first=9)
    for name in whole:
        assert (whole[name][9:] == resumed[name]).all()


def test_ranger_works_inside_optax_wrappers(golden):
    """Not possible with optax's own lookahead."""
    plain, _ = follow(ranger(LEARNING_RATE), golden, steps=7)
    guarded, _ = follow(optax.apply_if_finite(ranger(LEARNING_RATE), 3), golden, steps=7)
    assert distance(guarded, plain) < 1e-7
    follow(optax.MultiSteps(ranger(LEARNING_RATE), 2), golden, steps=2)


def test_centralisation_is_over_all_axes_but_the_last():
    kernel = np.random.default_rng(0).normal(1.0, size=(3, 3, 4, 5)).astype(np.float32)
    gradients = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(5)}
    centred, _ = ranger_lib.centralize_gradients().update(gradients, optax.EmptyState())
    centred = jax.device_get(centred)
    assert np.abs(centred["kernel"].mean((0, 1, 2))).max() < 1e-6
    assert (centred["bias"] == 1.0).all()
    # The rule for torch's OIHW, on the transposed kernel.
    oihw = kernel.transpose(3, 2, 0, 1)
    expected = (oihw - oihw.mean((1, 2, 3), keepdims=True)).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(centred["kernel"], expected, atol=1e-6)


def test_centralisation_is_off_by_default():
    kernel = {"kernel": jnp.ones((2, 3))}
    for options, moves in (
        ({}, True),
        ({"centralize": False}, True),
        ({"centralize": True}, False),
    ):
        optimizer = ranger(LEARNING_RATE, **options)
        updates, _ = optimizer.update(kernel, optimizer.init(kernel), kernel)
        assert bool(jnp.any(updates["kernel"] != 0)) == moves


@pytest.mark.parametrize("name, value", [("k", 0), ("alpha", 1.5), ("b2", 1.0), ("b1", -0.1)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ranger(LEARNING_RATE, **{name: value})


def test_an_update_without_params_is_refused():
    optimizer = ranger(LEARNING_RATE)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="params"):
        optimizer.update(params, optimizer.init(params))
