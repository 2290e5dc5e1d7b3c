"""Weights and an image drawn by NumPy alone, so that torch and we start from the same numbers."""

import pathlib
import zlib

import numpy as np


def draw(shapes):
    """Torch names -> float32 arrays of a plausible size, each from a seed of its own name."""
    arrays = {}
    for key, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            arrays[key] = np.asarray(7, np.int64)
        elif len(shape) == 4:
            scale = np.sqrt(2.0 / np.prod(shape[1:]))
            arrays[key] = (scale * rng.standard_normal(shape)).astype(np.float32)
        elif key.endswith(("running_var", "weight")):
            arrays[key] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:  # biases and running means
            arrays[key] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def image():
    """Two images, float32 [2, 70, 64, 3]: an odd size finds grids that are shifted."""
    return np.random.default_rng(1).uniform(0, 1, (2, 70, 64, 3)).astype(np.float32)


def golden(name):
    """The weights that `make_networks_golden.py` gave to torch, and torch's features of `image`."""
    saved = np.load(pathlib.Path(__file__).with_name("networks.npz"))
    shapes = {
        str(key): tuple(int(part) for part in str(shape).split(",") if part)
        for key, shape in zip(saved[f"{name}_keys"], saved[f"{name}_shapes"], strict=True)
    }
    return draw(shapes), saved[f"{name}_features"]
