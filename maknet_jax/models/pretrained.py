"""Trunks of torchvision's and timm's VGG16-BN and ResNet18 as parameters of ours."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.models import resnet, vgg

# What torchvision's weights, and most of timm's, saw: (image - mean) / std of images in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def trunk_from_torch(name, state_dict, *, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Translates the trunk of a torch state dict.

    Kernels go from OIHW to HWIO. A convolution's bias is folded into the mean of the BatchNorm
    behind it, which gives the same function (VGG16-BN has biases, ours has none).

    Args:
      name: "vgg16" or "resnet18".
      state_dict: torch names -> arrays, as torchvision and timm call them. Where all begin with
        "module." (torch's DataParallel), that is left off, in errors and `unplaced` too.
      mean: three numbers, what the weights' images in [0, 1] were centred by.
      std: three numbers, what they were divided by then.

    Returns:
      (params, batch_stats, unplaced): nested dicts of float32 that hold the trunk only, `mean` and
      `std` among the statistics, and the sorted names of `state_dict` that have no place in it
      (the head).

    Raises:
      InputError: no such network, an array of the trunk is missing, of another shape, not finite
        or one too many, or `mean` and `std` are no normalisation.
    """
    if name not in LAYERS:
        raise InputError(f"no torch trunk of {name!r} is known: {', '.join(LAYERS)} are")
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not (mean.shape == std.shape == (3,) and np.isfinite([mean, std]).all() and (std > 0).all()):
        raise InputError(
            f"mean {mean.tolist()} and std {std.tolist()} should be three numbers each, std above 0"
        )
    if all(key.startswith("module.") for key in state_dict):  # saved from torch's DataParallel
        state_dict = {key.removeprefix("module."): array for key, array in state_dict.items()}
    model = models.build(name, 1)
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    kernels = traverse_util.flatten_dict(like["params"], sep="/")
    params, batch_stats, placed = {}, {"input": {"mean": mean, "std": std}}, set()
    expected = f"take the weights of torchvision's or timm's {name}, with BatchNorm"

    def take(key, *shape):
        if key not in state_dict:
            raise InputError(f"{key} is missing: {expected}")
        array = np.asarray(state_dict[key], np.float32)
        if array.shape != shape:
            raise InputError(f"{key} has shape {array.shape}, not {shape}: {expected}")
        if not np.isfinite(array).all():
            raise InputError(f"{key} holds NaN or infinity: {expected}")
        placed.add(key)
        return array

    for path, (conv, norm) in LAYERS[name]().items():
        height, width, inputs, outputs = kernels[f"{path}/conv/kernel"].shape
        kernel = take(f"{conv}.weight", outputs, inputs, height, width).transpose(2, 3, 1, 0)
        running_mean = take(f"{norm}.running_mean", outputs)
        if f"{conv}.bias" in state_dict:
            running_mean = running_mean - take(f"{conv}.bias", outputs)
        scale = {"scale": take(f"{norm}.weight", outputs), "bias": take(f"{norm}.bias", outputs)}
        _put(params, path, {"conv": {"kernel": kernel}, "norm": scale})
        running_var = take(f"{norm}.running_var", outputs)
        _put(batch_stats, path, {"norm": {"mean": running_mean, "var": running_var}})
        placed.add(f"{norm}.num_batches_tracked")
    unplaced = sorted(set(state_dict) - placed)
    trunk = {key.split(".")[0] for key in placed}
    for key in unplaced:  # ResNet34 holds all of ResNet18, shapes and names, and more
        if key.split(".")[0] in trunk:
            raise InputError(f"{key} has no place in {name}: {expected}")
    return params, batch_stats, unplaced


def _put(tree, path, leaves):
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = leaves
