"""LesaNet on VGG16 in PyTorch, the process of lesanet_against_pytorch.py.

Needs torch and NumPy only. Losses and ROI pooling are those of `maknet_jax.training.lesion_losses`
and `models.lesanet`, written as is usual in PyTorch: a loop over boxes, samples from torch's
generator.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed import torch_networks

BINS, BOX_STAGES, SCALES = 5, 3, (1, 2, 4, 8, 16)
LARGEST_LOGIT = math.log((1 - 1e-7) / 1e-7)  # the published code clamps probabilities


def roi_max_pool(x: torch.Tensor, box: torch.Tensor, scale: int) -> torch.Tensor:
    """Pools each box into 5 x 5 bins.

    Args:
      x: feature maps `[B, C, H, W]`.
      box: x0, y0, x1, y1 `[B, 4]` in pixels of the image.
      scale: pixels of the image per position of the map.

    Returns:
      `[B, 25 C]`.
    """
    x = F.pad(x, (0, 2, 0, 2), value=-torch.inf)  # a box may extend beyond the map
    corners = (box / scale + 0.5).floor().long().tolist()
    parts = [
        F.adaptive_max_pool2d(one[:, y0 : y1 + 1, x0 : x1 + 1], BINS)
        for one, (x0, y0, x1, y1) in zip(x, corners, strict=True)
    ]
    parts = torch.stack(parts).permute(0, 2, 3, 1).flatten(1)
    return torch.where(parts.isinf(), 0.0, parts)  # bins outside the map


class LesaNet(torch_networks.VGG16Trunk):
    """`maknet_jax.models.LesaNet` on VGG16."""

    def __init__(
        self,
        labels: int,
        *,
        trunk: str,
        trunk_options: Mapping[str, Any],
        units: int,
        embedding: int,
    ) -> None:
        super().__init__(len(SCALES) * units, labels, 0.0, spl=True)
        if trunk != "vgg16" or trunk_options:
            raise ValueError(f"trunk {trunk!r} with {trunk_options}: only plain VGG16 is supported")
        for stage, width in enumerate(self.WIDTHS):
            self.add_module(f"roi_{stage + 1}", nn.Linear(BINS * BINS * width, units))
        self.embedding = nn.Linear(len(SCALES) * units, embedding)

    def forward(self, images: torch.Tensor, box: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images in [0, 1] and boxes -> (logits, scores before propagation, embedding)."""
        whole = torch.tensor([0.0, 0.0, *images.shape[2:]]).expand_as(box)
        pooled = []
        for number, x in enumerate(self.stages(images)):
            parts = roi_max_pool(x, box if number < BOX_STAGES else whole, SCALES[number])
            pooled.append(getattr(self, f"roi_{number + 1}")(parts))
        x = torch.cat(pooled, 1)
        return *self.scores(x), F.normalize(self.embedding(x), dim=1)


class Timed(torch_networks.Timed):
    """LesaNet with its weights, batch, losses and SGD; its methods are the timed steps."""

    def __init__(self, file: str, settings: Mapping[str, Any]) -> None:
        super().__init__(file, settings)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)

    def predict(self) -> torch.Tensor:
        """Logits `[B, K]`."""
        self.network.eval()
        with torch.inference_mode():
            return self.network(self.images(), self.batch["box"])[0]

    def cross_entropy(self) -> torch.Tensor:
        """The terms of the training loss that do not sample, without an update."""
        self.network.train()
        logits, before, _ = self.network(self.images(), self.batch["box"])
        return self._cross_entropy(logits, before).detach()

    def train(self) -> torch.Tensor:
        """Runs one training step and returns the loss."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits, before, embedding = self.network(self.images(), self.batch["box"])
        loss = self._cross_entropy(logits, before)
        loss = loss + self._hard_examples(before) + 5.0 * self._triplets(embedding)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimizer.step()
        return loss.detach()

    def _cross_entropy(self, *heads: torch.Tensor) -> torch.Tensor:
        clamped = (scores.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) for scores in heads)
        return sum(torch_networks.focal_loss(scores, self.batch, 0.0) for scores in clamped)

    def _hard_examples(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        labels = self.batch["labels"]
        error = (torch.sigmoid(logits) - labels).abs() * (labels > 0)  # no exclusive labels
        samples = torch.multinomial((error**2).detach().flatten(), 10_000, replacement=True)
        values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return values.flatten()[samples].mean()

    def _triplets(self, embedding: torch.Tensor) -> torch.Tensor:
        labels, count = self.batch["labels"], len(embedding)
        common, size = labels @ labels.T, labels.sum(1)
        similarity = common**2 / (size[:, None] + size - common).clamp(min=1)
        anchor = torch.randint(count, (5_000,))
        rows = similarity[anchor]
        others = torch.arange(count) != anchor[:, None]

        def draw(candidates: torch.Tensor, fallback: torch.Tensor) -> torch.Tensor:
            random = torch.where(candidates, torch.rand(candidates.shape), -1.0).argmax(1)
            return torch.where(candidates.any(1), random, fallback)

        positive = draw(others & (rows >= 1), torch.where(others, rows, -1.0).argmax(1))
        chosen = rows.gather(1, positive[:, None])
        negative = draw(others & (rows < chosen), torch.where(others, rows, torch.inf).argmin(1))
        far = F.pairwise_distance(embedding[anchor], embedding[negative])
        near = F.pairwise_distance(embedding[anchor], embedding[positive])
        return F.relu(near - far + 0.1).mean()


if __name__ == "__main__":
    torch_networks.NETWORKS["lesanet"] = LesaNet
    torch_networks.main(Timed)
