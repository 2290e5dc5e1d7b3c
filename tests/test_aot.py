"""The benchmark of programs for absent chips, without compiling: that takes minutes."""

import os
import types

import jax
import pytest

from maknet_jax.errors import InputError
from maknet_jax.planning import compiled


@pytest.fixture(scope="module")
def program():
    """The benchmark; restores the environment variables that its import sets."""
    environment = dict(os.environ)
    from benchmarks.speed import aot

    os.environ.clear()
    os.environ.update(environment)
    return aot


def test_the_largest_batch_is_extrapolated_and_confirmed(program):
    # 1 GB + 0.1 GB per image: 70 fit into 8 GB, rounded down to a multiple of 8.
    measured = {16: {"memory": 2.6e9}, 32: {"memory": 4.2e9}}
    assert program.largest_batch(measured, 8e9) == 64
    compiled = []

    def confirm(needed, measured=measured):
        """`needed`: bytes by batch, None if the compiler rejects it."""
        compiled.clear()
        rows = {batch: memory and {"memory": memory} for batch, memory in needed.items()}
        return program.confirm(lambda b: compiled.append(b) or rows[b], measured, 8e9)

    # 64 need more than estimated and 56 are rejected; the midpoint of 32 and 56 is 44.
    assert confirm({64: 8.2e9, 56: None, 40: 5e9, 48: 5.9e9}) == (48, 5.9e9)
    assert compiled == [64, 56, 40, 48]
    # 64 need less than estimated: the next estimate is larger.
    assert confirm({64: 5.8e9, 104: 7.8e9}) == (104, 7.8e9)
    assert compiled == [64, 104]
    # 64 need less than 32: no extrapolation, the batch is doubled.
    assert confirm({64: 4e9, 128: 7.9e9}) == (128, 7.9e9)
    assert confirm({8: None}, {16: {"memory": 9e9}, 32: {"memory": 17e9}}) == (0, 0)


def test_steps_are_compared_at_their_best_common_batch(program, monkeypatch):
    slow = {8: {"roofline_seconds": 8.0}, 16: {"roofline_seconds": 48.0}}
    fast = {8: {"roofline_seconds": 2.0}, 32: {"roofline_seconds": 1.0}}
    monkeypatch.setattr(program, "COMPARED", ("roofline_seconds",))
    assert program.compare(slow, fast) == {"roofline_seconds": 4}
    assert program.compare(slow, {}) == {}


def test_bad_arguments_are_rejected(program, monkeypatch):
    with pytest.raises(InputError, match="'v9:2x2'"):
        program.main(["--topologies", "v9:2x2"])
    with pytest.raises(InputError, match="--kinds 'trian' .* train, student"):
        program.main(["--quick", "--kinds", "trian"])
    with pytest.raises(InputError, match="--networks 'vgg19'"):
        program.main(["--quick", "--networks", "vgg19"])
    with pytest.raises(InputError, match="--form 'auto'"):
        program.main(["--quick", "--form", "auto"])

    def describe(topology, platform):
        if topology != "v5e:2x2":
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible")
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiled.topologies, "get_topology_desc", describe)
    with pytest.raises(InputError, match="'v5e:9x9' .*not divisible"):
        program.main(["--topologies", "v5e:2x2,v5e:9x9"])
