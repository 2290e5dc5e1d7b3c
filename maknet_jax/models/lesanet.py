"""LesaNet: labels and embeds a lesion from a patch and the lesion's box in it.

Yan et al. 2019, arXiv:1904.04661, section 3; the sizes are those of its published code.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models import layers, network
from maknet_jax.models.maknet import MAKNet
from maknet_jax.models.resnet import ResNet18
from maknet_jax.models.vgg import VGG16

TRUNKS: dict[str, type[network.TrunkNetwork]] = {
    "vgg16": VGG16,
    "resnet18": ResNet18,
    "maknet": MAKNet,
}
_BINS = 5
_BOX_SCALES = 3  # scales pooled over the lesion's box; the other two over the whole patch


def roi_max_pool(x: jax.Array, box: jax.Array, scale: float, bins: int = _BINS) -> jax.Array:
    """ROI max pooling (Girshick 2015): the maximum of each of `bins` x `bins` parts of a box.

    As in Fast R-CNN, corners are rounded to pixels of the map and both are included, parts overlap
    by a pixel if `bins` does not divide the box, and parts outside the map are 0. The code is
    vectorised: a map is masked by rows, then by columns. Equal maxima share the gradient (in torch
    the first one gets it).

    Args:
      x: `[B, H, W, C]`.
      box: `[B, 4]`, x0, y0, x1, y1 in pixels of the image.
      scale: pixels of the map per pixel of the image.
      bins: parts per side.

    Returns:
      `[B, bins, bins, C]`.
    """
    corners = jnp.floor(box * scale + 0.5).astype(jnp.int32)
    rows = _parts(corners[:, 1], corners[:, 3], x.shape[1], bins)
    columns = _parts(corners[:, 0], corners[:, 2], x.shape[2], bins)
    least = jnp.finfo(x.dtype).min
    by_row = [jnp.where(rows[:, k, :, None, None], x, least).max(axis=1) for k in range(bins)]
    strips = jnp.stack(by_row, axis=1)
    pooled = [
        jnp.where(columns[:, None, k, :, None], strips, least).max(axis=2) for k in range(bins)
    ]
    inside = rows.any(axis=-1)[:, :, None] & columns.any(axis=-1)[:, None]
    return jnp.where(inside[..., None], jnp.stack(pooled, axis=2), 0)


def _parts(first: jax.Array, last: jax.Array, size: int, bins: int) -> jax.Array:
    """Which of `size` pixels belong to each part of first..last: bool `[B, bins, size]`."""
    length = jnp.maximum(last - first + 1, 1)[:, None]
    number = jnp.arange(bins)
    start = first[:, None] + number * length // bins
    stop = first[:, None] - (-(number + 1) * length // bins)  # rounded up
    pixel = jnp.arange(size)
    return (pixel >= start[..., None]) & (pixel < stop[..., None])


class LesaNet(network.Network):
    """Five scales of a trunk, pooled over the lesion and its surroundings.

    The parameters of the trunk have the same names as in the trunk alone, so its weights load
    without renaming. Trunks other than VGG16 are our choice.

    Attributes:
      trunk: "vgg16" (LesaNet's), "resnet18" or "maknet".
      trunk_options: attributes of the trunk.
      units: output channels of each scale.
      embedding: length of the embedding.
      frozen: the weights and BatchNorm statistics of the trunk do not change.
      remat: of the trunk, see `network.TrunkNetwork`.
    """

    trunk: str = "vgg16"
    trunk_options: Mapping[str, Any] | None = None
    units: int = 256
    embedding: int = 256
    frozen: bool = False
    remat: bool = False
    takes_box: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, box: jax.Array | None = None
    ) -> network.Outputs:
        """Scores and embeds lesions.

        Args:
          images: `[B, S, S, 3]` in [0, 1].
          train: use the statistics of the batch, and update the running ones.
          box: `[B, 4]`, x0, y0, x1, y1 in pixels; None takes the whole patch.

        Returns:
          `Outputs`, whose `features` are the embedding `[B, embedding]`, of length 1.

        Raises:
          InputError: an unknown trunk, or an option that it does not have.
        """
        if self.trunk not in TRUNKS:
            raise InputError(f"trunk {self.trunk!r} is unknown: choose one of {', '.join(TRUNKS)}")
        try:
            trunk = TRUNKS[self.trunk](
                num_classes=self.num_classes,
                frozen=self.frozen,
                remat=self.remat,
                dtype=self.dtype,
                **(self.trunk_options or {}),
            )
        except TypeError as error:
            raise InputError(f"trunk {self.trunk}: {error}") from None
        nn.share_scope(self, trunk)
        batch, size = images.shape[:2]  # the batch may be symbolic, which len() rejects
        whole = jnp.broadcast_to(jnp.float32([0, 0, size, size]), (batch, 4))
        box = whole if box is None else box
        maps: list[jax.Array] = trunk(images, train, stages=True)
        pooled = []
        for number, x in enumerate(maps):
            # Strides are powers of two: a map of 7 pixels has a scale of 1/16 for 120 pixels.
            scale = 0.5 ** round(math.log2(size / x.shape[1]))
            parts = roi_max_pool(x, box if number < _BOX_SCALES else whole, scale)
            scale_units = nn.Dense(self.units, dtype=self.dtype, name=f"roi_{number + 1}")
            pooled.append(scale_units(parts.reshape(batch, -1)))
        x = jnp.concatenate(pooled, axis=-1).astype(jnp.float32)
        embedding = layers.score_layer(self.embedding, name="embedding")(x)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(embedding), -1, keepdims=True), 1e-24))
        scores = layers.score_layer(self.num_classes, name="classifier")(x)
        logits = layers.ScorePropagation(name="spl")(scores)
        return network.Outputs(logits, scores, embedding / norm)
