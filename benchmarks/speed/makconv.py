"""MAKConv in each of its forms and full convolutions, at the shapes of the network's blocks.

    python benchmarks/speed/makconv.py --quick    # the layers in small, under a minute
    python benchmarks/speed/makconv.py [--precision float32,bfloat16] [--batch 8]

Layers: the middle layer of each dense block as MAKConv and as a full k x k convolution of the same
channels, the last convolution of VGG16 at the same resolution, and the block's 1 x 1 convolution.
All run this package's code, or where the row says so XLA's own gradient. Blocks: the whole dense
blocks, with BatchNorm, Mish and CBAM (not with --quick: they take a minute to compile). FLOPs and
bytes are those of XLA's compiled program.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jax.typing import DTypeLike

from benchmarks import harness
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.models import convolution, layers, vgg
from maknet_jax.runs import config as configs

VGG = "VGG16's convolution"
FULL = {
    "size": 256,
    "repeats": 7,
    "batch": 8,
    "precision": ["float32", "bfloat16"],
    "parts": ["layers", "blocks"],
}
QUICK = {"size": 128, "repeats": 2, "batch": 4, "precision": ["float32"], "parts": ["layers"]}


class Case(NamedTuple):
    """A module to time, and its input.

    Attributes:
      module: with `[B, edge, edge, channels]` as its first argument.
      edge: pixels per side of the input.
      channels: of the input.
      forward: further arguments of the forward pass.
      gradient: further arguments of the gradient pass.
    """

    module: nn.Module
    edge: int
    channels: int
    forward: tuple[bool, ...] = ()
    gradient: tuple[bool, ...] = ()


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--batch", type=options.count, help="images")
    parser.add_argument("--precision", type=harness.precisions, help="float32,bfloat16")
    parser.add_argument("--parts", type=harness.words, help="layers,blocks")
    parser.add_argument("--page", default="maknet", help="config page of a MAKNet")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    model = configs.load(harness.page_of(chosen.page)[1]).model
    if model.name != "maknet":
        raise InputError(f"page {chosen.page!r} is a {model.name}: give one of a maknet")
    if unknown := set(chosen.parts) - set(FULL["parts"]):
        raise InputError(f"parts {', '.join(unknown)} are unknown: choose layers, blocks or both")
    rows = []
    for precision in chosen.precision:
        for part, place, group in places(model.options, chosen.size, precision):
            if part in chosen.parts:
                rows += _measure(chosen, precision, place, group)
    harness.report(
        __file__,
        argv,
        chosen,
        ["place", "what", "precision", "pass", "GFLOP", "MB", "ms", "faster", "than VGG16"],
        [_cells(row) for row in rows],
        [
            f"{chosen.batch} images of {chosen.size} x {chosen.size} on one device; medians of "
            f"{chosen.repeats} turns (lowest to highest)",
            "faster: speed relative to the first row of the same place and pass; than VGG16: "
            "relative to VGG16's convolution",
            "gradient: forward and gradient of input and weights, dense blocks in training mode",
        ],
        {"rows": rows},
    )


class Convolution(nn.Module):
    """A full convolution without bias, computed by `models.convolution`."""

    features: int
    edge: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H, W, features]`."""
        shape = (self.edge, self.edge, x.shape[-1], self.features)
        kernel = layers.Kernel(shape, self.dtype, name="conv")()
        return convolution.convolve(x.astype(self.dtype), kernel)


