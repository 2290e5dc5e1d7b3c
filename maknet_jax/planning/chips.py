"""The accelerators that `maknet plan` knows, with the figures of their makers."""

import os
from typing import NamedTuple

from maknet_jax.errors import InputError


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      platform: tpu or cuda.
      flops: peak FLOP/s in bfloat16, without sparsity.
      bandwidth: of its main memory (HBM), bytes/s.
      memory: bytes of main memory.
      link: bytes/s at which one chip sends in an all-reduce among the chips of a host (GPU, NVLink)
        or of a pod (TPU, both directions of one axis of the torus).
      network: bytes/s per chip between hosts; 0 where the links connect all chips.
      per_host: chips of a host.
    """

    platform: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    per_host: int


# cloud.google.com/tpu/docs (v5e, v5p, v6e); data sheets of NVIDIA (SXM forms, 400 Gb/s of network
# per GPU for H100 and later, 200 Gb/s for A100). Links in one direction for GPUs.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 819e9, 16e9, 90e9, 0, 4),
    "v5p": Chip("tpu", 459e12, 2765e9, 95e9, 180e9, 0, 4),
    "v6e": Chip("tpu", 918e12, 1640e9, 32e9, 180e9, 0, 4),
    "a100": Chip("cuda", 312e12, 2039e9, 80e9, 300e9, 25e9, 8),
    "h100": Chip("cuda", 989e12, 3350e9, 80e9, 450e9, 50e9, 8),
    "h200": Chip("cuda", 989e12, 4800e9, 141e9, 450e9, 50e9, 8),
    "b200": Chip("cuda", 2250e12, 8000e9, 180e9, 900e9, 50e9, 8),
}
# Seconds that a small all-reduce takes: an assumption, not a figure of the makers.
LATENCY = {"tpu": 10e-6, "cuda": 25e-6}
# Without these, libtpu queries the metadata server of a cloud machine and locks the machine's TPUs.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_PLATFORMS": "cpu",
}


def of_topology(topology: str) -> Chip:
    """The chip of a topology such as v5e:4x4 or h100.

    Raises:
      InputError: the chip is unknown.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(
            f"topology {topology!r} is unknown: its chip should be one of {', '.join(CHIPS)}, as "
            "in v5e:4x4 or h100"
        )
    return CHIPS[name]


def use_host_only() -> None:
    """Sets the environment so that JAX compiles for absent devices. Call it before importing JAX.

    Variables that are set keep their values.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def allreduce_seconds(chip: Chip, chips: int, size: float, count: int) -> float:
    """Estimated seconds of a step's all-reduces over `chips` chips, without overlap.

    Ring all-reduces within a host (GPU) or a pod (TPU), then over the network between hosts, where
    each chip sends its share; each all-reduce takes at least `LATENCY`.

    Args:
      chip: the accelerator.
      chips: number of chips.
      size: bytes reduced per step.
      count: number of all-reduces per step.
    """
    if chips < 2:
        return 0.0
    near = min(chips, chip.per_host) if chip.network else chips
    hosts = -(-chips // near)
    seconds = 2 * size * (near - 1) / near / chip.link
    if hosts > 1:
        seconds += 2 * (size / near) * (hosts - 1) / hosts / chip.network
    return seconds + count * LATENCY[chip.platform]
