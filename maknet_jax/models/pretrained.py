"""Trunks of torchvision's and timm's VGG16-BN and ResNet18 as parameters of ours."""

import numpy as np

from maknet_jax.errors import InputError
from maknet_jax.models import resnet, vgg


def _vgg16_layers():
    """Our layer -> (torch convolution, torch BatchNorm); the stages' poolings take a number too."""
    names, number = {}, 0
    for stage, widths in enumerate(vgg.STAGES):
        for layer in range(len(widths)):
            names[f"stage{stage + 1}_{layer}"] = (f"features.{number}", f"features.{number + 1}")
            number += 3  # convolution, BatchNorm, ReLU
        number += 1
    return names


def _resnet18_layers():
    names = {"stem": ("conv1", "bn1")}
    for stage in range(len(resnet.WIDTHS)):
        for block in range(2):
            ours, theirs = f"stage{stage + 1}_{block}", f"layer{stage + 1}.{block}"
            names[f"{ours}/first"] = (f"{theirs}.conv1", f"{theirs}.bn1")
            names[f"{ours}/second"] = (f"{theirs}.conv2", f"{theirs}.bn2")
            if stage and not block:
                names[f"{ours}/shortcut"] = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    return names


LAYERS = {"vgg16": _vgg16_layers, "resnet18": _resnet18_layers}


def trunk_from_torch(name, state_dict):
    """Translates the trunk of a torch state dict.

    Kernels go from OIHW to HWIO. A convolution's bias is folded into the mean of the BatchNorm
    behind it, which gives the same function (VGG16-BN has biases, ours has none).

    Args:
      name: "vgg16" or "resnet18".
      state_dict: torch names -> arrays, as torchvision and timm call them.

    Returns:
      (params, batch_stats, unplaced): nested dicts that hold the trunk only, and the sorted names
      of `state_dict` that have no place in it (the head).

    Raises:
      InputError: no such network, or an array of the trunk is missing or of another shape.
    """
    if name not in LAYERS:
        raise InputError(f"no torch trunk of {name!r} is known: {', '.join(LAYERS)} are")
    params, batch_stats, placed = {}, {}, set()

    def take(key, ndim):
        if key not in state_dict:
            raise InputError(f"{key} is missing: no {name} of torchvision or timm")
        array = np.asarray(state_dict[key], np.float32)
        if array.ndim != ndim:
            raise InputError(f"{key} has shape {array.shape}: {ndim} dimensions were expected")
        placed.add(key)
        return array

    for path, (conv, norm) in LAYERS[name]().items():
        kernel = take(f"{conv}.weight", 4).transpose(2, 3, 1, 0)
        mean = take(f"{norm}.running_mean", 1)
        if f"{conv}.bias" in state_dict:
            mean = mean - take(f"{conv}.bias", 1)
        scale = {"scale": take(f"{norm}.weight", 1), "bias": take(f"{norm}.bias", 1)}
        _put(params, path, {"conv": {"kernel": kernel}, "norm": scale})
        _put(batch_stats, path, {"norm": {"mean": mean, "var": take(f"{norm}.running_var", 1)}})
        placed.add(f"{norm}.num_batches_tracked")
    return params, batch_stats, sorted(set(state_dict) - placed)


def _put(tree, path, leaves):
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = leaves