def places(
    network: ml_collections.ConfigDict, size: int, precision: str
) -> Iterator[tuple[str, str, dict[str, Case]]]:
    """The shapes of a MAKNet's blocks.

    Args:
      network: the options of the model.
      size: pixels per side of the image.
      precision: of the activations.

    Yields:
      (part, name, cases by row label); the others are compared with the first case.
    """
    k, dtype = network.kernel_size, jnp.dtype(precision)
    width = network.stem
    shapes = zip(network.blocks, network.growth_rates, network.widths, strict=True)
    for number, (count, growth_rate, features) in enumerate(shapes):
        edge = size // 4 >> number
        channels = width + count // 2 * growth_rate
        xla = nn.Conv(growth_rate, (k, k), use_bias=False, dtype=dtype)
        group = {
            f"full {k} x {k}": Case(Convolution(growth_rate, k, dtype), edge, channels),
            "the same, gradient by XLA": Case(xla, edge, channels),
        }
        for form in layers.FORMS:
            layer = layers.MAKConv(growth_rate, k, form=form, dtype=dtype)
            group[f"MAKConv {form}"] = Case(layer, edge, channels)
        if number + 2 < len(vgg.STAGES):  # VGG16 halves the image behind each stage
            last = vgg.STAGES[number + 2][-1]
            group[VGG] = Case(Convolution(last, 3, dtype), edge, last)
        yield "layers", f"{edge} x {edge}, {channels} to {growth_rate}", group
        channels = width + count * growth_rate
        xla = nn.Conv(features, (1, 1), use_bias=False, dtype=dtype)
        group = {
            "1 x 1, gradient by XLA": Case(xla, edge, channels),
            "1 x 1": Case(Convolution(features, 1, dtype), edge, channels),
        }
        yield "layers", f"{edge} x {edge}, {channels} to {features}", group
        group = {}
        for form in layers.FORMS:
            block = layers.DenseBlock(count, growth_rate, features, k, form=form, dtype=dtype)
            group[f"dense block {form}"] = Case(block, edge, width, (False,), (True,))
        yield "blocks", f"{edge} x {edge}, {width} to {features}", group
        width = features


def _measure(
    chosen: argparse.Namespace, precision: str, place: str, group: dict[str, Case]
) -> list[dict[str, Any]]:
    """The rows of one place; all its timings take turns."""
    timers, rows = {}, {}
    for what, case in group.items():
        passes = _compile(case, batch=chosen.batch, precision=precision)
        for name, (call, cost) in passes.items():
            rows[what, name] = {"place": place, "what": what, "precision": precision, "pass": name}
            rows[what, name] |= {"flops": cost.get("flops"), "bytes": cost.get("bytes accessed")}
            run = functools.partial(harness.elapsed, call)
            timers[what, name] = harness.timer(run, at_least=0.1)
    seconds = harness.take_turns(timers, chosen.repeats)
    first = next(iter(rows))[0]
    for (what, name), row in rows.items():
        row["seconds"] = seconds[what, name]
        row["milliseconds"] = harness.spread([1e3 * value for value in seconds[what, name]])
        row["faster"] = harness.ratios(seconds[first, name], seconds[what, name])
        if (VGG, name) in seconds:
            row["faster_than_vgg16"] = harness.ratios(seconds[VGG, name], seconds[what, name])
    return list(rows.values())


def _compile(
    case: Case, *, batch: int, precision: str
) -> dict[str, tuple[Callable[[], Any], dict[str, float]]]:
    """{pass: (call, XLA's costs)} of a module on random input."""
    shape = (batch, case.edge, case.edge, case.channels)
    x = jax.random.normal(jax.random.key(0), shape, precision)
    variables = case.module.init(jax.random.key(1), x, *case.forward)

    def forward(variables: dict[str, Any], x: jax.Array) -> jax.Array:
        return case.module.apply(variables, x, *case.forward)

    def gradient(
        variables: dict[str, Any], x: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, Any]:
        def apply(params: Any, x: jax.Array) -> jax.Array:
            changed = variables | {"params": params}
            return case.module.apply(changed, x, *case.gradient, mutable=["batch_stats"])[0]

        # With the output: a convolution's gradient alone needs no forward, and XLA would drop it.
        output, pull = jax.vjp(apply, variables["params"], x)
        return output, pull(cotangent)

    cotangent = jnp.ones_like(jax.eval_shape(forward, variables, x))
    passes = {}
    for function, arguments in ((forward, (variables, x)), (gradient, (variables, x, cotangent))):
        compiled = jax.jit(function).lower(*arguments).compile()
        call = functools.partial(compiled, *arguments)
        passes[function.__name__] = (call, compiled.cost_analysis() or {})  # None on some platforms
    return passes


def _cells(row: dict[str, Any]) -> list[str]:
    costs = ((row["flops"], 1e9), (row["bytes"], 1e6))
    vgg16 = row.get("faster_than_vgg16")
    return [
        row["place"],
        row["what"],
        row["precision"],
        row["pass"],
        *("" if cost is None else f"{cost / unit:.3g}" for cost, unit in costs),
        harness.shown(row["milliseconds"]),
        harness.shown(row["faster"], "x"),
        harness.shown(vgg16, "x") if vgg16 else "",
    ]


if __name__ == "__main__":
    harness.run(main)
