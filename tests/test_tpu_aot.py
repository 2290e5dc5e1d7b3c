"""The programs for TPUs: what is said of them. Compiling them takes minutes, and libtpu."""

import os
import types

import jax
import pytest

from maknet_jax.errors import InputError


@pytest.fixture(scope="module")
def program():
    """The benchmark; importing it tells jax to look for no TPU, which is taken back."""
    environment = dict(os.environ)
    from benchmarks.speed import tpu_aot

    os.environ.clear()
    os.environ.update(environment)
    return tpu_aot


def test_the_largest_batch_of_a_tpu(program):
    """On the line through two sizes; compiling itself takes minutes."""
    # 1 GB + 0.1 GB an image: 8 GB hold 70, in multiples of 8.
    found = {16: {"memory": 2.6e9}, 32: {"memory": 4.2e9}}
    assert program.largest_batch(found, 8e9) == 64
    asked = []

    def confirm(needed, found=found):
        """`needed` bytes by batch, None where the compiler refuses."""
        asked.clear()
        rows = {batch: memory and {"memory": memory} for batch, memory in needed.items()}
        return program.confirm(lambda b: asked.append(b) or rows[b], found, 8e9)

    # In truth 64 need more than the line says, 56 are refused, and half the way there is 44.
    assert confirm({64: 8.2e9, 56: None, 40: 5e9, 48: 5.9e9}) == (48, 5.9e9)
    assert asked == [64, 56, 40, 48]
    # Or less: then the next line leads further, until it ends within 8 images.
    assert confirm({64: 5.8e9, 104: 7.8e9}) == (104, 7.8e9)
    assert asked == [64, 104]
    # 64 need less than 32 do: the line falls, and leads nowhere.
    assert confirm({64: 4e9, 128: 7.9e9}) == (128, 7.9e9)
    assert confirm({8: None}, {16: {"memory": 9e9}, 32: {"memory": 17e9}}) == (0, 0)


def test_steps_are_compared_at_the_best_of_their_common_batches(program, monkeypatch):
    slow = {8: {"roofline_seconds": 8.0}, 16: {"roofline_seconds": 48.0}}
    fast = {8: {"roofline_seconds": 2.0}, 32: {"roofline_seconds": 1.0}}
    monkeypatch.setattr(program, "BEST", ("roofline_seconds",))
    assert program.compare(slow, fast) == {"roofline_seconds": 4}
    assert program.compare(slow, {}) == {}


def test_what_cannot_be_compiled_is_one_line(program, monkeypatch):
    with pytest.raises(InputError, match="'v9:2x2' is unknown"):
        program.main(["--topologies", "v9:2x2"])
    with pytest.raises(InputError, match="--kinds 'trian' is unknown: choose of train, student"):
        program.main(["--quick", "--kinds", "trian"])
    with pytest.raises(InputError, match="--networks 'vgg19' is unknown"):
        program.main(["--quick", "--networks", "vgg19"])
    with pytest.raises(InputError, match="--form 'auto' is unknown: choose of split, matmul"):
        program.main(["--quick", "--form", "auto"])

    def describe(topology, platform):
        if topology != "v5e:2x2":
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible")
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(program.topologies, "get_topology_desc", describe)
    with pytest.raises(InputError, match="'v5e:9x9' cannot be .*not divisible"):
        program.main(["--topologies", "v5e:2x2,v5e:9x9"])
