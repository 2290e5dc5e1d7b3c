"""MAKNet, the mixed asymmetric kernels network (paper, section 3 and figure 1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models import layers


class MAKNet(nn.Module):
    """MAKNet for `[B, H, W, 3]` images in [0, 1]: 4.50 M parameters at 115 labels.

    The paper gives the components, "three or six" layers a block and the total; the rest is ours,
    and chosen for the bytes that training moves, which bound it on accelerators: few channels where
    the image is large, most parameters at 8 x 8 and 16 x 16, where they cost few FLOPs (1.3 G
    forward at 256 x 256), all channels in multiples of 16, which fill the tiles of a TPU. The stem
    goes to a quarter of the size in one stride, as ConvNeXt's does (arXiv:2201.03545): activations
    at half the size moved more bytes than all blocks together.

    Attributes:
      num_classes: labels K.
      stem: channels of the 7 x 7 convolution with stride 4.
      blocks: layers of each dense block.
      growth_rates: channels that each of its layers adds.
      widths: channels that each block gives on.
      kernel_size: k of the MAKConv layers.
      form: of the MAKConv layers, see `layers.DenseBlock`; the parameters are the same in all.
      dropout_rate: before the classifier; 0.5 in the student (section 4.2), 0 in the teacher.
      frozen: the trunk's weights and statistics stay as they are.
      mixpool_learned: False fixes MixPool's share at 0.5.
      dtype: of activations; parameters, statistics and logits are float32.
    """

    num_classes: int
    stem: int = 32
    blocks: Sequence[int] = (3, 3, 6, 6)
    growth_rates: Sequence[int] = (16, 32, 112, 160)
    widths: Sequence[int] = (64, 128, 256, 384)
    kernel_size: int = 3
    form: str = "auto"
    dropout_rate: float = 0.0
    mixpool_learned: bool = True
    frozen: bool = False
    dtype: Any = jnp.float32

    takes_box: ClassVar[bool] = False

    @nn.compact
    def __call__(self, images, train, *, stages=False):
        """`[B, H, W, 3]` -> `Outputs`, or the list of `stages` from the stem on.

        With `train` and dropout an rng named "dropout" is needed.
        """
        if not len(self.blocks) == len(self.growth_rates) == len(self.widths):
            raise InputError(
                f"blocks {self.blocks}, growth_rates {self.growth_rates} and widths {self.widths} "
                "differ in length: each needs one entry a block"
            )
        learning = train and not self.frozen
        x = layers.InputNorm(self.dtype, name="input")(images)
        x = layers.ConvNorm(self.stem, (7, 7), 4, dtype=self.dtype, name="stem")(x, learning)
        x = layers.mish(x)
        kept = [x]
        shapes = zip(self.blocks, self.growth_rates, self.widths, strict=True)
        for number, (count, growth_rate, features) in enumerate(shapes):
            if number:
                x = layers.MixPool(self.mixpool_learned, name=f"mixpool_{number}")(x)
                if not min(x.shape[1:3]):
                    raise InputError(
                        f"images of {images.shape[1]} x {images.shape[2]} are too small: "
                        f"{len(self.blocks)} blocks leave nothing of them"
                    )
            x = layers.DenseBlock(
                count,
                growth_rate,
                features,
                self.kernel_size,
                form=self.form,
                dtype=self.dtype,
                name=f"block_{number}",
            )(x, learning)
            kept.append(x)
        if self.frozen:
            x, kept = jax.lax.stop_gradient((x, kept))
        if stages:
            return kept
        features = layers.global_concat_pool(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(features)
        scores = layers.score_layer(self.num_classes, name="classifier")(x)
        logits = layers.ScorePropagation(name="spl")(scores)
        return layers.Outputs(logits, scores, features)
