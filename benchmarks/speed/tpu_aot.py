"""Compiles the training and the prediction step for TPUs ahead of time, without a TPU.

    pip install "maknet-jax[tpu]"
    python benchmarks/speed/tpu_aot.py --quick  # MAKNet, v5e:2x2, about ten minutes
    python benchmarks/speed/tpu_aot.py --networks maknet,vgg16 --topologies v5e:2x2 --batches 32

XLA's TPU compiler reports FLOPs, bytes and memory per chip. Its bytes include the chip's fast
memory; those of main memory (HBM) alone are counted from the compiled program by hlo.py. The
roofline time is the larger of FLOPs / peak and HBM bytes / bandwidth; the table also has it with
XLA's bytes. Both are lower bounds: nothing is run. Batch sizes are per chip. A batch of 128 fills
its lanes and takes longer to compile. XLA counts the body of a loop once, so its FLOPs and bytes of
the student's augmentation are too low; HBM bytes count every iteration.
"""

import functools
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ |= {  # before importing jax, or the compiler would search for TPUs of this machine
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": os.environ.get("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.typing import DTypeLike  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks.speed import hlo  # noqa: E402
from maknet_jax.errors import InputError  # noqa: E402
from maknet_jax.models import layers  # noqa: E402
from maknet_jax.runs import build  # noqa: E402
from maknet_jax.runs import config as configs  # noqa: E402
from maknet_jax.training import sharding  # noqa: E402

COMPARED = ("roofline_seconds", "xla_roofline_seconds", "hbm_bytes")  # per image
NETWORKS = ("maknet", "vgg16", "resnet18")
KINDS = ("train", "student", "predict", "shear", "gather")
# Peak bfloat16 FLOP/s, HBM bytes/s and HBM bytes of a chip (cloud.google.com/tpu/docs).
CHIPS = {"v5e": (197e12, 819e9, 16e9), "v6e": (918e12, 1640e9, 32e9)}


Row = dict[str, Any]  # costs by name, see `compile_step`
Rows = Mapping[int, Row]  # by batch


def chips(topology: str) -> Sequence[jax.Device]:
    """Descriptions of the devices of a topology such as v5e:2x2; the devices need not exist.

    Raises:
      InputError: invalid topology.
    """
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"invalid topology {topology!r} ({error}): try v5e:2x2") from error


def compile_step(
    network: str, kind: str, batch: int, topology: str, *, size: int, form: str
) -> dict[str, Any]:
    """Compiles one step for all chips of a topology.

    Args:
      network: maknet, vgg16 or resnet18.
      kind: "train", "student" (training with the student's augmentation), "predict", or "shear"
        and "gather", the two forms of the augmentation alone.
      batch: images per chip.
      topology: such as v5e:2x2.
      size: pixels per side of the images.
      form: the form of MAKConv.

    Returns:
      Costs of a step per chip by name: FLOPs, bytes, and times in seconds.
    """
    devices = chips(topology)
    start = time.perf_counter()
    compiled = _lower(network, kind, batch, devices, size, form).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    if cost is None or memory is None or text is None:
        raise InputError(f"the compiler for {topology} does not say what the program costs")
    flops, moved, in_hbm = cost["flops"], cost["bytes accessed"], hlo.hbm_bytes(text)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    used += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    peak, bandwidth, _ = CHIPS[topology.partition(":")[0]]
    return {
        "flops": flops,
        "bytes": moved,
        "hbm_bytes": in_hbm,
        "memory": used + memory.generated_code_size_in_bytes,
        "seconds_by_flops": flops / peak,
        "seconds_by_bytes": moved / bandwidth,
        "seconds_by_hbm": in_hbm / bandwidth,
        "xla_roofline_seconds": max(flops / peak, moved / bandwidth),
        "roofline_seconds": max(flops / peak, in_hbm / bandwidth),
        "collectives": hlo.collectives(text),
        "compile_seconds": time.perf_counter() - start,
    }


