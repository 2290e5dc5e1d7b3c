"""`maknet import-weights`: a trunk of torchvision or timm as initial weights for `train`."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from maknet_jax.errors import InputError
from maknet_jax.models import pretrained
from maknet_jax.training import transfer


def import_weights(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    model: str,
    mean: Sequence[float] = pretrained.IMAGENET_MEAN,
    std: Sequence[float] = pretrained.IMAGENET_STD,
) -> dict[str, Any]:
    """Converts the trunk in a PyTorch safetensors file; the head is dropped.

    Args:
      source: the .safetensors file of torchvision's or timm's VGG16-BN or ResNet18.
      out: the file to write, for `init.path` of a config.
      model: "vgg16" or "resnet18".
      mean: three numbers, subtracted from the images in [0, 1] that the weights were trained on.
      std: three numbers, by which the images were then divided.

    Returns:
      The metadata of the file, including the `digest` of the arrays, which runs that start from
      them record; and `out`, the number of arrays `placed`, and the `unplaced` names of the source.

    Raises:
      InputError: `source` is not a safetensors file of that network, or is `out` itself.
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
    metadata = {"model": model, "source": source.name, "source_sha256": sha256}
    metadata = transfer.write(out, params, batch_stats, metadata)
    placed = len(jax.tree.leaves((params, batch_stats)))
    return metadata | {"out": str(out), "placed": placed, "unplaced": unplaced}
