"""Applies a network to weights that may be those of another network."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import errors as flax_errors
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.training.state import Variables


class OtherWeightsError(InputError):
    """The weights are not those of the network."""


def apply(model: nn.Module, variables: Variables, images: jax.Array, **options: Any) -> Any:
    """`model.apply` for scoring; checks names and shapes of the weights while it is traced.

    Flax itself ignores weights that the network does not have, and broadcasts statistics.

    Args:
      model: a network of `maknet_jax.models`.
      variables: its params and batch_stats.
      images: `[B, S, S, 3]`.
      **options: further arguments of the network.

    Returns:
      The outputs of the network.

    Raises:
      OtherWeightsError: a weight is missing or unknown, or has another shape.
    """
    declared: set[str] = set()
    statistics = variables.get("batch_stats", {})

    def check(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        scope = context.module.scope
        assert scope is not None  # during `apply`
        for name, leaf in _at(statistics, scope.path).items():
            # All statistics are per channel of the module's input.
            if not isinstance(leaf, Mapping) and args and np.shape(leaf) != args[0].shape[-1:]:
                raise OtherWeightsError(
                    f"the weights are those of another network: {'/'.join(scope.path)}/{name} is "
                    f"{np.shape(leaf)}, not {args[0].shape[-1:]}"
                )
        result = call(*args, **kwargs)
        for name, collections in scope.reservations.items():
            declared.update("/".join((kind, *scope.path, name)) for kind in collections if kind)
        return result

    try:
        with nn.intercept_methods(check):
            outputs = model.apply(variables, images, train=False, **options)
    except flax_errors.FlaxError as error:
        reason = str(error).partition(" (http")[0]
        raise OtherWeightsError(f"the weights are those of another network: {reason}") from None
    leaves, _ = jax.tree.flatten_with_path(variables)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    for name in sorted(set(names) - declared):
        raise OtherWeightsError(f"the weights are those of another network, which has {name}")
    return outputs


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    return functools.reduce(lambda inner, name: inner.get(name, {}), path, tree)
