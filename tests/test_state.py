"""The training state: arrays only, the same from the same seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maknet_jax import models
from maknet_jax.training import ranger, state

TINY = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (8,)}


@pytest.fixture(scope="module")
def recipe():
    return models.build("maknet", 3, **TINY), ranger.ranger(0.01)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_same_seed_same_parameters(recipe):
    first, again, other = (state.create(*recipe, size=32, seed=seed) for seed in (0, 0, 1))
    for name, leaf in leaves(first).items():
        np.testing.assert_array_equal(leaf, leaves(again)[name])
    kernels = [name for name, leaf in leaves(first.params).items() if leaf.ndim == 4]
    assert len(kernels) == 7
    for name in kernels:
        assert not np.array_equal(leaves(first.params)[name], leaves(other.params)[name])


def test_shapes_are_those_of_create(recipe):
    made, shapes = state.create(*recipe, size=32, seed=0), state.shapes(*recipe, size=32)
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for name, leaf in leaves(made).items():
        expected = leaves(shapes)[name]
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), name


def test_a_new_state_is_at_step_0_with_the_variables_of_the_network(recipe):
    made = state.create(*recipe, size=32, seed=0)
    assert made.step.dtype == jnp.int32 and int(made.step) == 0
    assert made.variables == {"params": made.params, "batch_stats": made.batch_stats}
    model = recipe[0]
    expected = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0)
    )
    assert jax.tree.map(np.shape, made.variables) == jax.tree.map(np.shape, expected)


def test_slow_weights_start_as_the_parameters_in_separate_buffers(recipe):
    """Where they shared one, the step could not donate the state."""
    made = state.create(*recipe, size=32, seed=0)
    slow = made.opt_state[-1].slow
    for name, leaf in leaves(made.params).items():
        np.testing.assert_array_equal(leaf, leaves(slow)[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
    assert len(set(pointers)) == len(pointers)


def test_the_moving_average_is_optional(recipe):
    made = state.create(*recipe, size=32, seed=0)
    assert made.ema == state.shapes(*recipe, size=32).ema == ()


def test_a_moving_average_starts_as_the_network_in_separate_buffers(recipe):
    made = state.create(*recipe, size=32, seed=0, ema=True)
    plain = state.create(*recipe, size=32, seed=0)
    for name, leaf in leaves(plain.variables).items():
        np.testing.assert_array_equal(leaf, leaves(made.ema)[name])
    for name, leaf in leaves(plain).items():
        np.testing.assert_array_equal(leaf, leaves(made)[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
    assert len(set(pointers)) == len(pointers)
    shapes = state.shapes(*recipe, size=32, ema=True)
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for name, leaf in leaves(made).items():
        assert (leaf.shape, leaf.dtype) == (leaves(shapes)[name].shape, leaves(shapes)[name].dtype)


def test_a_moving_average_starts_from_the_weights_that_were_placed(recipe):
    def double(variables):
        return jax.tree.map(lambda leaf: 2 * np.asarray(leaf) + 1, variables)

    made = state.create(*recipe, size=32, seed=0, place=double, ema=True)
    expected = leaves(double(state.create(*recipe, size=32, seed=0).variables))
    for name, leaf in leaves(made.ema).items():
        np.testing.assert_array_equal(leaf, expected[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
    assert len(set(pointers)) == len(pointers)


def test_scoring_uses_the_moving_average(recipe):
    made = state.create(*recipe, size=32, seed=0, ema=True)
    assert made.variables is made.ema
    other = made._replace(ema=())
    assert other.variables == {"params": made.params, "batch_stats": made.batch_stats}


def test_a_network_without_batch_norm_has_empty_statistics():
    from flax import linen as nn

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(2)(images.reshape(len(images), -1))

    assert state.create(Plain(), ranger.ranger(0.01), size=4, seed=0).batch_stats == {}
