"""The mesh: batches are split over it in order, the state is the same everywhere."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maknet_jax.training import sharding


@pytest.fixture(params=[1, 2, 8])
def mesh(request):
    return sharding.data_mesh(jax.devices()[: request.param])


def test_mesh_takes_all_devices_or_those_given():
    assert len(jax.devices()) == 8  # conftest's
    assert sharding.data_mesh().axis_names == ("data",)
    assert list(sharding.data_mesh().devices) == jax.devices()
    assert list(sharding.data_mesh(jax.devices()[2:4]).devices) == jax.devices()[2:4]


def test_batch_is_split_in_order_and_comes_back(mesh):
    batch = {
        "image": np.arange(16 * 2 * 2 * 3, dtype=np.int16).reshape(16, 2, 2, 3),
        "weight": np.ones(16, np.float32),
        "id": np.array([f"name {k}" for k in range(16)]),
    }
    placed = sharding.put_batch(mesh, batch)
    assert set(placed) == {"image", "weight"}  # strings are dropped
    assert placed["image"].sharding.spec == PartitionSpec("data")
    rows = 16 // mesh.size
    for number, shard in enumerate(placed["image"].addressable_shards):
        assert shard.device == mesh.devices[number]
        np.testing.assert_array_equal(shard.data, batch["image"][number * rows :][:rows])
    back = sharding.gather(placed)
    for name, value in back.items():
        assert isinstance(value, np.ndarray) and value.dtype == batch[name].dtype
        np.testing.assert_array_equal(value, batch[name])


def test_state_is_replicated_on_every_device(mesh):
    tree = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "step": np.int32(7)}
    placed = sharding.put_state(mesh, tree)
    for name, leaf in placed.items():
        assert leaf.sharding == sharding.replicated(mesh)
        assert len(leaf.addressable_shards) == mesh.size
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, tree[name])


def test_uneven_batch_is_refused():
    with pytest.raises(ValueError, match="evenly divide"):
        sharding.put_batch(sharding.data_mesh(), {"weight": np.ones(9, np.float32)})


def test_any_process():
    assert sharding.any_process(True) is True
    assert sharding.any_process([]) is False