def _lower(
    network: str, kind: str, batch: int, devices: Sequence[jax.Device], size: int, form: str
) -> jax.stages.Lowered:
    """Lowers the step of `compile_step` for `devices`, which need not exist."""
    changes = ["precision=bfloat16", f"data.size={size}"]
    changes += [f"model.options.form={form}"] if network == "maknet" else []
    config = configs.load(harness.config_of(network)[1], changes)
    if kind in ("student", "shear", "gather"):
        config.augment = configs.load("student").augment
    mesh, global_batch = sharding.data_mesh(devices), batch * len(devices)
    replicated, rows = sharding.replicated(mesh), sharding.split(mesh)

    def array(
        shape: Sequence[int], dtype: DTypeLike, sharding: jax.sharding.Sharding = rows
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def replicate(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, replicated), tree)

    images = array((global_batch, size, size, 3), jnp.int16)
    if kind in ("shear", "gather"):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), global_batch))
        augment = build.build_augment(config, mesh.size, form=kind)
        assert augment is not None  # the config of a student augments
        return jax.jit(augment, out_shardings=rows).lower(images, array(keys.shape, keys.dtype))
    counts = np.arange(1, harness.LABELS + 1) * 20
    training = build.TrainingSet(1000, counts, harness.EXAMPLES)
    assembly = build.assemble(config, harness.LABELS, mesh, training=training, rotation="shear")
    assert assembly.train_step is not None  # given a training set
    state = replicate(assembly.shapes)
    if kind == "predict":
        return assembly.predict_step.lower(state.variables, images, None)
    labels = array((global_batch, harness.LABELS), jnp.float32)
    batches = {"image": images, "labels": labels, "label_mask": labels}
    batches |= {
        "weight": array((global_batch,), jnp.float32),
        "index": array((global_batch,), jnp.int32),
    }
    key = replicate(jax.eval_shape(lambda: jax.random.key(0)))
    return assembly.train_step.lower(state, batches, key)


def largest_batch(rows: Rows, memory: float) -> int:
    """Estimates the largest batch that fits: linear in memory through the two largest batches.

    If the larger of them needs no more memory than the smaller, which depends on XLA's choice of
    layouts, the estimate is twice the larger.

    Args:
      rows: batch -> row, at least two.
      memory: bytes per chip.

    Returns:
      A multiple of 8.
    """
    compiled = ((b, row["memory"]) for b, row in rows.items() if row["memory"] < math.inf)
    (low, a), (high, b) = sorted(compiled)[-2:]
    if b <= a:
        return 2 * high // 8 * 8
    slope = (b - a) / (high - low)
    return int((memory - a) / slope + low) // 8 * 8


def confirm(
    compile_at: Callable[[int], Row | None], rows: Rows, memory: float
) -> tuple[int, float]:
    """Finds the largest batch that fits, by compiling.

    Memory is not linear in the batch, so the estimate is repeated with each compiled batch until it
    is one that fits. If the compiler rejects a batch, the midpoint to it is tried next.

    Args:
      compile_at: compiles a batch; returns its row, or None if the compiler rejects it.
      rows: batch -> row, at least two.
      memory: bytes per chip.

    Returns:
      (batch, bytes): a multiple of 8 and its memory per chip; (0, 0) if none fits.
    """
    rows = dict(rows)
    while True:
        fits = max((b for b, row in rows.items() if row["memory"] <= memory), default=0)
        too_many = min(
            (b for b, row in rows.items() if row["memory"] > memory), default=sys.maxsize
        )
        batch = largest_batch(rows, memory)
        if batch >= too_many:
            batch = (fits + too_many) // 16 * 8
        if batch <= fits:
            return fits, rows[fits]["memory"] if fits else 0
        rows[batch] = compile_at(batch) or {"memory": math.inf}


