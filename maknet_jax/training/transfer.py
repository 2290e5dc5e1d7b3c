"""Initial weights in the format of this package: files, digests and placement in a network.

`models.pretrained` converts weights of other packages.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from maknet_jax import files
from maknet_jax.errors import InputError
from maknet_jax.training import checkpoint
from maknet_jax.training.state import Variables

FORMAT = "maknet-jax weights 1"
HEAD = ("classifier", "spl")
# Of weights; integers occur as counters, such as BatchNorm's num_batches_tracked.
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def place(
    variables: Variables, params: Variables, batch_stats: Variables, *, head: bool
) -> tuple[Variables, list[str], list[str]]:
    """Replaces a network's variables with other weights.

    Args:
      variables: the network's params and batch_stats, arrays or `jax.ShapeDtypeStruct`.
      params: nested arrays, each of which must have a counterpart in `variables`.
      batch_stats: nested arrays of the statistics, likewise.
      head: False omits the classifier and the score propagation.

    Returns:
      (variables, placed, fresh): the variables with NumPy arrays where weights were placed, and the
      sorted paths ("params/stem/conv/kernel") that were placed and that were not changed.

    Raises:
      InputError: there is nothing to place, or an array has no counterpart or another shape.
    """
    new = named({"params": params, "batch_stats": batch_stats})
    new = {name: leaf for name, leaf in new.items() if head or name.split("/")[1] not in HEAD}
    old = named(variables)
    lacking = sorted(new.keys() - old.keys())
    if lacking or not new:
        subject = f"{lacking[0]} of the weights has" if lacking else "the weights have"
        raise InputError(
            f"{subject} no counterpart in this network: use the config of the network of the "
            "weights"
        )
    for name in new:
        if new[name].shape != old[name].shape:
            hint = ", or set init.head to False" if name.split("/")[1] in HEAD else ""
            raise InputError(
                f"{name} is {new[name].shape} in the weights, {old[name].shape} in this network: "
                f"use the config of the network of the weights{hint}"
            )
    leaves = [
        np.asarray(new[name], leaf.dtype) if name in new else leaf for name, leaf in old.items()
    ]
    placed = jax.tree.unflatten(jax.tree.structure(variables), leaves)
    return placed, sorted(new), sorted(old.keys() - new.keys())


def named(tree: Variables) -> dict[str, Any]:
    """Path ("params/stem/conv/kernel") -> leaf, in the order of the tree's leaves."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def share_head(
    variables: Variables, params: Variables, columns: Sequence[tuple[int, int]], labels: int
) -> Variables:
    """Copies the part of another network's head that belongs to shared labels.

    In the head's arrays (`HEAD`), whose last axis is the labels, the entries of shared labels (in
    the score propagation: of pairs of shared labels) are taken from the other network. All other
    entries keep their initial values.

    Args:
      variables: the network's variables: arrays, or `jax.ShapeDtypeStruct`, treated as zeros.
      params: the other network's.
      columns: (column here, column there) of each shared label.
      labels: the number of labels here.

    Returns:
      `params` with a head for `place(..., head=True)`.

    Raises:
      InputError: the other network has no head, or one of another kind or of other features.
    """
    here, there = (np.asarray(side, int) for side in zip(*columns, strict=True))
    merged = dict(params)
    for part in HEAD:
        new = named({part: variables["params"].get(part, {})})
        old = named({part: params.get(part, {})})
        if new.keys() != old.keys():
            raise InputError(
                f"the weights have no {part} of the same structure as this network's: set "
                "init.shared_labels to False"
            )
        tree = {}
        for name, leaf in new.items():
            array = np.zeros(leaf.shape, leaf.dtype)
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                array = np.array(leaf)
            if part == "spl" and array.ndim == 2:
                array[np.ix_(here, here)] = old[name][np.ix_(there, there)]
            elif array.shape[:-1] == old[name].shape[:-1] and array.shape[-1] == labels:
                array[..., here] = old[name][..., there]
            else:
                raise InputError(
                    f"{name} is {old[name].shape} in the weights, {leaf.shape} in this network: "
                    "set init.shared_labels to False"
                )
            tree[name] = array
        if tree:
            merged |= traverse_util.unflatten_dict(tree, sep="/")
    return merged


def digest(params: Variables, batch_stats: Variables) -> str:
    """SHA-256 over names, types, shapes and bytes of the arrays; equal for file and workdir."""
    each = checkpoint.digests({"params": params, "batch_stats": batch_stats})
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def write(
    path: str | os.PathLike[str],
    params: Variables,
    batch_stats: Variables,
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Writes weights as safetensors, atomically.

    Returns:
      The metadata as written, with the format and the digest.
    """
    payload, complete = encode(params, batch_stats, metadata)
    with files.write_whole(path, "wb") as file:
        file.write(payload)
    return complete


def encode(
    params: Variables, batch_stats: Variables, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, str]]:
    """(the bytes of the file, the metadata in it), as `write` writes them."""
    complete = {**metadata, "format": FORMAT, "digest": digest(params, batch_stats)}
    return encode_arrays(named({"params": params, "batch_stats": batch_stats}), complete), complete


def encode_arrays(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file.

    Equal content gives equal bytes: safetensors itself writes metadata in random order.
    """
    # safetensors writes the memory of an array: a transposed one would be stored scrambled.
    payload = safetensors.numpy.save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}
    )
    end = 8 + int.from_bytes(payload[:8], "little")  # the header is its length, then JSON
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(payload[8:end])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # arrays stay aligned
    return len(text).to_bytes(8, "little") + text + payload[end:]


def read(path: str | os.PathLike[str]) -> tuple[Variables, Variables, dict[str, Any]]:
    """The inverse of `write`.

    Returns:
      (params, batch_stats, metadata).

    Raises:
      InputError: the file has another format, or its arrays differ from their digest.
    """
    arrays, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} is not in maknet-jax format: run `maknet import-weights` on it first"
        )
    tree = {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(arrays, sep="/")
    if len(tree) != 2 or digest(**tree) != metadata.get("digest"):
        raise InputError(
            f"{path} is damaged, its arrays do not match their digest: import it again"
        )
    return tree["params"], tree["batch_stats"], metadata


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads any safetensors file: (name -> NumPy array, metadata).

    Raises:
      InputError: the file is damaged or of another format, or has a dtype without a NumPy type,
        such as 8-bit floats; a pickle of torch is never opened.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} not found: pass a .safetensors file")
    with path.open("rb") as file:
        head = file.read(4)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise InputError(
                        f"{path}: {name} has dtype {dtype}, expected {', '.join(DTYPES[:4])}: "
                        "convert the weights to one of these first"
                    )
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, TypeError) as error:
        reason = " ".join(str(error).split())
    if head == b"PK\x03\x04" or head[:1] == b"\x80":  # the formats of torch.save, new and old
        raise InputError(
            f"{path} is a pickle, which can execute any code: if you trust it, convert it with "
            f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path}', "
            f"weights_only=True), '{path.with_suffix('.safetensors')}')\""
        )
    raise InputError(f"{path} is not a valid safetensors file ({reason}): download it again")
