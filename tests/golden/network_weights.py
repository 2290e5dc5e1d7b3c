"""Weights and an image drawn by NumPy alone, so that torch and we start from the same numbers."""

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
