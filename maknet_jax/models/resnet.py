"""ResNet18 with score propagation, the second baseline of table 1 (He et al. 2015)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.models import layers

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the input added, projected where the shape changes."""

    features: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        """`[B, H, W, C]` -> `[B, ceil(H / strides), ceil(W / strides), features]`."""
        conv = layers.ConvNorm
        y = conv(self.features, (3, 3), self.strides, self.dtype, name="first")(x, train)
        y = conv(self.features, (3, 3), 1, self.dtype, name="second")(nn.relu(y), train)
        if self.strides != 1 or x.shape[-1] != self.features:
            x = conv(self.features, (1, 1), self.strides, self.dtype, name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet18, global average pooling, Dense and SPL: 11.25 M parameters at 115 labels.

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
        """`[B, H, W, 3]` in [0, 1] -> `Outputs`, or the list of `stages` from the stem on."""
        learning = train and not self.frozen
        x = layers.InputNorm(self.dtype, name="input")(images)
        x = layers.ConvNorm(64, (7, 7), 2, self.dtype, name="stem")(x, learning)
        x = nn.relu(x)
        kept = [x]
        # Padded by one as torch pads: "SAME" would shift the grid.
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, features in enumerate(WIDTHS):
            for number in range(2):
                strides = 2 if stage and not number else 1
                name = f"stage{stage + 1}_{number}"
                x = BasicBlock(features, strides, self.dtype, name=name)(x, learning)
            kept.append(x)
        if self.frozen:
            x, kept = jax.lax.stop_gradient((x, kept))
        if stages:
            return kept
        features = x.mean(axis=(1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(features)
        scores = layers.score_layer(self.num_classes, name="classifier")(x)
        return layers.Outputs(layers.ScorePropagation(name="spl")(scores), scores, features)
