"""SGD with momentum as LesaNet uses it, and slower or frozen trunks for fine-tuning."""

import jax
import optax

# The first part of the names of all layers that are no trunk.
HEADS = ("roi", "embedding", "classifier", "spl")


def sgd(
    learning_rate,
    *,
    momentum=0.9,
    clip=10.0,
    weight_decay=1e-4,
    bias_rate=2.0,
    trunk_rate=1.0,
):
    """Gradients cut to a norm, weight decay, momentum; as torch's SGD where nothing is cut.

    Args:
      learning_rate: a float, or a schedule from the number of updates done.
      momentum: share of the last direction that is kept.
      clip: largest norm of all gradients together.
      weight_decay: added to the gradient, of all but biases (BatchNorm's too).
      bias_rate: what the learning rate of biases is multiplied by; LesaNet's is 2.
      trunk_rate: what the trunk's is multiplied by, in 0..1.

    Returns:
      An `optax.GradientTransformation`; `update` needs params.

    Raises:
      ValueError: an argument is out of range.
    """
    if not 0 <= trunk_rate <= 1:
        raise ValueError(f"trunk_rate {trunk_rate} should lie in 0..1")
    if not clip > 0:
        raise ValueError(f"clip {clip} should be above 0")

    def decayed(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key != "bias", params)

    def rate(path):
        in_head = path[0].key.split("_")[0] in HEADS
        return (1.0 if in_head else trunk_rate) * (bias_rate if path[-1].key == "bias" else 1.0)

    def scaled(updates, params):
        return jax.tree.map_with_path(lambda path, update: rate(path) * update, updates)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(scaled),
    )
