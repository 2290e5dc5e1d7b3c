"""Integrated Gradients (Sundararajan et al. 2017; paper, section 5.1), batched.

All functions take a `logit_fn(images float32 [B, H, W, C]) -> logits [B, K]`. Images are network
input: with the default window, -1024 HU is 0. Pass `jax.tree_util.Partial(apply, variables)` rather
than a closure, so that the weights are arguments of the compiled program instead of constants in
it. Inputs that are sharded over devices stay sharded. They must be fully addressable: each process
explains its own images, as in `maknet attribute`.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from maknet_jax.attribution import METHODS, OUTPUTS
from maknet_jax.errors import InputError

Array = jax.Array | np.ndarray
LogitFn = Callable[[Array], jax.Array]

# If the output hardly changes between baseline and image, the relative error is not meaningful: the
# residual is divided by at least this value.
FLOORS = {"probability": 0.01, "logit": 0.1}
TOLERANCE = 0.01  # of the relative residual
# Bytes. On CPU, chunks that fit into the caches are fastest.
CPU_BUDGET = 1 << 28


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Attribution maps and their completeness errors, as NumPy arrays.

    Attributes:
      maps: float32 `[B, T, H, W, C]`: the contribution of each value to the output of label T.
      start: `[B, T]`, the output at the baseline.
      end: `[B, T]`, the output at the image.
      residual: `[B, T]`, the sum of the map minus (end - start): 0 for a complete map.
      relative: `[B, T]`, |residual| / max(|end - start|, floor), with the floor from `FLOORS`.
      flagged: bool `[B, T]`, where `relative` exceeds the tolerance.
    """

    maps: np.ndarray
    start: np.ndarray
    end: np.ndarray
    residual: np.ndarray
    relative: np.ndarray
    flagged: np.ndarray


def logit_fn_of(model: Any, variables: Any, **options: Any) -> Partial:
    """The `logit_fn` of a Flax Linen module, foreign or of this package.

    Args:
      model: model.apply(variables, images, **options) returns logits `[B, K]`, or an object that
        has them as `logits`.
      variables: its parameters, arguments of the compiled program.
      **options: of the call, such as deterministic=True. A parameter `train` defaults to False.
    """
    if "train" in inspect.signature(type(model).__call__).parameters:
        options = {"train": False} | options

    def logits(variables: Any, images: Array) -> jax.Array:
        outputs = model.apply(variables, images, **options)
        return getattr(outputs, "logits", outputs)

    return Partial(logits, variables)


