"""A linear model on pixels: what a network must beat before it is worth its FLOPs."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models.layers import Outputs, score_layer


class Linear(nn.Module):
    """Pixels averaged to `edge` x `edge`, standardised by their running statistics, one Dense."""

    num_classes: int
    edge: int = 32
    dtype: Any = jnp.float32

    takes_box: ClassVar[bool] = False

    @nn.compact
    def __call__(self, images, train):
        """`[B, S, S, 3]` with S a multiple of `edge` -> `Outputs` without a second head."""
        batch, size, _, channels = images.shape
        if size % self.edge:
            raise InputError(
                f"image size {size} is no multiple of the linear model's edge {self.edge}: "
                "change one of them"
            )
        cell = size // self.edge
        x = images.reshape(batch, self.edge, cell, self.edge, cell, channels).mean(axis=(2, 4))
        x = x.astype(jnp.float32).reshape(batch, -1)
        x = nn.BatchNorm(not train, momentum=0.9, use_scale=False, use_bias=False, name="norm")(x)
        # Centred pixels are near 1: small weights keep the first logits near 0.
        init = nn.initializers.normal(0.1 / self.edge)
        logits = score_layer(self.num_classes, kernel_init=init, name="classifier")(x)
        return Outputs(logits, None, x)
