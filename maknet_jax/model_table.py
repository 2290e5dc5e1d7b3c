"""`maknet models`: costs of the networks, block by block, beside table 1; the released models."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from maknet_jax import console, files, models
from maknet_jax.errors import InputError
from maknet_jax.models import layer_shapes
from maknet_jax.runs import config as configs
from maknet_jax.runs import released

CONFIGS = {"maknet": "teacher", "vgg16": "vgg16", "resnet18": "resnet18"}
SPEED = (
    "speed: benchmarks/speed/networks.py (images per second), makconv.py (forms of MAKConv), "
    "against_pytorch.py and aot.py of a clone of the repository; results: benchmarks/RESULTS.md"
)
PAPER_MILLIONS = {"maknet": 4.50, "vgg16": 14.78, "resnet18": 11.25}  # table 1


class Cost(NamedTuple):
    """The cost of a top-level part of a network, see `measure`."""

    part: str
    parameters: int
    flops: int
    bytes: int


def measure(name: str, *, num_classes: int = 115, size: int = 256) -> list[Cost]:
    """Costs of each top-level part of a network, from shapes alone: nothing is computed.

    FLOPs are those of convolutions and dense layers, two per multiply-add. Bytes are the minimum
    that these layers move in float32 for one image: inputs, outputs and kernels.

    Args:
      name: maknet, vgg16 or resnet18, with the options of its config.
      num_classes: labels.
      size: pixels per side of the image.

    Returns:
      One `Cost` per part, in the order of the network.

    Raises:
      InputError: an unknown network.
    """
    if name not in CONFIGS:
        raise InputError(f"model {name!r} is unknown: choose one of {', '.join(CONFIGS)}")
    model = models.build(name, num_classes, **configs.load(CONFIGS[name]).model.options.to_dict())
    layers, params = layer_shapes.trace(model, size)
    parts = {part: [0, 0, 0] for part in dict.fromkeys([*(one.part for one in layers), *params])}
    for part, tree in params.items():
        parts[part][0] = sum(leaf.size for leaf in jax.tree.leaves(tree))
    for part, inputs, outputs, kernels in layers:
        # Every element of a kernel is used once at every position of the output.
        parts[part][1] += 2 * math.prod(outputs[:-1]) * kernels
        parts[part][2] += 4 * (math.prod(inputs) + math.prod(outputs) + kernels)
    return [Cost(part, *numbers) for part, numbers in parts.items()]


def _released() -> list[str]:
    """The released models and their labels, as lines."""
    lines = ["released models, for --model NAME and maknet_jax.load(NAME):"]
    for model in released.describe():
        lines.append(
            f"  {model.name}: {model.network}, images of {model.size} x {model.size}, trained on "
            f"{model.trained_on}"
        )
        lines.append(f"    {len(model.labels)} labels: {', '.join(model.labels)}")
    return lines


def model_table(
    names: Sequence[str] = tuple(CONFIGS),
    *,
    num_classes: int = 115,
    size: int = 256,
    out: pathlib.Path | None = None,
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Tables of the costs of several networks.

    Args:
      names: networks, see `measure`.
      num_classes: labels.
      size: pixels per side of the image.
      out: a JSON file to write the costs to.

    Returns:
      (text, costs): the tables as text, and for each network one dict per part.

    Raises:
      InputError: an unknown network.
    """
    lines, costs, totals = [*_released(), ""], {}, []
    for name in names:
        parts = measure(name, num_classes=num_classes, size=size)
        total = Cost("all", *map(sum, zip(*(part[1:] for part in parts), strict=True)))
        rows = [*parts, total]
        cells = [
            [c.part, f"{c.parameters:,}", f"{c.flops / 1e9:.3f}", f"{c.bytes / 1e6:.1f}"]
            for c in rows
        ]
        header = ["", "parameters", "GFLOP", "MB moved"]
        lines += [name, console.format_table(header, cells), ""]
        costs[name] = [row._asdict() for row in rows]
        totals.append(
            [
                name,
                f"{total.parameters / 1e6:.2f} M",
                f"{PAPER_MILLIONS[name]:.2f} M",
                f"{total.flops / 1e9:.2f}",
                f"{total.bytes / 1e6:.0f}",
            ]
        )
    header = ["", "parameters", "paper", "GFLOP forward", "MB moved at least"]
    lines.append(console.format_table(header, totals))
    lines.append(f"\n{num_classes} labels, one image of {size} x {size}, float32")
    lines.append(SPEED)
    if out is not None:
        files.write_json(out, {"num_classes": num_classes, "size": size, "networks": costs})
    return "\n".join(lines), costs