def quadrature(method: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1] and weights that sum to 1, as float64 arrays.

    The trapezoid has steps + 1 nodes, the others `steps`. "right" is the sum of the original paper;
    its error falls only with 1 / steps.

    Raises:
      InputError: an unknown method, or steps below 1.
    """
    if method not in METHODS or steps < 1:
        raise InputError(
            f"method {method!r} with {steps} steps: choose one of {', '.join(METHODS)} and at "
            "least 1 step"
        )
    if method == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    if method == "trapezoid":
        weights = np.full(steps + 1, 1 / steps)
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps + 1), weights
    shift = {"right": 1.0, "midpoint": 0.5}[method]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


def check(method: str, steps: int, refine: int, output: str) -> None:
    """Raises InputError unless `integrated_gradients` accepts these options."""
    quadrature(method, steps)
    if refine < 0 or refine and method != "trapezoid":
        raise InputError(
            f"refine {refine} with method {method!r}: choose 0 or more, above 0 only with trapezoid"
        )
    if output not in OUTPUTS:
        raise InputError(f"output {output!r} is unknown: choose {' or '.join(OUTPUTS)}")


def integrated_gradients(
    logit_fn: LogitFn,
    images: Array,
    targets: ArrayLike,
    baseline: ArrayLike,
    *,
    steps: int = 50,
    method: str = "trapezoid",
    output: str = "probability",
    refine: int = 0,
    chunk: int | None = None,
    tolerance: float = TOLERANCE,
    rows: int | None = None,
) -> Attribution:
    """Integrates the gradient along the straight path from `baseline` to `images`.

    All labels of an image share its forward passes. A Python loop processes the path in chunks:
    inside `lax.map` or `lax.scan`, convolutions are almost five times slower on CPU.

    Args:
      logit_fn: images -> logits, see the module docstring.
      images: float32 `[B, H, W, C]`.
      targets: int `[B, T]`, the labels to explain.
      baseline: float32, broadcast to the shape of the images.
      steps: number of steps along the path.
      method: "trapezoid", "right", "midpoint" or "gauss" (Gauss-Legendre).
      output: "probability" or "logit": the output to attribute.
      refine: maximum number of times that the steps of an image with a flagged map are doubled.
        Trapezoid only, because it reuses the previous gradients. Max pooling adds kinks along the
        path, with which the error of every method falls only with 1 / steps.
      chunk: nodes of the path per call; None takes the result of `fit`. The maps depend neither on
        it nor on `rows`.
      tolerance: relative residual above which a map is flagged.
      rows: images per call, a multiple of the number of devices; None takes the result of `fit`.

    Raises:
      InputError: an argument is out of range.
    """
    check(method, steps, refine, output)
    logit_fn = as_partial(logit_fn)
    images, targets, baseline = _checked(logit_fn, images, targets, baseline)
    if chunk is None or rows is None:
        best_chunk, best_rows = fit(logit_fn, images, targets.shape[1], output=output)
        chunk = best_chunk if chunk is None else chunk
        rows = best_rows if rows is None else rows
    if chunk < 1 or rows < 1:
        raise InputError(f"chunk {chunk} and rows {rows} should be at least 1")
    parts = []
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        integrate = functools.partial(
            _integrate,
            logit_fn,
            _rows(images, part, images),
            targets[part],
            _rows(baseline, part, images),
            output=output,
            chunk=chunk,
            tolerance=tolerance,
        )
        result = _refine(integrate, steps, method, refine, output, tolerance)
        parts.append([getattr(result, field.name) for field in dataclasses.fields(result)])
    return Attribution(*map(np.concatenate, zip(*parts, strict=True)))


def _refine(
    integrate: Callable[[np.ndarray, np.ndarray], Attribution],
    steps: int,
    method: str,
    refine: int,
    output: str,
    tolerance: float,
) -> Attribution:
    """Integrates, then doubles the steps while a map is flagged, at most `refine` times."""
    result = integrate(*quadrature(method, steps))
    for _ in range(refine):
        flagged = result.flagged.any(axis=1)[:, None, None, None, None]
        if not flagged.any():
            break
        # The trapezoid with twice the steps is the mean of the trapezoid and the midpoint rule.
        middle = integrate(*quadrature("midpoint", steps))
        maps = np.where(flagged, (result.maps + middle.maps) / 2, result.maps)
        result = _attribution(maps, result.start, result.end, output, tolerance)
        steps *= 2
    return result


def fit(
    logit_fn: LogitFn,
    images: Array | jax.ShapeDtypeStruct,
    labels: int,
    *,
    output: str = "probability",
    budget: int | None = None,
) -> tuple[int, int]:
    """The number of nodes of the path and of images that fit into memory: (chunk, rows).

    Each node stores its activations for the backward pass; their sizes are computed from shapes
    alone. The backward pass needs about a third of that in addition per label, plus images and
    gradients.

    Args:
      logit_fn: see the module docstring.
      images: `[B, H, W, C]`, or their shape and dtype.
      labels: T, the number of labels per image.
      output: see `integrated_gradients`.
      budget: bytes per device; None takes 256 MiB on CPU and half the memory of an accelerator.

    Returns:
      Nodes per call, at least 1, and images per call, at least one per device.
    """

    def residual_bytes(count: int) -> int:
        points = jax.ShapeDtypeStruct((count, *images.shape[1:]), jnp.float32)
        targets = jax.ShapeDtypeStruct((count, labels), jnp.int32)
        residuals = _vjp.eval_shape(as_partial(logit_fn), points, targets, output)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    devices = getattr(getattr(images, "sharding", None), "device_set", None) or {jax.devices()[0]}
    if budget is None:
        stats = next(iter(devices)).memory_stats() or {}
        budget = stats.get("bytes_limit", 2 * CPU_BUDGET) // 2
    images_per_device = -(-images.shape[0] // len(devices))
    image_bytes = 4 * math.prod(images.shape[1:])
    node_bytes = (residual_bytes(2) - residual_bytes(1)) * (1 + labels / 3)
    node_bytes += 2 * image_bytes * (1 + labels)
    room = max(1, int(budget // node_bytes))
    # Groups of equal size where possible: each size compiles another program.
    rows = -(-images_per_device // -(-images_per_device // room))
    return room // rows, rows * len(devices)


def _rows(array: Array, rows: slice, like: Array) -> Array:
    """Rows of an array, sharded like `like` if that is on devices."""
    part = array[rows]
    return jax.device_put(part, like.sharding) if isinstance(like, jax.Array) else part


def _integrate(
    logit_fn: Partial,
    images: Array,
    targets: np.ndarray,
    baseline: Array,
    nodes: np.ndarray,
    weights: np.ndarray,
    *,
    output: str,
    chunk: int,
    tolerance: float,
) -> Attribution:
    calls = -(-len(nodes) // chunk)
    chunk = -(-len(nodes) // calls)
    # Equal chunks share one compiled program: the last chunk is padded with weights of 0.
    chunks = (
        np.pad(values, (0, calls * chunk - len(values))).astype(np.float32).reshape(calls, chunk)
        for values in (nodes, weights)
    )
    total: jax.Array | float = 0.0
    for some, their_weights in zip(*chunks, strict=True):
        total += _path_gradients(logit_fn, images, baseline, targets, some, their_weights, output)
    maps = _times_change(total, images, baseline)
    start, end = (_outputs(logit_fn, x, targets, output) for x in (baseline, images))
    return _attribution(maps, start, end, output, tolerance)


def _checked(
    logit_fn: Partial, images: Array, targets: ArrayLike, baseline: ArrayLike
) -> tuple[Array, np.ndarray, Array]:
    """Images, targets and baseline as arrays of the right shapes and dtypes."""
    # Arrays on devices keep their sharding; NumPy arrays are copied when they are used.
    images = images if isinstance(images, jax.Array) else np.asarray(images, np.float32)
    targets, count = np.asarray(targets), _logits.eval_shape(logit_fn, images).shape[1]
    if targets.ndim != 2 or len(targets) != len(images) or targets.dtype.kind not in "iu":
        raise InputError(
            f"targets of shape {targets.shape} and dtype {targets.dtype} should be integers of "
            f"shape [{len(images)}, T], one row per image"
        )
    if targets.size == 0 or targets.min() < 0 or targets.max() >= count:
        raise InputError(f"targets should be labels 0 to {count - 1}, at least one per image")
    try:
        on: Any = jnp if isinstance(images, jax.Array) else np
        start: Array = on.broadcast_to(on.asarray(baseline, np.float32), images.shape)
    except ValueError:
        raise InputError(
            f"a baseline of shape {np.shape(baseline)} does not broadcast to images of "
            f"{images.shape}: pass a number, one image, or one per image"
        ) from None
    return images, targets.astype(np.int32), start


def as_partial(logit_fn: LogitFn) -> Partial:
    """`logit_fn` as a pytree, which can be an argument of jitted functions."""
    return logit_fn if isinstance(logit_fn, Partial) else Partial(logit_fn)


def _selected(logit_fn: Partial, images: Array, targets: Array, output: str) -> jax.Array:
    """The outputs `[B, T]` of the labels `targets` `[B, T]`."""
    logits = jnp.take_along_axis(logit_fn(images).astype(jnp.float32), targets, axis=1)
    return jax.nn.sigmoid(logits) if output == "probability" else logits


_outputs = jax.jit(_selected, static_argnames="output")


# These two are only evaluated for shapes. They are jitted to cache their traces: tracing takes
# longer than many gradients.
@jax.jit
def _logits(logit_fn: Partial, images: Array) -> jax.Array:
    return logit_fn(images)


@functools.partial(jax.jit, static_argnames="output")
def _vjp(
    logit_fn: Partial, images: Array, targets: Array, output: str
) -> Callable[[jax.Array], tuple[jax.Array]]:
    return jax.vjp(lambda x: _selected(logit_fn, x, targets, output), images)[1]


@functools.partial(jax.jit, static_argnames="output")
def masked_outputs(
    logit_fn: Partial, images: Array, baseline: Array, mask: Array, targets: Array, output: str
) -> jax.Array:
    """The outputs `[B, T]` of images in which pixels with `mask` 1 are those of the baseline.

    Args:
      logit_fn: see the module docstring.
      images: float32 `[B, H, W, C]`.
      baseline: float32, of the shape of the images.
      mask: float32 `[H, W]` or `[B, H, W]`, 0 or 1.
      targets: int `[B, T]`.
      output: "probability" or "logit".
    """
    mask = mask[..., None]
    return _selected(logit_fn, images * (1 - mask) + baseline * mask, targets, output)


@functools.partial(jax.jit, static_argnames="output")
def _path_gradients(
    logit_fn: Partial,
    images: jax.Array,
    baseline: jax.Array,
    targets: jax.Array,
    nodes: jax.Array,
    weights: jax.Array,
    output: str,
) -> jax.Array:
    """The weighted sum over the nodes of d output / d image: `[B, T, H, W, C]`."""
    batch, count, labels = len(images), len(nodes), targets.shape[1]
    along = nodes[None, :, None, None, None]
    points = baseline[:, None] + along * (images - baseline)[:, None]
    points = points.reshape(-1, *images.shape[1:])
    repeated = jnp.repeat(targets, count, axis=0)
    # One forward pass and one backward pass per label: the vjp is linear in its cotangent.
    _, vjp = jax.vjp(lambda x: _selected(logit_fn, x, repeated, output), points)
    cotangents = jnp.tile(weights, batch)[None, :, None] * jnp.eye(labels)[:, None, :]
    (gradients,) = jax.vmap(vjp)(cotangents)
    gradients = gradients.reshape(labels, batch, count, *images.shape[1:])
    return gradients.sum(axis=2).swapaxes(0, 1)


@jax.jit
def _times_change(gradients: jax.Array, images: jax.Array, baseline: jax.Array) -> jax.Array:
    return gradients * (images - baseline)[:, None]


def _attribution(
    maps: Array, start: Array, end: Array, output: str, tolerance: float
) -> Attribution:
    maps, start, end = (np.asarray(array) for array in (maps, start, end))
    change = end.astype(np.float64) - start
    residual = maps.sum(axis=(2, 3, 4), dtype=np.float64) - change
    relative = np.abs(residual) / np.maximum(np.abs(change), FLOORS[output])
    return Attribution(maps, start, end, residual, relative, relative > tolerance)
