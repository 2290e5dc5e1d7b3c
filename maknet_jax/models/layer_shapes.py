"""The shapes of the layers of a network, without computing anything."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.models.layers import ConvNorm, MAKConv


class Layer(NamedTuple):
    """A convolution or dense layer.

    Attributes:
      part: the top-level part of the network that it belongs to.
      inputs: shape of its input, with a batch of one image.
      outputs: shape of its output.
      kernels: elements of its kernels, without biases.
    """

    part: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernels: int


def trace(model: nn.Module, size: int) -> tuple[list[Layer], dict[str, Any]]:
    """Traces a network on one image.

    Args:
      model: the network.
      size: pixels per side of the image.

    Returns:
      (its layers in the order of the calls, the shapes of its parameters).
    """
    layers: list[Layer] = []

    def record(
        next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        outputs = next_call(*args, **kwargs)
        counted = isinstance(context.module, (nn.Conv, nn.Dense, ConvNorm, MAKConv))
        if counted and context.method_name == "__call__":
            leaves = jax.tree.leaves(context.module.variables["params"])
            kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
            layers.append(Layer(context.module.path[0], args[0].shape, outputs.shape, kernels))
        return outputs

    def run(image: jax.Array) -> dict[str, Any]:
        variables = model.init(jax.random.key(0), image, train=False)
        with nn.intercept_methods(record):
            model.apply(variables, image, train=False)
        return variables["params"]

    params = jax.eval_shape(run, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return layers, params
