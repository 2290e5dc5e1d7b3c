"""Integrated Gradients by Captum, the process of against_captum.py.

Needs torch, captum and NumPy only. The networks are those of torch_networks.py.
"""

from collections.abc import Sequence

import torch
from captum.attr import IntegratedGradients

from benchmarks.speed import torch_networks


class Explained(torch_networks.Timed):
    """A network with attributions of its probabilities, baseline black; methods are timed."""

    def _maps(self, method: str, labels: Sequence[int]) -> torch.Tensor:
        """Maps `[B, T, S, S, 3]` of the labels; Captum takes one label per call."""

        def forward(images: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.network(images)[0])

        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        images, explainer = self.images(), IntegratedGradients(forward)
        return torch.stack(
            [
                explainer.attribute(
                    images,
                    torch.zeros_like(images),
                    target=label,
                    n_steps=self.settings["steps"],
                    method=method,
                    internal_batch_size=self.settings["chunk"],
                )
                for label in labels
            ],
            1,
        ).permute(0, 1, 3, 4, 2)

    def gauss(self) -> torch.Tensor:
        """Maps `[B, T, S, S, 3]` of all labels by the Gauss-Legendre rule."""
        return self._maps("gausslegendre", self.settings["labels"])

    def midpoint(self) -> torch.Tensor:
        """Maps `[B, T, S, S, 3]` of all labels by the midpoint rule."""
        return self._maps("riemann_middle", self.settings["labels"])

    def one(self) -> torch.Tensor:
        """Explains one label; returns one pixel, for timing only."""
        return self._maps("riemann_middle", self.settings["labels"][:1])[0, 0, 0, 0]

    def several(self) -> torch.Tensor:
        """Explains all labels; returns pixels, for timing only."""
        return self._maps("riemann_middle", self.settings["labels"])[0, 0, 0, 0]


if __name__ == "__main__":
    torch_networks.main(Explained)
