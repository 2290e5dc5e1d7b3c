"""Steps of a config, compiled ahead of time for chips that this machine lacks.

The costs are counts of the compiled program: nothing is run.
"""

import dataclasses
import importlib.util
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from maknet_jax.errors import InputError, installing
from maknet_jax.planning import chips, cuda, hlo
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import sharding

KINDS = ("train", "predict")
PACKAGES = {"tpu": "libtpu", "cuda": cuda.PLUGIN}  # by platform
NAMED = 12  # operations and buffers in `Costs`
EXAMPLES = 17_697  # of the training set of DeepLesion; the program does not depend on it


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one step of a compiled program costs a chip.

    Attributes:
      flops: floating-point operations; XLA's count, in which a loop counts once.
      hbm_bytes: bytes read from and written to main memory, see `hlo.hbm_bytes`.
      xla_bytes: "bytes accessed" by XLA, which include the fast memory of a TPU; None for GPUs.
      memory: bytes of main memory that the program needs.
      allreduces: number of collectives.
      allreduce_bytes: bytes that they reduce.
      compile_seconds: seconds of the compilation.
      moves: the operations that move most, by decreasing bytes.
      buffers: the largest arrays that operations write, by decreasing size.
    """

    flops: float
    hbm_bytes: float
    xla_bytes: float | None
    memory: float
    allreduces: int
    allreduce_bytes: float
    compile_seconds: float
    moves: Sequence[hlo.Operation] = ()
    buffers: Sequence[hlo.Buffer] = ()

    def seconds(self, chip: chips.Chip) -> float:
        """The roofline time: the larger of FLOPs / peak and bytes / bandwidth."""
        return max(self.flops / chip.flops, self.hbm_bytes / chip.bandwidth)


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Descriptions of the devices of a topology; the devices need not exist.

    Args:
      topology: v5e:4x4 (chips of a TPU by axis); h100 (one GPU), h100:8 (of a host), or h100:4x8
        (hosts x GPUs).

    Raises:
      InputError: the topology is invalid, or the package that compiles for it is not installed.
    """
    chip = chips.of_topology(topology)
    name, _, shape = topology.partition(":")
    package = PACKAGES[chip.platform]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the parent of a dotted name
        found = None
    if found is None:
        raise InputError(f"compiling for {topology} needs {package}: {installing(chip.platform)}")
    if chip.platform == "cuda":
        hosts, _, each = shape.rpartition("x")
        if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*|", shape):
            raise InputError(
                f"invalid topology {topology!r}: write {name}, {name}:8 (GPUs of a host) or "
                f"{name}:4x8 (hosts x GPUs)"
            )
        return topologies.get_topology_desc(
            name,
            platform="cuda",
            target_config=cuda.target_config(name),
            topology=f"1x{hosts or 1}x{each or 1}",
        ).devices
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"invalid topology {topology!r} ({error}): try v5e:2x2") from error


def for_accelerator(config: ConfigDict) -> ConfigDict:
    """A copy of a config in which "auto" means what it does on an accelerator."""
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        if config.precision == "auto":
            config.precision = "bfloat16"
        if config.model.options.get("form", None) == "auto":
            config.model.options.form = "fused"
    return config


def lower(
    config: ConfigDict, kind: str, batch: int, devices: Sequence[jax.Device], labels: int
) -> jax.stages.Lowered:
    """Lowers a step for devices that need not exist.

    Args:
      config: of the network; see `for_accelerator`.
      kind: "train" or "predict".
      batch: images per device.
      devices: see `devices_of`.
      labels: number of labels K.
    """
    mesh, rows = sharding.data_mesh(devices), batch * len(devices)
    whole, split = sharding.replicated(mesh), sharding.split(mesh)

    def array(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)

    def replicate(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree
        )

    counts, none = np.arange(1, labels + 1) * 20, np.zeros((labels, labels), bool)
    assembly = build.assemble(
        config,
        labels,
        mesh,
        training=build.TrainingSet(1000, counts, EXAMPLES, none),
        rotation="shear" if devices[0].platform == "tpu" else "gather",
    )
    state, size = replicate(assembly.shapes), config.data.size
    image = array((size, size, 3), jnp.int16)
    box = array((4,), jnp.float32) if assembly.model.takes_box else None
    if kind == "predict":
        return assembly.predict_step.lower(state.variables, image, box)
    batches = {
        "image": image,
        "labels": array((labels,), jnp.float32),
        "label_mask": array((labels,), jnp.float32),
        "weight": array((), jnp.float32),
        "index": array((), jnp.int32),
    } | ({} if box is None else {"box": box})
    key = replicate(jax.eval_shape(lambda: jax.random.key(0)))
    assert assembly.train_step is not None  # given a training set
    return assembly.train_step.lower(state, batches, key)


def compile_lowered(lowered: jax.stages.Lowered, *, flops: float | None = None) -> Costs:
    """Compiles a program and counts its costs.

    Args:
      lowered: see `lower`.
      flops: of the program, for compilers that do not count them.

    Raises:
      InputError: the program does not fit the chip's memory.
      ValueError: the text of the program cannot be parsed.
    """
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None or (not cost and flops is None):
        raise ValueError("the compiler does not report the costs of the program")
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    used += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    count, moved = hlo.collectives(text)
    operations = hlo.operations(text)
    buffers = [buffer for each in operations for buffer in each.outputs]
    return Costs(
        flops=cost["flops"] if cost else flops or 0.0,
        hbm_bytes=sum(operation.moved for operation in operations),
        xla_bytes=cost["bytes accessed"] if cost else None,
        memory=used + memory.generated_code_size_in_bytes,
        allreduces=count,
        allreduce_bytes=moved,
        compile_seconds=seconds,
        moves=sorted(operations, key=lambda each: -each.moved)[:NAMED],
        buffers=sorted(buffers, key=lambda each: -each.size)[:NAMED],
    )


def count_flops(config: ConfigDict, kind: str, labels: int) -> float:
    """FLOPs of a step per image, from the program for this host's CPU before optimisation.

    Args:
      config: of the network.
      kind: "train" or "predict".
      labels: number of labels K.
    """
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        config.accumulate = 1  # XLA would count the loop over the parts once
    cost = lower(config, kind, 1, jax.local_devices(backend="cpu")[:1], labels).cost_analysis()
    if not cost:
        raise ValueError("XLA does not count the FLOPs of the program")
    return cost["flops"]


def compile_step(
    config: ConfigDict, kind: str, batch: int, topology: str, *, labels: int
) -> Costs | None:
    """Compiles one step for all chips of a topology.

    Args:
      config: of the network.
      kind: "train" or "predict".
      batch: images per chip.
      topology: see `devices_of`.
      labels: number of labels K.

    Returns:
      The costs per chip; None if the program does not fit its memory.

    Raises:
      InputError: see `devices_of`; or `batch` is not a multiple of `accumulate`.
    """
    configs.validate(config, config.data.size, 1)
    config, devices = for_accelerator(config), devices_of(topology)
    parts = config.accumulate if kind == "train" else 1
    if batch % parts:
        raise InputError(
            f"--batch {batch}, images per chip, should be a multiple of accumulate {parts}"
        )
    uncounted = chips.of_topology(topology).platform == "cuda" or parts > 1
    flops = batch * count_flops(config, kind, labels) if uncounted else None
    try:
        costs = compile_lowered(lower(config, kind, batch, devices, labels), flops=flops)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    if flops is not None:
        costs = dataclasses.replace(costs, flops=flops)
    return costs if costs.memory <= chips.of_topology(topology).memory else None
