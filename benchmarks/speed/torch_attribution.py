"""Captum's Integrated Gradients of the networks of torch_networks.py, for attribution.py.

Needs torch, captum and NumPy only.
"""

import torch
from captum.attr import IntegratedGradients

from benchmarks.speed import torch_networks


class Explained(torch_networks.Timed):
    """A network whose probabilities of some labels are attributed, from black."""

    def _maps(self, method, labels):
        def forward(images):
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
                    n_steps=self.about["steps"],
                    method=method,
                    internal_batch_size=self.about["chunk"],
                )
                for label in labels
            ],
            1,
        ).permute(0, 1, 3, 4, 2)

    def gauss(self):
        """Maps `[B, T, S, S, 3]` of all labels by Gauss-Legendre."""
        return self._maps("gausslegendre", self.about["labels"])

    def midpoint(self):
        """The same by midpoints."""
        return self._maps("riemann_middle", self.about["labels"])

    def one(self):
        """For the clock: one label."""
        return self._maps("riemann_middle", self.about["labels"][:1])[0, 0, 0, 0]

    def several(self):
        """For the clock: all labels, one call each, as Captum wants it."""
        return self._maps("riemann_middle", self.about["labels"])[0, 0, 0, 0]


if __name__ == "__main__":
    torch_networks.Timed = Explained
    torch_networks.main()
