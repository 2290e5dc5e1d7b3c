"""Lower bounds of the main memory traffic of a training step, from the shapes of its layers.

They are independent of any compiler: the count of a compiled program (`hlo.hbm_bytes`) should lie
above the first one, and close to the second one where nothing but convolutions is fused.
"""

import math
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from maknet_jax import models
from maknet_jax.models import layer_shapes

ACTIVATION, PARAMETER = 2, 4  # bytes: bfloat16 and float32
STATES = 4  # arrays like the parameters: themselves, two moments and the slow weights of Ranger


class Bound(NamedTuple):
    """Bytes that training moves for a top-level part of a network.

    Attributes:
      part: its name.
      once: per image: the output of each layer is written once, for the backward pass, and read
        once.
      by_layer: per image: no layer shares a pass with another. Forward, each reads its input and
        writes its output; backward, it reads its input and the gradient of its output and writes
        the gradient of its input.
      state: per step: parameters and optimiser state, read and written once.
    """

    part: str
    once: float
    by_layer: float
    state: float


def training_bounds(config: ConfigDict, labels: int) -> list[Bound]:
    """Bounds of each top-level part of a network.

    Args:
      config: of the network.
      labels: number of labels K.

    Returns:
      One row per part, in the order of the network.
    """
    model = models.build(config.model.name, labels, **config.model.options.to_dict())
    layers, params = layer_shapes.trace(model, config.data.size)
    parts = dict.fromkeys([*(layer.part for layer in layers), *params])
    rows = []
    for part in parts:
        shapes = [
            (math.prod(layer.inputs), math.prod(layer.outputs))
            for layer in layers
            if layer.part == part
        ]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params.get(part, {})))
        rows.append(
            Bound(
                part,
                once=ACTIVATION * sum(2 * outputs for _, outputs in shapes),
                by_layer=ACTIVATION * sum(3 * inputs + 2 * outputs for inputs, outputs in shapes),
                state=2 * PARAMETER * STATES * parameters,
            )
        )
    return rows
