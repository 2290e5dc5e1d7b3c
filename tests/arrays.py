"""Random arrays and variables for the tests of the models."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(*shape, seed=0):
    """Normal float32 numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def redrawn(variables, seed=1, *, by_fan_in=False):
    """The same tree with every leaf drawn anew: statistics and scales near 1, none at its start.

    `by_fan_in` divides kernels by the root of their fan-in, so that deep networks stay finite.
    """
    rng = np.random.default_rng(seed)

    def new(path, leaf):
        values = rng.normal(size=leaf.shape)
        name = path[-1].key
        if name in ("var", "scale", "std"):
            values = 1 + 0.2 * np.abs(values)
        if name == "mean":
            values = 0.5 * values
        if by_fan_in and len(leaf.shape) > 1:
            values = values / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(new, variables)


def dense(x, params):
    """A dense layer in float64."""
    return np.float64(x) @ np.float64(params["kernel"]) + np.float64(params["bias"])


def trained_parts(model, variables, images):
    """The top-level parts with a gradient; asserts that the running statistics stay the same."""

    def loss(params):
        outputs, updated = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(outputs.logits**2), updated["batch_stats"]

    gradient, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], stats)
    return {part for part, tree in gradient.items() if any(map(np.any, jax.tree.leaves(tree)))}
