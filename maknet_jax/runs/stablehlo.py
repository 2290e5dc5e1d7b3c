"""A network as StableHLO, for programs that have neither this package nor Flax.

Later versions of JAX can read a `jax.export` artifact (its documentation promises half a year).
This package never runs the artifact: it builds the network itself.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export
from ml_collections import ConfigDict

from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import step

PLATFORMS = ("cpu", "cuda", "tpu")
FORM = "fused"  # of MAKConv: "auto" would choose for the exporting machine


def export_network(
    config: ConfigDict, labels: int, weights: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, Any]]:
    """Exports a network for all `PLATFORMS` with a symbolic batch size.

    The exported function takes (weights, images), for a LesaNet (weights, images, boxes):

      weights: path ("params/stem/conv/kernel") -> array, as safetensors stores them.
      images: int16 HU `[B, S, S, 3]`.
      boxes: float32 `[B, 4]`, x0, y0, x1, y1 in pixels of the image.

    It returns a dict of float32 `logits` `[B, K]` and `features` `[B, F]`. It computes in float32,
    matrix products included.

    Args:
      config: of the network.
      labels: the number of labels K.
      weights: their shapes and dtypes are those of the exported function's arguments.

    Returns:
      (the serialised artifact, its description as JSON for `bundle.json`).
    """
    config = exported_config(config)
    model, to_input = build.build_model(config, labels), build.build_to_input(config)

    def network(
        weights: dict[str, jax.Array], images: jax.Array, box: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        arrays = {name: array.astype(jnp.float32) for name, array in weights.items()}
        variables: Any = {"params": {}, "batch_stats": {}}
        variables |= traverse_util.unflatten_dict(arrays, sep="/")
        boxes = step.box_kwargs(model, box)
        with jax.default_matmul_precision("highest"):
            outputs: Any = model.apply(variables, to_input(images), train=False, **boxes)
        return {"logits": outputs.logits, "features": outputs.features.astype(jnp.float32)}

    (batch,) = export.symbolic_shape("b")
    size = config.data.size
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    arguments = [shapes, jax.ShapeDtypeStruct((batch, size, size, 3), np.int16)]
    inputs = ["weights", f"images int16 [b, {size}, {size}, 3]"]
    if model.takes_box:
        arguments.append(jax.ShapeDtypeStruct((batch, 4), np.float32))
        inputs.append("boxes float32 [b, 4]")
    with _without_locations():
        exported = export.export(jax.jit(network), platforms=PLATFORMS)(*arguments)
    features = exported.out_avals[0].shape[-1]  # a dict's leaves are sorted by name
    description = {
        "platforms": list(PLATFORMS),
        "form": FORM,
        "inputs": inputs,
        "outputs": [f"features float32 [b, {features}]", f"logits float32 [b, {labels}]"],
    }
    return bytes(exported.serialize()), description


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of the artifact."""
    option = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, limit)


def exported_config(config: ConfigDict) -> ConfigDict:
    """The config of the exported network: float32, and every form "auto" replaced by `FORM`."""
    values = copy.deepcopy(configs.to_json(config))
    values["precision"] = "float32"
    options = values["model"]["options"]
    if values["model"]["name"] == "lesanet":
        if options.get("trunk", "vgg16") != "maknet":
            return configs.from_json(values)
        options["trunk_options"] = dict(options.get("trunk_options") or {})
        options = options["trunk_options"]
    elif values["model"]["name"] != "maknet":
        return configs.from_json(values)
    if options.get("form", "auto") == "auto":
        options["form"] = FORM
    return configs.from_json(values)
