"""Shared by the networks: outputs, attributes and head."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from maknet_jax.models import layers


class Outputs(NamedTuple):
    """The outputs of every network.

    Attributes:
      logits: float32 `[B, K]`; the prediction is their sigmoid.
      scores_before_spl: float32 `[B, K]`, the first head, or None without score propagation.
      features: `[B, F]`, pooled, before dropout and the classifier.
    """

    logits: jax.Array
    scores_before_spl: jax.Array | None
    features: jax.Array


class Network(nn.Module):
    """A network for `[B, S, S, 3]` images in [0, 1].

    Attributes:
      num_classes: labels K.
      dtype: of activations; parameters, statistics and logits are float32.
      takes_box: the network also takes the lesion's box in each image, float32 `[B, 4]`.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32
    takes_box: ClassVar[bool] = False

    @nn.nowrap
    def for_prediction(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Weights -> those with which the same predictions are fastest."""
        return params

    @property
    def pools_maxima(self) -> bool:
        """Whether the first half of the features are maxima and the second half means."""
        return False


class TrunkNetwork(Network):
    """A network of a trunk, global pooling and a linear head: MAKNet, VGG16 and ResNet18.

    Called with `stages`, it returns the feature maps of its trunk instead, for LesaNet.

    Attributes:
      dropout_rate: before the classifier; 0.5 in the student (section 4.2), 0 in the teacher.
      frozen: the weights and BatchNorm statistics of the trunk do not change.
      remat: the backward pass computes the activations inside a block again from the block's input,
        instead of keeping them. Values, parameters and their names are the same.
    """

    dropout_rate: float = 0.0
    frozen: bool = False
    remat: bool = False

    @nn.nowrap
    def block(self, kind: type[nn.Module]) -> type[nn.Module]:
        """The class of a block `kind(...)(x, train)`, which with `remat` stores its input only."""
        return nn.remat(kind, static_argnums=(2,)) if self.remat else kind

    @nn.nowrap
    def head(self, features: jax.Array, train: bool, *, propagate: bool = True) -> Outputs:
        """Dropout, the classifier and, with `propagate`, the score propagation layer.

        Args:
          features: float32 `[B, F]`.
          train: apply dropout, which needs an rng named "dropout".
          propagate: add SPL; without it the outputs have one head.
        """
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(features)
        scores = layers.score_layer(self.num_classes, name="classifier")(x)
        if not propagate:
            return Outputs(scores, None, features)
        return Outputs(layers.ScorePropagation(name="spl")(scores), scores, features)
