"""Weights that a training starts from: their file, and how they are put into a network."""

import hashlib
import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from maknet_jax import files
from maknet_jax.errors import InputError
from maknet_jax.training import checkpoint

FORMAT = "maknet-jax weights 1"
HEAD = ("classifier", "spl")


def place(variables, params, batch_stats, *, head):
    """Puts weights in the place of a network's own.

    Args:
      variables: the network's params and batch_stats, arrays or `jax.ShapeDtypeStruct`.
      params: nested arrays, each of which must have its place.
      batch_stats: the same of the statistics.
      head: False leaves out the classifier and the score propagation.

    Returns:
      (variables, placed, fresh): the variables with NumPy arrays where weights were given, and the
      sorted paths ("params/stem/conv/kernel") that were given and that stay as they were.

    Raises:
      InputError: nothing is left to place, or an array has no place or another shape there.
    """
    given = _named({"params": params, "batch_stats": batch_stats})
    given = {name: leaf for name, leaf in given.items() if head or name.split("/")[1] not in HEAD}
    own = _named(variables)
    lacking = sorted(given.keys() - own.keys())
    if lacking or not given:
        lost = f"{lacking[0]} of the weights has" if lacking else "the weights have"
        raise InputError(
            f"{lost} no place in this network: take the config of the network that they are of"
        )
    for name in given:
        if given[name].shape != own[name].shape:
            mend = ", or leave the head out (init.head)" if name.split("/")[1] in HEAD else ""
            raise InputError(
                f"{name} is {given[name].shape} in the weights, {own[name].shape} in this network: "
                f"take the config of the network that they are of{mend}"
            )
    leaves = [
        np.asarray(given[name], leaf.dtype) if name in given else leaf for name, leaf in own.items()
    ]
    placed = jax.tree.unflatten(jax.tree.structure(variables), leaves)
    return placed, sorted(given), sorted(own.keys() - given.keys())


def _named(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest(params, batch_stats):
    """SHA-256 over names, types, shapes and bytes of the arrays: the same from file or workdir."""
    each = checkpoint.digests({"params": params, "batch_stats": batch_stats})
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def write(path, params, batch_stats, metadata):
    """Writes weights as safetensors, whole or not at all.

    `metadata` maps text to text; returned as it was written, with the format and the digest.
    """
    arrays = _named({"params": params, "batch_stats": batch_stats})
    # safetensors writes the memory of an array: a transposed one would be stored scrambled.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = metadata | {"format": FORMAT, "digest": digest(params, batch_stats)}
    with files.write_whole(path, "wb") as file:
        file.write(safetensors.numpy.save(arrays, metadata))
    return metadata


def read(path):
    """The inverse of `write`.

    Returns:
      (params, batch_stats, metadata).

    Raises:
      InputError: it is no such file, or its arrays are not those that were written.
    """
    arrays, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds no weights of ours: run `maknet import-weights` on it first"
        )
    tree = {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(arrays, sep="/")
    if digest(**tree) != metadata["digest"]:
        raise InputError(f"{path} is damaged, its arrays differ from their digest: import it again")
    return tree["params"], tree["batch_stats"], metadata


def read_safetensors(path):
    """Reads any safetensors file: (name -> NumPy array, metadata).

    Raises:
      InputError: it is none, a damaged one, or a pickle of torch, which is never opened.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file: give a .safetensors file")
    with path.open("rb") as file:
        head = file.read(4)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, TypeError) as error:
        reason = " ".join(str(error).split())
    if head == b"PK\x03\x04" or head[:1] == b"\x80":  # what torch.save wrote and writes
        raise InputError(
            f"{path} is a pickle, which could run anything: convert it where you trust it, with "
            f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path}', "
            f"weights_only=True), '{path.with_suffix('.safetensors')}')\""
        )
    raise InputError(f"{path} is no whole safetensors file ({reason}): give one, or fetch it again")
