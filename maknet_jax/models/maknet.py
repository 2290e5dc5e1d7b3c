"""MAKNet, the mixed asymmetric kernels network (paper, section 3 and figure 1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models import layers, network, pooling

COMPONENTS = ("mixpool", "gcp", "cbam", "spl", "makconv")


class MAKNet(network.TrunkNetwork):
    """MAKNet for `[B, H, W, 3]` images in [0, 1]: 4.50 M parameters at 115 labels.

    From the paper: the components, "three or six" MAKConv layers per block, and the total number of
    parameters. Our choice: the stem, all channels, which blocks have three layers and which six,
    k = 3, and the learned share and the position of MixPool. They are chosen to reduce the memory
    traffic of training, which limits its speed on accelerators: few channels where the image is
    large; most parameters at 8 x 8 and 16 x 16, where they need few FLOPs (1.3 G forward at
    256 x 256); all channels in multiples of 16, which fill the tiles of a TPU. The stem reduces the
    image to a quarter of its size with one stride, as in ConvNeXt (arXiv:2201.03545): activations
    at half the size would move more bytes than all blocks together.

    Attributes:
      stem: channels of the 7 x 7 convolution.
      stem_stride: its stride.
      blocks: MAKConv layers of each dense block.
      growth_rates: channels that each layer of a block adds.
      widths: output channels of each block.
      kernel_size: k of the MAKConv layers.
      form: of the MAKConv layers, see `layers.MAKConv`; the parameters are the same in all.
      mixpool_learned: False fixes MixPool's share at 0.5.
      plain: the components of the paper that are replaced by their plain counterparts, to measure
        what each is worth: "mixpool" (maximum pooling), "gcp" (global average pooling), "cbam" (no
        attention), "spl" (no score propagation), "makconv" (k x k convolutions).
    """

    stem: int = 32
    stem_stride: int = 4
    blocks: Sequence[int] = (3, 3, 6, 6)
    growth_rates: Sequence[int] = (16, 32, 112, 160)
    widths: Sequence[int] = (64, 128, 256, 384)
    kernel_size: int = 3
    form: str = "auto"
    mixpool_learned: bool = True
    plain: Sequence[str] = ()

    @nn.nowrap
    def for_prediction(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Joins the kernels of each MAKConv if they are computed as one matrix product."""
        by_matmul = layers.choose_form(self.form) == "matmul" and "makconv" not in self.plain
        return layers.join_kernels(params) if by_matmul else params

    @property
    def pools_maxima(self) -> bool:
        """True with global concatenate pooling."""
        return "gcp" not in self.plain

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, *, stages: bool = False
    ) -> network.Outputs | list[jax.Array]:
        """`[B, H, W, 3]` -> `Outputs`.

        With `stages`: the maps of the stem, `[B, H/4, W/4, stem]` at stride 4, and of each block.

        Raises:
          InputError: `blocks`, `growth_rates` and `widths` differ in length, the form or a plain
            component is unknown, or the images are too small.
        """
        for name in self.plain:
            if name not in COMPONENTS:
                raise InputError(
                    f"plain component {name!r} is unknown: choose from {', '.join(COMPONENTS)}"
                )
        if not len(self.blocks) == len(self.growth_rates) == len(self.widths):
            raise InputError(
                f"blocks {self.blocks}, growth_rates {self.growth_rates} and widths {self.widths} "
                "differ in length: each needs one entry per block"
            )
        learning = train and not self.frozen
        x = layers.InputNorm(self.dtype, name="input")(images)
        x = layers.ConvNorm(self.stem, (7, 7), self.stem_stride, dtype=self.dtype, name="stem")(
            x, learning
        )
        x = layers.mish(x)
        maps = [x]
        shapes = zip(self.blocks, self.growth_rates, self.widths, strict=True)
        for number, (count, growth_rate, features) in enumerate(shapes):
            if number and "mixpool" in self.plain:
                x = pooling.max_pool(x)
            elif number:
                x = layers.MixPool(self.mixpool_learned, name=f"mixpool_{number}")(x)
            if not min(x.shape[1:3]):
                raise InputError(
                    f"images of {images.shape[1]} x {images.shape[2]} are too small for "
                    f"{len(self.blocks)} blocks: use larger images or fewer blocks"
                )
            x = self.block(layers.DenseBlock)(
                count,
                growth_rate,
                features,
                self.kernel_size,
                form=self.form,
                mixed="makconv" not in self.plain,
                attention="cbam" not in self.plain,
                dtype=self.dtype,
                name=f"block_{number}",
            )(x, learning)
            maps.append(x)
        if self.frozen:
            x, maps = jax.lax.stop_gradient((x, maps))
        if stages:
            return maps
        if "gcp" in self.plain:
            pooled = x.mean(axis=(1, 2), dtype=jnp.float32)
        else:
            pooled = layers.global_concat_pool(x)
        return self.head(pooled, train, propagate="spl" not in self.plain)