def compare(slow: Rows, fast: Rows) -> dict[str, float]:
    """Ratios slow / fast of the costs per image, each at the best of the batches that both have.

    Args:
      slow: batch -> row.
      fast: batch -> row.

    Returns:
      Ratios by the names in `COMPARED`; empty if there is no common batch.
    """
    common = slow.keys() & fast.keys()

    def least(rows: Rows, name: str) -> float:
        return min(rows[batch][name] / batch for batch in common)

    return {name: least(slow, name) / least(fast, name) for name in COMPARED} if common else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles the steps, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--networks", type=harness.words, help="maknet,vgg16,resnet18")
    parser.add_argument("--topologies", type=harness.words, help="v5e:2x2,v5e:4x4,v6e:2x2")
    parser.add_argument("--kinds", type=harness.words, help="train,student,predict,shear,gather")
    parser.add_argument("--batches", type=harness.counts, help="images per chip: 16,32")
    parser.add_argument("--form", help="form of MAKConv (default: fused)")
    parser.add_argument(
        "--confirm", action="store_true", help="find the largest batch that fits by compiling"
    )
    full: dict[str, Any] = {"networks": list(NETWORKS), "kinds": ["train", "student", "predict"]}
    full |= {"topologies": ["v5e:2x2", "v5e:4x4", "v6e:2x2"], "batches": [16, 32]}
    full |= {"form": "fused", "size": 256, "repeats": 1}
    quick = {"networks": ["maknet"], "topologies": ["v5e:2x2"]}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    for topology in chosen.topologies:
        if topology.partition(":")[0] not in CHIPS:
            raise InputError(
                f"topology {topology!r} is unknown: its chip should be {' or '.join(CHIPS)}"
            )
    for name, known in (("networks", NETWORKS), ("kinds", KINDS)):
        for unknown in set(getattr(chosen, name)) - set(known):
            raise InputError(f"--{name} {unknown!r} is unknown: choose from {', '.join(known)}")
    if chosen.form not in layers.FORMS:  # "auto" would choose for this machine
        raise InputError(
            f"--form {chosen.form!r} is unknown: choose from {', '.join(layers.FORMS)}"
        )
    if not importlib.util.find_spec("libtpu"):
        raise InputError(
            "libtpu is not installed: pip install 'maknet-jax[tpu]', or .[tpu] in a clone"
        )
    for topology in chosen.topologies:
        chips(topology)
    header = [
        "",
        "topology",
        "step",
        "batch",
        "GFLOP/image",
        "HBM MB/image",
        "roofline us/image",
        "bound by",
        "XLA MB/image",
        "XLA us/image",
        "memory GB",
        "collectives",
        "compilation s",
    ]
    rows, results = [], []

    def measure(network: str, topology: str, kind: str, batch: int) -> Row | None:
        """Compiles a step and records its row; None if it does not fit the chip."""
        key = {"network": network, "topology": topology, "kind": kind, "batch": batch}
        try:
            row = compile_step(network, kind, batch, topology, size=chosen.size, form=chosen.form)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append([network, topology, kind, batch, *"-" * 6, "does not fit", "-", "-"])
            results.append(key | {"memory": None})
            return None
        bound = "HBM" if row["seconds_by_hbm"] > row["seconds_by_flops"] else "FLOPs"
        count, moved = row["collectives"]
        rows.append(
            [
                network,
                topology,
                kind,
                batch,
                f"{row['flops'] / batch / 1e9:.2f}",
                f"{row['hbm_bytes'] / batch / 1e6:.1f}",
                f"{row['roofline_seconds'] / batch * 1e6:.1f}",
                bound,
                f"{row['bytes'] / batch / 1e6:.1f}",
                f"{row['xla_roofline_seconds'] / batch * 1e6:.1f}",
                f"{row['memory'] / 1e9:.2f}",
                f"{count} ({moved / 1e6:.1f} MB)",
                f"{row['compile_seconds']:.0f}",
            ]
        )
        print("  ".join(str(cell) for cell in rows[-1]), flush=True)
        results.append(key | row)
        return row

    notes = []
    measured = {}
    for topology in chosen.topologies:
        memory = CHIPS[topology.partition(":")[0]][2]
        for kind in chosen.kinds:
            for network in chosen.networks if kind not in ("shear", "gather") else ["maknet"]:
                compiled = {b: measure(network, topology, kind, b) for b in chosen.batches}
                rows_by_batch = {batch: row for batch, row in compiled.items() if row}
                if not rows_by_batch:
                    continue
                measured[topology, kind, network] = rows_by_batch
                if len(rows_by_batch) > 1:
                    fits = largest_batch(rows_by_batch, memory)
                    notes.append(
                        f"{network}, {kind}, {topology}: an estimated {fits} images fit a chip"
                    )
                    if chosen.confirm:
                        compile_at = functools.partial(measure, network, topology, kind)
                        fits, used = confirm(compile_at, rows_by_batch, memory)
                        notes[-1] += f"; by compiling, {fits} ({used / 1e9:.2f} GB)"
    for (topology, kind, network), fast in measured.items():
        without = measured.get((topology, "train", network), {})
        if kind == "student" and (ratio := compare(fast, without)):
            share = {name: 1 - 1 / value for name, value in ratio.items()}
            notes.append(
                f"{network}, {topology}: the augmentation is {share['hbm_bytes']:.1%} of the HBM "
                f"bytes of the student's training step, {share['roofline_seconds']:.1%} of its "
                "roofline time (target: below 10 %)"
            )
        other = measured.get((topology, kind, "vgg16"), {})
        if network != "vgg16" and (ratio := compare(other, fast)):
            notes.append(
                f"{network}, {kind}, {topology}: the roofline time per image of VGG16 is "
                f"{ratio['roofline_seconds']:.2f} times as long, "
                f"{ratio['xla_roofline_seconds']:.2f} times by XLA's bytes (target for "
                "MAKNet: 5 in training, 6 in prediction)"
            )
    notes.append(
        "roofline times are lower bounds from counts of the compiled program: nothing ran on a TPU"
    )
    harness.report(__file__, argv, chosen, header, rows, notes, {"rows": results})


if __name__ == "__main__":
    # A program compiled for a device that is not present cannot be loaded from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    harness.run(main)
