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
    created, shapes = state.create(*recipe, size=32, seed=0), state.shapes(*recipe, size=32)
    assert jax.tree.structure(created) == jax.tree.structure(shapes)
    for name, leaf in leaves(created).items():
        expected = leaves(shapes)[name]
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), name


def test_a_new_state_is_at_step_0_with_the_variables_of_the_network(recipe):
    created = state.create(*recipe, size=32, seed=0)
    assert created.step.dtype == jnp.int32 and int(created.step) == 0
    assert created.variables == {"params": created.params, "batch_stats": created.batch_stats}
    model = recipe[0]
    expected = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0)
    )
    assert jax.tree.map(np.shape, created.variables) == jax.tree.map(np.shape, expected)


def test_slow_weights_start_as_the_parameters_in_separate_buffers(recipe):
    """Where they shared one, the step could not donate the state."""
    created = state.create(*recipe, size=32, seed=0)
    slow = created.opt_state[-1].slow
    for name, leaf in leaves(created.params).items():
        np.testing.assert_array_equal(leaf, leaves(slow)[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(created)]
    assert len(set(pointers)) == len(pointers)


def test_the_moving_average_is_optional(recipe):
    created = state.create(*recipe, size=32, seed=0)
    assert created.ema == state.shapes(*recipe, size=32).ema == ()


def test_a_moving_average_starts_as_the_network_in_separate_buffers(recipe):
    created = state.create(*recipe, size=32, seed=0, ema=True)
    plain = state.create(*recipe, size=32, seed=0)
    for name, leaf in leaves(plain.variables).items():
        np.testing.assert_array_equal(leaf, leaves(created.ema)[name])
    for name, leaf in leaves(plain).items():
        np.testing.assert_array_equal(leaf, leaves(created)[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(created)]
    assert len(set(pointers)) == len(pointers)
    shapes = state.shapes(*recipe, size=32, ema=True)
    assert jax.tree.structure(created) == jax.tree.structure(shapes)
    for name, leaf in leaves(created).items():
        assert (leaf.shape, leaf.dtype) == (leaves(shapes)[name].shape, leaves(shapes)[name].dtype)


def test_a_moving_average_starts_from_the_weights_that_were_placed(recipe):
    def double(variables):
        return jax.tree.map(lambda leaf: 2 * np.asarray(leaf) + 1, variables)

    created = state.create(*recipe, size=32, seed=0, place=double, ema=True)
    expected = leaves(double(state.create(*recipe, size=32, seed=0).variables))
    for name, leaf in leaves(created.ema).items():
        np.testing.assert_array_equal(leaf, expected[name])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(created)]
    assert len(set(pointers)) == len(pointers)


def test_scoring_uses_the_moving_average(recipe):
    created = state.create(*recipe, size=32, seed=0, ema=True)
    assert created.variables is created.ema
    other = created._replace(ema=())
    assert other.variables == {"params": created.params, "batch_stats": created.batch_stats}


def test_a_network_without_batch_norm_has_empty_statistics():
    from flax import linen as nn

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(2)(images.reshape(len(images), -1))

    assert state.create(Plain(), ranger.ranger(0.01), size=4, seed=0).batch_stats == {}
