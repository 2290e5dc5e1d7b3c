"""Digests of the arrays and the metadata of a checkpoint."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maknet_jax.training.state import TrainState

# The parts of a path of `jax.tree_util.keystr`: .params['stem']['conv']['kernel'].
_NAME = re.compile(r"^\.(\w+)|\['(.*?)'\]")


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the digests and the metadata of a checkpoint."""
    values = [content["digests"], content["meta"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_content(content: Mapping[str, Any]) -> None:
    """Compares the metadata with their digest; earlier versions stored none.

    Raises:
      ValueError: they differ.
    """
    if content.get("sha256", content_digest(content)) != content_digest(content):
        raise ValueError("the metadata do not match their digest")


def check_digests(state: TrainState, expected: Mapping[str, str]) -> None:
    """Compares the arrays of a state with their digests.

    Raises:
      ValueError: they differ, or a value is not finite.
    """
    if name := first_nonfinite(state):  # earlier versions saved such states
        raise ValueError(f"{name} is not finite")
    actual = digests(state)
    if actual != expected:
        wrong = [name for name in expected if actual.get(name) != expected[name]]
        raise ValueError(f"{len(wrong)} arrays do not match their digest, first {wrong[:1]}")


def first_nonfinite(tree: Any) -> str | None:
    """The path of the first array with a value that is not finite; None if all are finite."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(np.asarray(leaf)).all():
            return jax.tree_util.keystr(path)
    return None


def digests(tree: Any) -> dict[str, str]:
    """Path of each array in a pytree -> SHA-256 of its type, shape and bytes.

    The arrays must be fully replicated.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    result = {}
    for path, leaf in leaves:
        array = np.asarray(leaf)
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # without a copy
        result[jax.tree_util.keystr(path)] = digest.hexdigest()
    return result


def tree_of(names: Iterable[str]) -> dict[str, Any]:
    """The nested dicts that the keys of `digests` name, with 0 in place of each array."""
    tree: dict[str, Any] = {}
    for name in names:
        *groups, last = (field or key for field, key in _NAME.findall(name))
        inner = functools.reduce(lambda node, group: node.setdefault(group, {}), groups, tree)
        inner[last] = 0
    return tree


def check_shapes(state: TrainState, like: TrainState) -> None:
    """Compares shapes: Orbax silently restores an array whose shape is not the requested one.

    Raises:
      ValueError: an array has another shape.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(like)
    for (path, leaf), array in zip(leaves, jax.tree.leaves(state), strict=True):
        if array.shape != leaf.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"another network: {name} is {array.shape}, not {leaf.shape}")
