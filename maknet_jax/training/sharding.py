"""One mesh axis, `data`: batches are split over it, the state is replicated."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")  # a pytree; functions return the same structure


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes (or `devices`), axis `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_state(mesh: Mesh, tree: Tree) -> Tree:
    """Replicates a tree of arrays; every process passes the same values."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays; non-numeric fields (`id`) are dropped."""
    sharding = split(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
        if value.dtype.kind in "biuf"
    }


def gather(tree: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Global arrays -> NumPy arrays of all rows, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def host_copy(tree: Tree) -> Tree:
    """Copies of replicated arrays as NumPy arrays, which stay when a step donates the tree."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return jax.tree.map(np.array, tree)


def wait_for_all(name: str) -> None:
    """Blocks until every process has called it; returns immediately if there is only one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """True on every process if `flag` is true on any; a collective if there are several."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def exchange(value: Any) -> list[Any]:
    """The JSON values that the processes pass, in their order; a collective if there are several.

    Args:
      value: of this process.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([content.size])).ravel()
    row = np.pad(content, (0, int(sizes.max()) - content.size))
    rows = multihost_utils.process_allgather(row).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def round_up_to_devices(batch_size: int, devices: int | None = None) -> int:
    """`batch_size` rounded up to a multiple of the number of devices (None: all), for scoring."""
    devices = devices or jax.device_count()
    return -(-batch_size // devices) * devices
