"""The training and the prediction step compiled ahead of time for TPUs: no TPU is needed.

    pip install "maknet-jax[tpu]"
    python benchmarks/speed/tpu_aot.py --quick  # MAKNet, v5e:2x2, about ten minutes
    python benchmarks/speed/tpu_aot.py --networks maknet,vgg16 --topologies v5e:2x2 --batches 32

XLA's TPU compiler says how many FLOPs and bytes a chip spends and how much memory it needs. Its
bytes count the chip's fast memory as they do main memory (HBM); those of HBM alone are counted
from the compiled program (`hlo.py`). The roofline's time is the longer of FLOPs / peak and HBM
bytes / bandwidth, and beside it the same with XLA's bytes: bounds, nothing is run. Batches are per
chip. Those of 128 fill its lanes, and take longer to compile. XLA counts the FLOPs and bytes of a
loop's body once, so those of the student's augmentation are too low; HBM bytes count every turn.
"""

import functools
import importlib.util
import math
import os
import time

os.environ |= {  # before jax: the compiler looks for the machine's TPUs, and there are none
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

from benchmarks import harness  # noqa: E402
from benchmarks.speed import hlo  # noqa: E402
from maknet_jax.errors import InputError  # noqa: E402
from maknet_jax.models import layers  # noqa: E402
from maknet_jax.runs import build  # noqa: E402
from maknet_jax.runs import config as configs  # noqa: E402
from maknet_jax.training import sharding  # noqa: E402

BEST = ("roofline_seconds", "xla_roofline_seconds", "hbm_bytes")  # the least of each, an image
KINDS = ("train", "student", "predict", "shear", "gather")
# Peak bf16 FLOP/s, bytes/s and bytes of memory of a chip (cloud.google.com/tpu/docs).
CHIPS = {"v5e": (197e12, 819e9, 16e9), "v6e": (918e12, 1640e9, 32e9)}


def chips(topology):
    """The devices of a topology, as v5e:2x2, described: none need be here.

    Raises:
      InputError: there is no such topology.
    """
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology {topology!r} cannot be ({error}): try v5e:2x2") from error


def compile_step(network, kind, batch, topology, *, size, form):
    """Compiles one step for every chip of a topology.

    Args:
      network: maknet, vgg16 or resnet18.
      kind: "train"; "student", which is that with the student's augmentation; "predict"; "shear"
        and "gather", which are the augmentation alone, in its two forms.
      batch: images a chip.
      topology: as v5e:2x2.
      size: the edge of the images.
      form: of MAKConv.

    Returns:
      A dict of what one chip spends on a step, and of the roofline's times in seconds.
    """
    devices = chips(topology)
    began = time.perf_counter()
    compiled = _lower(network, kind, batch, devices, size, form).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
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
        "compile_seconds": time.perf_counter() - began,
    }


def _lower(network, kind, batch, devices, size, form):
    """The step of `compile_step` as StableHLO for `devices`, which need not be here."""
    changes = ["precision=bfloat16", f"data.size={size}"]
    changes += [f"model.options.form={form}"] if network == "maknet" else []
    page = configs.load(harness.page_of(network)[1], changes)
    if kind in ("student", "shear", "gather"):
        page.augment = configs.load("student").augment
    mesh, rows_of = sharding.data_mesh(devices), batch * len(devices)
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)

    def array(shape, dtype, where=rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def everywhere(tree):
        return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, whole), tree)

    images = array((rows_of, size, size, 3), jnp.int16)
    if kind in ("shear", "gather"):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows_of))
        noise = build.build_augment(page, mesh.size, form=kind)
        return jax.jit(noise, out_shardings=rows).lower(images, array(keys.shape, keys.dtype))
    counts = np.arange(1, harness.LABELS + 1) * 20
    training = build.TrainingSet(1000, counts, harness.EXAMPLES)
    made = build.assemble(page, harness.LABELS, mesh, training=training, rotation="shear")
    like = everywhere(made.shapes)
    if kind == "predict":
        return made.predict_step.lower(like.variables, images, None)
    labels = array((rows_of, harness.LABELS), jnp.float32)
    batches = {"image": images, "labels": labels, "label_mask": labels}
    batches |= {"weight": array((rows_of,), jnp.float32), "index": array((rows_of,), jnp.int32)}
    key = everywhere(jax.eval_shape(lambda: jax.random.key(0)))
    return made.train_step.lower(like, batches, key)


def largest_batch(found, memory):
    """The largest multiple of 8 that fits, on the line through the two largest batches.

    Where the larger needs no more than the smaller, as XLA's layouts may have it: twice the larger.
    """
    compiled = ((b, row["memory"]) for b, row in found.items() if row["memory"] < math.inf)
    (low, a), (high, b) = sorted(compiled)[-2:]
    if b <= a:
        return 2 * high // 8 * 8
    slope = (b - a) / (high - low)
    return int((memory - a) / slope + low) // 8 * 8


