"""A linear model on pixels, the baseline that a network must beat to justify its FLOPs."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models import layers, network


class Linear(network.Network):
    """Pixels averaged to `edge` x `edge`, standardised by their running statistics, one Dense.

    The paper has no such model: all of it is our choice.

    Attributes:
      edge: cells per side of the image.
    """

    edge: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> network.Outputs:
        """`[B, S, S, 3]` with S a multiple of `edge` -> `Outputs` without a second head.

        Raises:
          InputError: `edge` does not divide S.
        """
        batch, size, _, channels = images.shape
        if size % self.edge:
            raise InputError(
                f"image size {size} is not a multiple of the linear model's edge {self.edge}: "
                "change one of them"
            )
        cell = size // self.edge
        x = images.reshape(batch, self.edge, cell, self.edge, cell, channels).mean(axis=(2, 4))
        x = x.astype(jnp.float32).reshape(batch, -1)
        x = nn.BatchNorm(not train, momentum=0.9, use_scale=False, use_bias=False, name="norm")(x)
        # Standardised pixels are near 1: small weights keep the first logits near 0.
        init = nn.initializers.normal(0.1 / self.edge)
        logits = layers.score_layer(self.num_classes, kernel_init=init, name="classifier")(x)
        return network.Outputs(logits, None, x)
