"""Writes ranger.npz: 60 steps of the package `pytorch-ranger`, an independent Ranger.

Run once, in an environment of its own (Python 3.11, `pip install torch pytorch-ranger`):
  python tests/golden/make_ranger_golden.py
It was made with pytorch-ranger 0.1.1 (the version of September 2019: no gradient centralisation)
and torch 2.13.0 on CPU. tests/test_ranger.py says how close ours has to come.
"""

import pathlib

import numpy as np
import torch
from pytorch_ranger import Ranger

STEPS = 60
LEARNING_RATE = 0.01
# From far below eps (1e-5, where its place in the formula decides the step) to far above.
SHAPES = {"1e-5": (2, 3), "1e-4": (5,), "1e-3": (2, 2, 2, 3), "1e-1": (4,), "1e0": (3, 3)}


def follow(start, gradients, **options):
    """Returns the parameters after every step, [STEPS, ...] by name."""
    params = {name: torch.nn.Parameter(torch.from_numpy(start[name].copy())) for name in start}
    optimizer = Ranger(list(params.values()), lr=LEARNING_RATE, **options)
    visited = {name: [] for name in start}
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = torch.from_numpy(gradients[name][step].copy())
        optimizer.step()
        for name, param in params.items():
            visited[name].append(param.detach().numpy().copy())
    return {name: np.stack(values) for name, values in visited.items()}


def main():
    """Draws starts and gradients, follows them twice and saves all."""
    rng = np.random.default_rng(0)
    start, gradients = {}, {}
    for name, shape in SHAPES.items():
        # Starts as small as the gradients, so that a wrong step is not hidden under the start.
        start[name] = (float(name) * rng.normal(size=shape)).astype(np.float32)
        drawn = rng.normal(size=(STEPS, *shape)) + 0.5 * rng.normal(size=shape)
        gradients[name] = (float(name) * drawn).astype(np.float32)
    arrays = {}
    for kind, values in {
        "start": start,
        "gradients": gradients,
        "params": follow(start, gradients),
        "decayed": follow(start, gradients, weight_decay=0.1, k=5, alpha=0.8),
    }.items():
        arrays |= {f"{kind}/{name}": value for name, value in values.items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("ranger.npz"), **arrays)


if __name__ == "__main__":
    main()
