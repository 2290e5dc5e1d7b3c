"""Converts trunks of torchvision's and timm's VGG16-BN and ResNet18 to this package's names.

`training/transfer.py` places weights in a network and reads and writes the package's own format.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.models import resnet, vgg

# torchvision's weights, and most of timm's, expect (image - mean) / std of images in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Layer of this package -> (torch's convolution, torch's BatchNorm).
Names = dict[str, tuple[str, str]]


def _vgg16_layers() -> Names:
    """The names of VGG16; torch numbers all layers, including activations and poolings."""
    names: Names = {}
    number = 0
    for stage, widths in enumerate(vgg.STAGES):
        for layer in range(len(widths)):
            names[f"stage{stage + 1}_{layer}"] = (f"features.{number}", f"features.{number + 1}")
            number += 3  # convolution, BatchNorm, ReLU
        number += 1  # pooling
    return names


def _resnet18_layers() -> Names:
    names: Names = {"stem": ("conv1", "bn1")}
    for stage in range(len(resnet.WIDTHS)):
        for block in range(2):
            name, torch_name = f"stage{stage + 1}_{block}", f"layer{stage + 1}.{block}"
            names[f"{name}/first"] = (f"{torch_name}.conv1", f"{torch_name}.bn1")
            names[f"{name}/second"] = (f"{torch_name}.conv2", f"{torch_name}.bn2")
            if stage and not block:
                names[f"{name}/shortcut"] = (
                    f"{torch_name}.downsample.0",
                    f"{torch_name}.downsample.1",
                )
    return names


LAYERS: dict[str, Callable[[], Names]] = {"vgg16": _vgg16_layers, "resnet18": _resnet18_layers}


def trunk_from_torch(
    name: str,
    state_dict: Mapping[str, np.ndarray],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Converts the trunk of a torch state dict.

    Kernels are transposed from OIHW to HWIO. The bias of a convolution is folded into the mean of
    the BatchNorm after it, which computes the same function (VGG16-BN has biases, `models.VGG16`
    has none).

    Args:
      name: "vgg16" or "resnet18".
      state_dict: torchvision's or timm's names -> arrays. If all names start with "module."
        (torch's DataParallel), the prefix is removed, also in errors and `unplaced`.
      mean: three numbers, subtracted from the images in [0, 1] that the weights were trained on.
      std: three numbers, by which the images were then divided.

    Returns:
      (params, batch_stats, unplaced): nested dicts of float32 arrays of the trunk only, `mean` and
      `std` among the statistics, and the sorted names in `state_dict` that are not part of the
      trunk (the head).

    Raises:
      InputError: an unknown network; an array of the trunk is missing, unexpected, of another
        shape or not finite; or `mean` or `std` is not three finite numbers, std above 0.
    """
    if name not in LAYERS:
        raise InputError(f"torch trunk {name!r} is unknown: choose one of {', '.join(LAYERS)}")
    norm = {"mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}
    whole = all(values.shape == (3,) and np.isfinite(values).all() for values in norm.values())
    if not whole or (norm["std"] <= 0).any():
        shown = " and ".join(f"{key} {values.tolist()}" for key, values in norm.items())
        raise InputError(f"{shown} should each be three finite numbers, std above 0")
    if all(key.startswith("module.") for key in state_dict):  # saved from torch's DataParallel
        state_dict = {key.removeprefix("module."): array for key, array in state_dict.items()}
    model = models.build(name, 1)
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    kernels = traverse_util.flatten_dict(like["params"], sep="/")
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {"input": norm}
    placed = set()
    expected = f"use the weights of torchvision's or timm's {name}, with BatchNorm"

    def take(key: str, *shape: int) -> np.ndarray:
        if key not in state_dict:
            raise InputError(f"{key} is missing: {expected}")
        array = np.asarray(state_dict[key], np.float32)
        if array.shape != shape:
            raise InputError(f"{key} has shape {array.shape}, not {shape}: {expected}")
        if not np.isfinite(array).all():
            raise InputError(f"{key} holds NaN or infinity: {expected}")
        placed.add(key)
        return array

    for path, (conv, bn) in LAYERS[name]().items():
        height, width, inputs, outputs = kernels[f"{path}/conv/kernel"].shape
        kernel = take(f"{conv}.weight", outputs, inputs, height, width).transpose(2, 3, 1, 0)
        running_mean = take(f"{bn}.running_mean", outputs)
        if f"{conv}.bias" in state_dict:
            running_mean = running_mean - take(f"{conv}.bias", outputs)
        scale = {"scale": take(f"{bn}.weight", outputs), "bias": take(f"{bn}.bias", outputs)}
        _put(params, path, {"conv": {"kernel": kernel}, "norm": scale})
        running_var = take(f"{bn}.running_var", outputs)
        _put(batch_stats, path, {"norm": {"mean": running_mean, "var": running_var}})
        placed.add(f"{bn}.num_batches_tracked")
    unplaced = sorted(set(state_dict) - placed)
    trunk = {key.split(".")[0] for key in placed}
    for key in unplaced:  # ResNet34 has all names and shapes of ResNet18, and more
        if key.split(".")[0] in trunk:
            raise InputError(f"{key} is not part of {name}: {expected}")
    return params, batch_stats, unplaced


def _put(tree: dict[str, Any], path: str, leaves: dict[str, Any]) -> None:
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = leaves
