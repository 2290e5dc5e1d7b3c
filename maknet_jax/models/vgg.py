"""VGG16 with BatchNorm, the first baseline of table 1 (Simonyan and Zisserman 2015)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.models import layers, pooling

# Convolutions of each stage; a 2 x 2 maximum halves the image after it.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16-BN trunk, global average pooling, one Dense: 14.78 M parameters at 115 labels.

    Attributes:
      num_classes: labels K.
      dropout_rate: before the classifier.
      frozen: the trunk's weights and statistics stay as they are.
      dtype: of activations; parameters, statistics and logits are float32.
    """

    num_classes: int
    dropout_rate: float = 0.0
    frozen: bool = False
    dtype: Any = jnp.float32

    takes_box: ClassVar[bool] = False

    @nn.compact
    def __call__(self, images, train, *, stages=False):
        """`[B, H, W, 3]` in [0, 1] -> `Outputs` without a second head, or the list of `stages`."""
        learning, kept = train and not self.frozen, []
        x = layers.InputNorm(self.dtype, name="input")(images)
        for stage, widths in enumerate(STAGES):
            for number, features in enumerate(widths):
                x = layers.ConvNorm(
                    features, (3, 3), dtype=self.dtype, name=f"stage{stage + 1}_{number}"
                )(x, learning)
                x = nn.relu(x)
            kept.append(x)
            x = pooling.max_pool(x)
        if self.frozen:
            x, kept = jax.lax.stop_gradient((x, kept))
        if stages:
            return kept
        features = x.mean(axis=(1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(features)
        logits = layers.score_layer(self.num_classes, name="classifier")(x)
        return layers.Outputs(logits, None, features)
