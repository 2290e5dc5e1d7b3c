"""SGD with momentum as in LesaNet, with slower or frozen trunks for fine-tuning."""

from typing import Any

import jax
import optax

# First part of the names of all layers that are not in the trunk.
HEADS = ("roi", "embedding", "classifier", "spl")


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    clip: float = 10.0,
    weight_decay: float = 1e-4,
    bias_rate: float = 2.0,
    trunk_rate: float = 1.0,
) -> optax.GradientTransformation:
    """SGD with clipped gradients, weight decay and momentum; torch's SGD if nothing is clipped.

    Args:
      learning_rate: a float, or a schedule of the number of updates done.
      momentum: decay of the accumulated gradients.
      clip: largest norm of all gradients together.
      weight_decay: added to the gradients, except those of biases (BatchNorm's included).
      bias_rate: factor of the learning rate for biases; 2 in LesaNet.
      trunk_rate: factor of the learning rate for the trunk, in 0..1.

    Returns:
      An `optax.GradientTransformation`; `update` needs params.

    Raises:
      ValueError: an argument is out of range.
    """
    if not 0 <= trunk_rate <= 1:
        raise ValueError(f"trunk_rate {trunk_rate} should be in 0..1")
    if not clip > 0:
        raise ValueError(f"clip {clip} should be above 0")

    def decayed(params: optax.Params) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key != "bias", params)

    def rate(path: tuple[jax.tree_util.DictKey, ...]) -> float:
        in_head = path[0].key.split("_")[0] in HEADS
        return (1.0 if in_head else trunk_rate) * (bias_rate if path[-1].key == "bias" else 1.0)

    def scaled(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree.map_with_path(lambda path, update: rate(path) * update, updates)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(scaled),
    )
