"""Compiles training and prediction steps for TPUs and GPUs ahead of time, without having one.

    pip install "maknet-jax[tpu]"  # or [cuda]
    python benchmarks/speed/aot.py --quick  # MAKNet, v5e:2x2, about ten minutes
    python benchmarks/speed/aot.py --networks maknet,vgg16 --topologies v5e:2x2,h100 --batches 32

XLA's compiler reports FLOPs, bytes (of TPUs) and memory per chip. Its bytes include a TPU's fast
memory; those of main memory (HBM) alone are counted from the compiled program by
maknet_jax/planning/hlo.py, and the largest buffers are named with the memory that holds them. The
roofline time is the larger of FLOPs / peak and HBM bytes / bandwidth; the table also has it with
XLA's bytes. Both are lower bounds: nothing is run. Batch sizes are per chip. A batch of 128 fills a
TPU's lanes and takes longer to compile. XLA counts the body of a loop once, so its FLOPs and bytes
of the student's augmentation are too low; HBM bytes count every iteration. For GPUs, FLOPs are
those of the program before optimisation; without the device XLA tunes nothing, so that kernels and
their workspaces may differ from those of a real run, and what cuDNN moves inside a convolution is
not counted.

`maknet plan` compiles the step of one config in the same way.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maknet_jax.planning import chips

chips.use_host_only()  # before importing jax

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from benchmarks import harness  # noqa: E402
from maknet_jax.errors import InputError  # noqa: E402
from maknet_jax.models import layers  # noqa: E402
from maknet_jax.planning import bounds, compiled  # noqa: E402
from maknet_jax.runs import build  # noqa: E402
from maknet_jax.runs import config as configs  # noqa: E402
from maknet_jax.training import sharding  # noqa: E402

COMPARED = ("roofline_seconds", "xla_roofline_seconds", "hbm_bytes")  # per image
NETWORKS = ("maknet", "vgg16", "resnet18")
AUGMENTATIONS = ("shear", "gather")
KINDS = ("train", "student", "predict", *AUGMENTATIONS)

Row = dict[str, Any]  # costs by name, see `compile_step`
Rows = Mapping[int, Row]  # by batch


def compile_step(
    network: str, kind: str, batch: int, topology: str, *, size: int, form: str
) -> Row | None:
    """Compiles one step for all chips of a topology.

    Args:
      network: maknet, vgg16 or resnet18.
      kind: "train", "student" (training with the student's augmentation), "predict", or "shear"
        and "gather", the two forms of the augmentation alone.
      batch: images per chip.
      topology: such as v5e:2x2 or h100.
      size: pixels per side of the images.
      form: the form of MAKConv.

    Returns:
      Costs of a step per chip by name: FLOPs, bytes, and times in seconds; None if it does not fit
      the chip.
    """
    config = _config(network, size, form)
    if kind in ("student", *AUGMENTATIONS):
        config.augment = configs.load("student").augment
    chip = chips.of_topology(topology)
    if kind in AUGMENTATIONS:
        lowered = _lower_augmentation(config, kind, batch, compiled.devices_of(topology))
        costs: compiled.Costs | None = compiled.compile_lowered(lowered, flops=0.0)
    else:
        pass_ = "predict" if kind == "predict" else "train"
        costs = compiled.compile_step(config, pass_, batch, topology, labels=harness.LABELS)
    if costs is None:
        return None
    moved = costs.hbm_bytes if costs.xla_bytes is None else costs.xla_bytes
    return {
        **dataclasses.asdict(costs),
        "seconds_by_flops": costs.flops / chip.flops,
        "seconds_by_hbm": costs.hbm_bytes / chip.bandwidth,
        "xla_roofline_seconds": max(costs.flops / chip.flops, moved / chip.bandwidth),
        "roofline_seconds": costs.seconds(chip),
    }


def _bounds(network: str, size: int, form: str) -> list[bounds.Bound]:
    """The lower bounds of each block of a network, see `planning.bounds`."""
    return bounds.training_bounds(_config(network, size, form), harness.LABELS)


def _config(network: str, size: int, form: str) -> ConfigDict:
    """The config of a network in bfloat16."""
    changes = ["precision=bfloat16", f"data.size={size}"]
    changes += [f"model.options.form={form}"] if network == "maknet" else []
    return configs.load(harness.config_of(network)[1], changes)


def _lower_augmentation(
    config: ConfigDict, form: str, batch: int, devices: Sequence[jax.Device]
) -> jax.stages.Lowered:
    """Lowers the augmentation of a config alone."""
    mesh = sharding.data_mesh(devices)
    rows, count, size = sharding.split(mesh), batch * len(devices), config.data.size
    images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.int16, sharding=rows)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)
    augment = build.build_augment(config, mesh.size, form=form)
    assert augment is not None  # the config of a student augments
    return jax.jit(augment, out_shardings=rows).lower(images, keys)


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
    known = ((b, row["memory"]) for b, row in rows.items() if row["memory"] < math.inf)
    (low, a), (high, b) = sorted(known)[-2:]
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
    parser.add_argument("--topologies", type=harness.words, help="v5e:2x2,v5e:4x4,v6e:2x2,h100")
    parser.add_argument("--kinds", type=harness.words, help="train,student,predict,shear,gather")
    parser.add_argument("--batches", type=harness.counts, help="images per chip: 16,32")
    parser.add_argument("--form", help="form of MAKConv (default: fused)")
    parser.add_argument(
        "--buffers", type=int, default=5, help="number of buffers to name (default: 5)"
    )
    parser.add_argument(
        "--confirm", action="store_true", help="find the largest batch that fits by compiling"
    )
    full: dict[str, Any] = {"networks": list(NETWORKS), "kinds": ["train", "student", "predict"]}
    full |= {"topologies": ["v5e:2x2", "v5e:4x4", "v6e:2x2"], "batches": [16, 32]}
    full |= {"form": "fused", "size": 256, "repeats": 1}
    quick = {"networks": ["maknet"], "topologies": ["v5e:2x2"]}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    for topology in chosen.topologies:
        chips.of_topology(topology)
    for name, known in (("networks", NETWORKS), ("kinds", KINDS)):
        for unknown in set(getattr(chosen, name)) - set(known):
            raise InputError(f"--{name} {unknown!r} is unknown: choose from {', '.join(known)}")
    if chosen.form not in layers.FORMS:  # "auto" would choose for this machine
        raise InputError(
            f"--form {chosen.form!r} is unknown: choose from {', '.join(layers.FORMS)}"
        )
    for topology in chosen.topologies:
        compiled.devices_of(topology)
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
    notes: list[str] = []

    def measure(network: str, topology: str, kind: str, batch: int) -> Row | None:
        """Compiles a step and records its row; None if it does not fit the chip."""
        key = {"network": network, "topology": topology, "kind": kind, "batch": batch}
        row = compile_step(network, kind, batch, topology, size=chosen.size, form=chosen.form)
        if row is None:
            rows.append([network, topology, kind, batch, *"-" * 6, "does not fit", "-", "-"])
            results.append(key | {"memory": None})
            return None
        bound = "HBM" if row["seconds_by_hbm"] > row["seconds_by_flops"] else "FLOPs"
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
                "-" if row["xla_bytes"] is None else f"{row['xla_bytes'] / batch / 1e6:.1f}",
                f"{row['xla_roofline_seconds'] / batch * 1e6:.1f}",
                f"{row['memory'] / 1e9:.2f}",
                f"{row['allreduces']} ({row['allreduce_bytes'] / 1e6:.1f} MB)",
                f"{row['compile_seconds']:.0f}",
            ]
        )
        print("  ".join(str(cell) for cell in rows[-1]), flush=True)
        results.append(key | row)
        notes.extend(
            f"{network}, {kind}, {topology}, {batch}: {buffer['size'] / batch / 1e6:.2f} MB per "
            f"image in {buffer['memory']}, {buffer['edges']}: {buffer['source']}"
            for buffer in row["buffers"][: chosen.buffers]
        )
        return row

    measured = {}
    for topology in chosen.topologies:
        memory = chips.of_topology(topology).memory
        for kind in chosen.kinds:
            for network in chosen.networks if kind not in ("shear", "gather") else ["maknet"]:
                by_batch = {b: measure(network, topology, kind, b) for b in chosen.batches}
                rows_by_batch = {batch: row for batch, row in by_batch.items() if row}
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
    blocks = {name: _bounds(name, chosen.size, chosen.form) for name in chosen.networks}
    for (topology, kind, network), fast in measured.items():
        if kind == "train":
            batch = max(fast)
            state = sum(row.state for row in blocks[network]) / batch
            once, by_layer = (
                (sum(getattr(row, name) for row in blocks[network]) + state) / 1e6
                for name in ("once", "by_layer")
            )
            notes.append(
                f"{network}, {topology}, {batch} images per chip: "
                f"{fast[batch]['hbm_bytes'] / batch / 1e6:.1f} MB an image; lower bounds from the "
                f"shapes: {once:.1f} MB if each output is written and read once, {by_layer:.1f} MB "
                "if each layer makes its passes alone"
            )
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
        "roofline times are lower bounds from counts of the compiled program: nothing ran on a chip"
    )
    document = {
        "rows": results,
        "bounds": [
            {"network": name} | row._asdict() for name, rows_ in blocks.items() for row in rows_
        ],
    }
    harness.report(__file__, argv, chosen, header, rows, notes, document)


if __name__ == "__main__":
    # A program compiled for a device that is not present cannot be loaded from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    harness.run(main)
