"""`maknet models`: parameters, FLOPs and bytes of the networks, block by block, beside table 1."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax import console, files, models
from maknet_jax.errors import InputError
from maknet_jax.models.layers import ConvNorm, MAKConv
from maknet_jax.runs import config as configs

PAGES = {"maknet": "teacher", "vgg16": "vgg16", "resnet18": "resnet18"}
PAPER_MILLIONS = {"maknet": 4.50, "vgg16": 14.78, "resnet18": 11.25}  # table 1


def measure(name, *, num_classes=115, size=256):
    """What each top-level part of a network costs, from its shapes alone: nothing is run.

    FLOPs are those of convolutions and dense layers, a multiply-add counting two. Bytes are what
    these layers must move at least in float32 for one image: inputs, outputs and kernels.

    Args:
      name: maknet, vgg16 or resnet18, as its config page builds it.
      num_classes: labels.
      size: the edge of the image.

    Returns:
      A list of (part, parameters, flops, bytes) in the order of the network.

    Raises:
      InputError: no such network.
    """
    if name not in PAGES:
        raise InputError(f"model {name!r} is unknown: choose one of {', '.join(PAGES)}")
    options = configs.load(PAGES[name]).model.options.to_dict()
    if "form" in options:
        options["form"] = "split"  # the wide ones compute outside of the modules counted here
    model = models.build(name, num_classes, **options)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    calls = []

    def record(next_call, args, kwargs, context):
        outputs = next_call(*args, **kwargs)
        counted = isinstance(context.module, (nn.Conv, nn.Dense, ConvNorm, MAKConv))
        if counted and context.method_name == "__call__":
            leaves = jax.tree.leaves(context.module.variables["params"])
            kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 1)  # no biases
            calls.append((context.module.path, args[0].shape, outputs.shape, kernels))
        return outputs

    def run(x):
        variables = model.init(jax.random.key(0), x, train=False)
        calls.clear()  # initialising called every layer once already
        with nn.intercept_methods(record):
            model.apply(variables, x, train=False)
        return variables["params"]

    params = jax.eval_shape(run, image)
    parts = {part: [0, 0, 0] for part in dict.fromkeys([c[0][0] for c in calls] + list(params))}
    for part, tree in params.items():
        parts[part][0] = sum(leaf.size for leaf in jax.tree.leaves(tree))
    for path, taken, given, kernels in calls:
        # Every element of a kernel is used once at every place of the output.
        parts[path[0]][1] += 2 * math.prod(given[:-1]) * kernels
        parts[path[0]][2] += 4 * (math.prod(taken) + math.prod(given) + kernels)
    return [(part, *numbers) for part, numbers in parts.items()]


def model_table(names=tuple(PAGES), *, num_classes=115, size=256, out=None):
    """Measures several networks; returns (text, summary) and writes `out` as JSON if given."""
    lines, summary, totals = [], {}, {}
    header = ["", "parameters", "GFLOP", "MB moved"]
    for name in names:
        rows = measure(name, num_classes=num_classes, size=size)
        total = ("all", *(sum(row[column] for row in rows) for column in (1, 2, 3)))
        totals[name] = total
        cells = [[part, f"{p:,}", f"{f / 1e9:.3f}", f"{b / 1e6:.1f}"] for part, p, f, b in rows]
        cells.append(["all", f"{total[1]:,}", f"{total[2] / 1e9:.3f}", f"{total[3] / 1e6:.1f}"])
        lines += [name, console.format_table(header, cells), ""]
        keys = ("part", "parameters", "flops", "bytes")
        summary[name] = [dict(zip(keys, row, strict=True)) for row in [*rows, total]]
    header = ["", "parameters", "paper", "GFLOP forward", "MB moved at least"]
    rows = [
        [
            n,
            f"{t[1] / 1e6:.2f} M",
            f"{PAPER_MILLIONS[n]:.2f} M",
            f"{t[2] / 1e9:.2f}",
            f"{t[3] / 1e6:.0f}",
        ]
        for n, t in totals.items()
    ]
    lines.append(console.format_table(header, rows))
    lines.append(f"\n{num_classes} labels, one image of {size} x {size}, float32")
    if out is not None:
        files.write_json(out, {"num_classes": num_classes, "size": size, "networks": summary})
    return "\n".join(lines), summary