def confirm(compile_at, found, memory):
    """(batch, bytes) of the largest batch that fits, compiled: above it 8 more do not, by the line.

    Memory is no straight line, so the line is drawn anew through what was compiled, until it ends
    at a batch that fits; where the compiler refuses a batch, half the way to it is tried.

    Args:
      compile_at: a batch -> its row, or None where the compiler refuses it.
      found: batch -> row of two at least.
      memory: bytes of a chip.
    """
    found = dict(found)
    while True:
        fits = max((b for b, row in found.items() if row["memory"] <= memory), default=0)
        too_many = min((b for b, row in found.items() if row["memory"] > memory), default=math.inf)
        batch = largest_batch(found, memory)
        if batch >= too_many:
            batch = (fits + too_many) // 16 * 8
        if batch <= fits:
            return fits, found[fits]["memory"] if fits else 0
        found[batch] = compile_at(batch) or {"memory": math.inf}


def compare(slow, fast):
    """{quantity: how many times `fast` is below `slow`, an image}, at the best of common batches.

    Args: both: batch -> row. Where they have no batch in common, the result is empty.
    """
    common = slow.keys() & fast.keys()

    def least(rows, name):
        return min(rows[batch][name] / batch for batch in common)

    return {name: least(slow, name) / least(fast, name) for name in BEST} if common else {}


def main(argv=None):
    """Compiles what was asked for, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--networks", type=harness.words, help="maknet,vgg16,resnet18")
    parser.add_argument("--topologies", type=harness.words, help="v5e:2x2,v5e:4x4,v6e:2x2")
    parser.add_argument("--kinds", type=harness.words, help="train,student,predict,shear,gather")
    parser.add_argument("--batches", type=harness.counts, help="images a chip: 16,32")
    parser.add_argument("--form", help="of MAKConv (default: fused)")
    parser.add_argument(
        "--confirm", action="store_true", help="compile the largest batch, and less until it fits"
    )
    full = {"networks": ["maknet", "vgg16", "resnet18"], "kinds": ["train", "student", "predict"]}
    full |= {"topologies": ["v5e:2x2", "v5e:4x4", "v6e:2x2"], "batches": [16, 32]}
    full |= {"form": "fused", "size": 256, "repeats": 1}
    quick = {"networks": ["maknet"], "topologies": ["v5e:2x2"]}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    for topology in chosen.topologies:
        if topology.partition(":")[0] not in CHIPS:
            raise InputError(f"topology {topology!r} is unknown: its chip should be v5e or v6e")
    for name, known in (("networks", full["networks"]), ("kinds", KINDS)):
        for unknown in set(getattr(chosen, name)) - set(known):
            raise InputError(f"--{name} {unknown!r} is unknown: choose of {', '.join(known)}")
    if chosen.form not in layers.FORMS:  # "auto" would be that of this machine
        raise InputError(f"--form {chosen.form!r} is unknown: choose of {', '.join(layers.FORMS)}")
    if not importlib.util.find_spec("libtpu"):
        raise InputError("no libtpu: pip install 'maknet-jax[tpu]', or .[tpu] in a clone")
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
        "XLA's MB/image",
        "by them us/image",
        "memory GB",
        "collectives",
        "compiled in s",
    ]
    rows, results = [], []

    def measure(network, topology, kind, batch):
        """Compiles and notes a row; None where the compiler says that the chip is too small."""
        about = {"network": network, "topology": topology, "kind": kind, "batch": batch}
        try:
            row = compile_step(network, kind, batch, topology, size=chosen.size, form=chosen.form)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append([network, topology, kind, batch, *"-" * 6, "does not fit", "-", "-"])
            results.append(about | {"memory": None})
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
        results.append(about | row)
        return row

    notes = []
    measured = {}
    for topology in chosen.topologies:
        memory = CHIPS[topology.partition(":")[0]][2]
        for kind in chosen.kinds:
            for network in chosen.networks if kind not in ("shear", "gather") else ["maknet"]:
                found = {b: measure(network, topology, kind, b) for b in chosen.batches}
                found = {batch: row for batch, row in found.items() if row}
                if not found:
                    continue
                measured[topology, kind, network] = found
                if len(found) > 1:
                    fits = largest_batch(found, memory)
                    notes.append(f"{network}, {kind}, {topology}: {fits} images should fit a chip")
                    if chosen.confirm:
                        compile_at = functools.partial(measure, network, topology, kind)
                        fits, used = confirm(compile_at, found, memory)
                        notes[-1] += f"; compiled, {fits} need {used / 1e9:.2f} GB"
    for (topology, kind, network), found in measured.items():
        without = measured.get((topology, "train", network), {})
        if kind == "student" and (both := compare(found, without)):
            share = {name: 1 - 1 / ratio for name, ratio in both.items()}
            notes.append(
                f"{network}, {topology}: the augmentation is {share['hbm_bytes']:.1%} of the HBM "
                f"bytes of the student's training step, {share['roofline_seconds']:.1%} of its "
                "roofline's time (aim: below 10 %)"
            )
        other = measured.get((topology, kind, "vgg16"), {})
        if network != "vgg16" and (ratio := compare(other, found)):
            notes.append(
                f"{network}, {kind}, {topology}: VGG16's roofline time an image is "
                f"{ratio['roofline_seconds']:.2f} times as long, by XLA's bytes "
                f"{ratio['xla_roofline_seconds']:.2f} times (aim for MAKNet: 5 training, 6 "
                "predicting)"
            )
    notes.append("roofline times are bounds from the compiler's counts: nothing ran on a TPU")
    harness.report(__file__, argv, chosen, header, rows, notes, {"rows": results})


if __name__ == "__main__":
    # A program that was compiled without its device cannot be loaded again.
    jax.config.update("jax_enable_compilation_cache", False)
    harness.run(main)
