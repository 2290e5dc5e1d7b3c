"""VGG16 with BatchNorm, the first baseline of table 1 (Simonyan and Zisserman 2015)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.models import layers, network, pooling

# Output channels of the convolutions of each stage; a 2 x 2 max pooling follows every stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(network.TrunkNetwork):
    """VGG16-BN trunk, global average pooling, one Dense: 14.78 M parameters at 115 labels.

    The paper gives only the parameter count, which implies the rest: the two hidden layers of the
    original head would make it about ten times as large, score propagation would make it 14.79 M,
    and convolutions with biases instead of BatchNorm 14.77 M.
    """

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, *, stages: bool = False
    ) -> network.Outputs | list[jax.Array]:
        """`[B, H, W, 3]` in [0, 1] -> `Outputs` without a second head.

        With `stages`: the five maps before pooling, `[B, H, W, 64]` to `[B, H/16, W/16, 512]`.
        """
        learning, maps = train and not self.frozen, []
        x = layers.InputNorm(self.dtype, name="input")(images)
        for stage, widths in enumerate(STAGES, 1):
            for number, features in enumerate(widths):
                name = f"stage{stage}_{number}"
                block = self.block(layers.ConvNorm)
                x = block(features, (3, 3), dtype=self.dtype, name=name)(x, learning)
                x = nn.relu(x)
            maps.append(x)
            x = pooling.max_pool(x)
        if self.frozen:
            x, maps = jax.lax.stop_gradient((x, maps))
        if stages:
            return maps
        return self.head(x.mean(axis=(1, 2), dtype=jnp.float32), train, propagate=False)
