"""`maknet import-weights`: a trunk of torchvision or timm as weights that `train` starts from."""

import hashlib
import pathlib

import jax

from maknet_jax.errors import InputError
from maknet_jax.models import pretrained
from maknet_jax.training import transfer


def import_weights(
    source, out, *, model, mean=pretrained.IMAGENET_MEAN, std=pretrained.IMAGENET_STD
):
    """Translates a safetensors file of torch into one of ours; the head is left behind.

    Args:
      source: the .safetensors file of torchvision's or timm's VGG16-BN or ResNet18.
      out: the file to write, for `init.path` of a config.
      model: "vgg16" or "resnet18".
      mean: three numbers, what the images in [0, 1] were centred by when it was trained.
      std: three numbers, what they were divided by.

    Returns:
      A dict: the file, how many of its arrays were `placed`, which of the source are `unplaced`,
      and the `digest` of the arrays, which a training from them repeats.

    Raises:
      InputError: the file is no such network's.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    arrays, _ = transfer.read_safetensors(source)
    if out.exists() and out.samefile(source):
        raise InputError(f"{out} is the source itself: choose another --out")
    try:
        params, batch_stats, unplaced = pretrained.trunk_from_torch(
            model, arrays, mean=mean, std=std
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"model": model, "source": source.name, "source_sha256": sha256}
    about = transfer.write(out, params, batch_stats, about)
    placed = len(jax.tree.leaves((params, batch_stats)))
    return about | {"out": str(out), "placed": placed, "unplaced": unplaced}
