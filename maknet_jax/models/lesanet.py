"""LesaNet: what a lesion is and where, from a patch and the lesion's box in it.

Yan et al. 2019, arXiv:1904.04661, section 3; the sizes are those of its published code.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models import layers
from maknet_jax.models.maknet import MAKNet
from maknet_jax.models.resnet import ResNet18
from maknet_jax.models.vgg import VGG16

TRUNKS = {"vgg16": VGG16, "resnet18": ResNet18, "maknet": MAKNet}
_BINS = 5
_CLOSE = 3  # scales that look at the lesion's box; the others see the whole patch


def roi_max_pool(x, box, scale, bins=_BINS):
    """ROI max pooling (Girshick 2015): the maximum of each of `bins` x `bins` parts of a box.

    As in Fast R-CNN: corners are rounded to the map's pixels and count both, parts overlap by a
    pixel where the box does not divide, and parts beyond the map are 0. Vectorised: a map is masked
    by rows, then by columns; equal maxima share the gradient (torch gives it to the first).

    Args:
      x: `[B, H, W, C]`.
      box: `[B, 4]`, x0, y0, x1, y1 in pixels of the image.
      scale: pixels of the map a pixel of the image.
      bins: parts of each side.

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


def _parts(first, last, size, bins):
    """Which of `size` pixels each part of first..last holds: bool `[B, bins, size]`."""
    length = jnp.maximum(last - first + 1, 1)[:, None]
    number = jnp.arange(bins)
    start = first[:, None] + number * length // bins
    stop = first[:, None] - (-(number + 1) * length // bins)  # rounded up
    pixel = jnp.arange(size)
    return (pixel >= start[..., None]) & (pixel < stop[..., None])


class LesaNet(nn.Module):
    """Five scales of a trunk, pooled over the lesion and its surroundings.

    The trunk's parameters have the names that they have in the trunk alone, so that its weights
    are placed here as they are.

    Attributes:
      num_classes: labels K.
      trunk: "vgg16" (LesaNet's), "resnet18" or "maknet".
      trunk_options: attributes of the trunk.
      units: outputs of each scale.
      embedding: length of the embedding.
      frozen: the trunk's weights and statistics stay as they are.
      dtype: of activations; parameters, statistics and scores are float32.
    """

    num_classes: int
    trunk: str = "vgg16"
    trunk_options: Mapping[str, Any] | None = None
    units: int = 256
    embedding: int = 256
    frozen: bool = False
    dtype: Any = jnp.float32

    takes_box: ClassVar[bool] = True

    @nn.compact
    def __call__(self, images, train, box=None):
        """`[B, S, S, 3]` in [0, 1] and boxes `[B, 4]` in its pixels -> `Outputs`.

        `features` is the embedding, of length 1. Without boxes the lesion is the whole patch.
        """
        if self.trunk not in TRUNKS:
            raise InputError(f"trunk {self.trunk!r} is unknown: choose one of {', '.join(TRUNKS)}")
        options = {"num_classes": self.num_classes, "frozen": self.frozen, "dtype": self.dtype}
        try:
            trunk = TRUNKS[self.trunk](**options, **(self.trunk_options or {}))
        except TypeError as error:
            raise InputError(f"trunk {self.trunk}: {error}: see its page for its options") from None
        nn.share_scope(self, trunk)
        batch, size = images.shape[:2]  # the batch may be symbolic, which len() rejects
        whole = jnp.broadcast_to(jnp.float32([0, 0, size, size]), (batch, 4))
        box = whole if box is None else box
        pooled = []
        for number, x in enumerate(trunk(images, train, stages=True)):
            # Trunks halve: a map of 7 pixels is a sixteenth of 120.
            scale = 0.5 ** round(math.log2(size / x.shape[1]))
            parts = roi_max_pool(x, box if number < _CLOSE else whole, scale)
            scale_units = nn.Dense(self.units, dtype=self.dtype, name=f"roi_{number + 1}")
            pooled.append(scale_units(parts.reshape(batch, -1)))
        x = jnp.concatenate(pooled, axis=-1).astype(jnp.float32)
        embedding = layers.score_layer(self.embedding, name="embedding")(x)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(embedding), -1, keepdims=True), 1e-24))
        scores = layers.score_layer(self.num_classes, name="classifier")(x)
        logits = layers.ScorePropagation(name="spl")(scores)
        return layers.Outputs(logits, scores, embedding / norm)
