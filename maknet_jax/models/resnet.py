"""ResNet18 with score propagation, the second baseline of table 1 (He et al. 2015)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from maknet_jax.models import layers, network

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions plus the input, which is projected if the shape changes."""

    features: int
    strides: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` -> `[B, ceil(H / strides), ceil(W / strides), features]`."""
        conv = layers.ConvNorm
        y = conv(self.features, (3, 3), self.strides, self.dtype, name="first")(x, train)
        y = conv(self.features, (3, 3), 1, self.dtype, name="second")(nn.relu(y), train)
        if self.strides != 1 or x.shape[-1] != self.features:
            x = conv(self.features, (1, 1), self.strides, self.dtype, name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet18(network.TrunkNetwork):
    """ResNet18, global average pooling, Dense and SPL: 11.25 M parameters at 115 labels.

    The paper gives only the parameter count, which implies score propagation: without it the count
    is 11.24 M.
    """

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, *, stages: bool = False
    ) -> network.Outputs | list[jax.Array]:
        """`[B, H, W, 3]` in [0, 1] -> `Outputs`.

        With `stages`: the maps of the stem and of the four stages, `[B, H/2, W/2, 64]` to
        `[B, H/32, W/32, 512]`.
        """
        learning = train and not self.frozen
        x = layers.InputNorm(self.dtype, name="input")(images)
        x = layers.ConvNorm(64, (7, 7), 2, self.dtype, name="stem")(x, learning)
        x = nn.relu(x)
        maps = [x]
        # Padded by one as in torch: "SAME" would shift the grid.
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, features in enumerate(WIDTHS, 1):
            for number in range(2):
                strides = 2 if stage > 1 and not number else 1
                name = f"stage{stage}_{number}"
                block = self.block(BasicBlock)
                x = block(features, strides, self.dtype, name=name)(x, learning)
            maps.append(x)
        if self.frozen:
            x, maps = jax.lax.stop_gradient((x, maps))
        if stages:
            return maps
        return self.head(x.mean(axis=(1, 2), dtype=jnp.float32), train)
