"""MAKConv in each of its forms and full convolutions, with the shapes of the network's blocks.

    python benchmarks/speed/makconv.py --quick  # small layers, under a minute
    python benchmarks/speed/makconv.py [--precision float32,bfloat16] [--batch 8]

Layers: the middle layer of each dense block as MAKConv and as a full k x k convolution of the same
channels, the last convolution of VGG16 at the same resolution, and the block's 1 x 1 convolution.
All use the convolutions of this package, unless the row says that XLA computes the gradient.
Blocks: the whole dense blocks with BatchNorm, Mish and CBAM (not with --quick: compiling them takes
a minute). FLOPs and bytes are XLA's counts for the compiled program.
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

from benchmarks import harness, timing
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.models import convolution, layers, vgg
from maknet_jax.runs import config as configs

VGG = "VGG16's convolution"
FULL: dict[str, Any] = {
    "size": 256,
    "repeats": 7,
    "batch": 8,
    "precision": ["float32", "bfloat16"],
    "parts": ["layers", "blocks"],
}
QUICK = {"size": 128, "repeats": 2, "batch": 4, "precision": ["float32"], "parts": ["layers"]}


class Case(NamedTuple):
    """A module to time and the shape of its input.

    Attributes:
      module: called with `[B, edge, edge, channels]`.
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
    """Measures, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--batch", type=options.count, help="images per step")
    parser.add_argument("--precision", type=harness.precisions, help="float32,bfloat16")
    parser.add_argument("--parts", type=harness.words, help="layers,blocks")
    # dest: the JSON of earlier runs has this setting as "page".
    parser.add_argument("--config", dest="page", default="maknet", help="config of a MAKNet")
    parser.add_argument("--page", dest="page", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    model = configs.load(harness.config_of(chosen.page)[1]).model
    if model.name != "maknet":
        raise InputError(
            f"--config {chosen.page!r} has model {model.name}: pass the config of a maknet"
        )
    if unknown := set(chosen.parts) - set(FULL["parts"]):
        raise InputError(f"--parts {','.join(unknown)} is unknown: choose layers, blocks or both")
    rows = []
    for precision in chosen.precision:
        for part, place, group in places(model.options, chosen.size, precision):
            if part in chosen.parts:
                rows += _measure(chosen, precision, place, group)
    harness.report(
        __file__,
        argv,
        chosen,
        ["place", "what", "precision", "pass", "GFLOP", "MB", "ms", "speed-up", "over VGG16"],
        [_cells(row) for row in rows],
        [
            f"{chosen.batch} images of {chosen.size} x {chosen.size} on one device; medians of "
            f"{chosen.repeats} turns (lowest to highest)",
            "speed-up: over the first row of the same place and pass; over VGG16: over VGG16's "
            "convolution",
            "gradient: forward pass, gradients of input and weights; dense blocks in training mode",
        ],
        {"rows": rows},
    )


class Convolution(nn.Module):
    """A full convolution without bias by `models.convolution`."""

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
    """Yields the modules to compare, with the shapes of a MAKNet's blocks.

    Args:
      network: the options of the model.
      size: pixels per side of the image.
      precision: of the activations.

    Yields:
      (part, place, cases by row label); the first case is the reference.
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
        if number + 2 < len(vgg.STAGES):  # VGG16 halves the image after each stage
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
    """The rows of one place, timed in turns."""
    timers: dict[tuple[str, str], Callable[[], float]] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for label, case in group.items():
        passes = _compile(case, batch=chosen.batch, precision=precision)
        for name, (call, cost) in passes.items():
            rows[label, name] = {
                "place": place,
                "what": label,
                "precision": precision,
                "pass": name,
            }
            rows[label, name] |= {"flops": cost.get("flops"), "bytes": cost.get("bytes accessed")}
            run = functools.partial(timing.elapsed, call)
            timers[label, name] = timing.timer(run, at_least=0.1)
    seconds = timing.take_turns(timers, chosen.repeats)
    first = next(iter(rows))[0]
    for (label, name), row in rows.items():
        row["seconds"] = seconds[label, name]
        row["milliseconds"] = timing.spread([1e3 * value for value in seconds[label, name]])
        row["faster"] = timing.ratios(seconds[first, name], seconds[label, name])
        if (VGG, name) in seconds:
            row["faster_than_vgg16"] = timing.ratios(seconds[VGG, name], seconds[label, name])
    return list(rows.values())


def _compile(
    case: Case, *, batch: int, precision: str
) -> dict[str, tuple[Callable[[], Any], dict[str, float]]]:
    """Compiles the forward and the gradient pass of a module.

    Returns:
      pass -> (call on random input, XLA's cost analysis).
    """
    shape = (batch, case.edge, case.edge, case.channels)
    x = jax.random.normal(jax.random.key(0), shape, precision)
    variables = case.module.init(jax.random.key(1), x, *case.forward)

    def forward(variables: dict[str, Any], x: jax.Array) -> jax.Array:
        output = case.module.apply(variables, x, *case.forward)
        assert isinstance(output, jax.Array)  # nothing is mutable
        return output

    def gradient(
        variables: dict[str, Any], x: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, Any]:
        def apply(params: Any, x: jax.Array) -> jax.Array:
            changed = variables | {"params": params}
            return case.module.apply(changed, x, *case.gradient, mutable=["batch_stats"])[0]

        # Returns the output too: gradients of a convolution do not need it, and XLA would drop the
        # forward pass.
        output, pull = jax.vjp(apply, variables["params"], x)
        return output, pull(cotangent)

    cotangent = jnp.ones_like(jax.eval_shape(forward, variables, x))
    passes: dict[str, tuple[Callable[[], Any], dict[str, float]]] = {}
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
        timing.format_spread(row["milliseconds"]),
        timing.format_spread(row["faster"], "x"),
        timing.format_spread(vgg16, "x") if vgg16 else "",
    ]


if __name__ == "__main__":
    harness.run(main)
