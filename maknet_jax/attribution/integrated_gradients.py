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
TRACED_NODES = 13  # see `fit`


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
    inside `lax.map` or `lax.scan`, convolutions are almost five times slower on CPU. All chunks,
    including those of doubled steps, and all groups of images share one program.

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
    nodes, rows = len(quadrature(method, steps)[0]), min(rows, len(images))
    chunk = -(-nodes // -(-nodes // chunk))  # equal chunks, with the least padding
    parts = []
    for start in range(0, len(images), rows):
        # The last group is padded with the last image, so that all have one shape.
        part = np.minimum(np.arange(start, start + rows), len(images) - 1)
        some, base = (_rows(array, part, images) for array in (images, baseline))
        first, last = (_select(outputs(logit_fn, x)[output], targets[part]) for x in (base, some))
        integrate = functools.partial(
            _integrate, logit_fn, some, targets[part], base, output=output, chunk=chunk
        )
        check_maps = functools.partial(
            _attribution, start=first, end=last, output=output, tolerance=tolerance
        )
        result = _refine(integrate, check_maps, steps, method, refine)
        parts.append([getattr(result, field.name) for field in dataclasses.fields(result)])
    joined = map(np.concatenate, zip(*parts, strict=True))
    return Attribution(*(array[: len(images)] for array in joined))


def _refine(
    integrate: Callable[[np.ndarray, np.ndarray], np.ndarray],
    check_maps: Callable[[np.ndarray], Attribution],
    steps: int,
    method: str,
    refine: int,
) -> Attribution:
    """Integrates, then doubles the steps while a map is flagged, at most `refine` times."""
    result = check_maps(integrate(*quadrature(method, steps)))
    for _ in range(refine):
        flagged = result.flagged.any(axis=1)[:, None, None, None, None]
        if not flagged.any():
            break
        # The trapezoid with twice the steps is the mean of the trapezoid and the midpoint rule.
        middle = integrate(*quadrature("midpoint", steps))
        result = check_maps(np.where(flagged, (result.maps + middle) / 2, result.maps))
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

    devices = getattr(getattr(images, "sharding", None), "device_set", None) or {jax.devices()[0]}
    if budget is None:
        stats = next(iter(devices)).memory_stats() or {}
        budget = stats.get("bytes_limit", 2 * CPU_BUDGET) // 2
    images_per_device = -(-images.shape[0] // len(devices))
    image_bytes = 4 * math.prod(images.shape[1:])
    node_bytes = _residual_bytes(as_partial(logit_fn), images.shape[1:], labels, output)
    node_bytes *= 1 + labels / 3
    node_bytes += 2 * image_bytes * (1 + labels)
    room = max(1, int(budget // node_bytes))
    # Groups of equal size where possible: the last one is padded.
    rows = -(-images_per_device // -(-images_per_device // room))
    return room // rows, rows * len(devices)


def _residual_bytes(logit_fn: Partial, shape: tuple[int, ...], labels: int, output: str) -> float:
    """Bytes that one node of the path stores for the backward pass.

    Traced once, with `TRACED_NODES` nodes: of the stored arrays, those whose first axis is a
    multiple of this prime number are activations, the others weights.
    """
    points = jax.ShapeDtypeStruct((TRACED_NODES, *shape), jnp.float32)
    targets = jax.ShapeDtypeStruct((TRACED_NODES, labels), jnp.int32)
    stored = jax.tree.leaves(_vjp.eval_shape(logit_fn, points, targets, output))
    activations = [x for x in stored if x.shape and x.shape[0] % TRACED_NODES == 0]
    return sum(x.size * x.dtype.itemsize for x in activations) / TRACED_NODES


def _rows(array: Array, rows: np.ndarray, like: Array) -> Array:
    """Rows of an array, sharded like `like` if that is on devices."""
    if len(rows) == len(array):
        return array
    part = np.asarray(array)[rows]
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
) -> np.ndarray:
    """The maps `[B, T, H, W, C]` by one rule of quadrature."""
    calls = -(-len(nodes) // chunk)
    # The last chunk is padded with weights of 0.
    chunks = (
        np.pad(values, (0, calls * chunk - len(values))).astype(np.float32).reshape(calls, chunk)
        for values in (nodes, weights)
    )
    total = functools.reduce(
        jnp.add,
        (
            _path_gradients(logit_fn, images, baseline, targets, *each, output)
            for each in zip(*chunks, strict=True)
        ),
    )
    return np.asarray(total) * (np.asarray(images) - np.asarray(baseline))[:, None]


def _checked(
    logit_fn: Partial, images: Array, targets: ArrayLike, baseline: ArrayLike
) -> tuple[Array, np.ndarray, Array]:
    """Images, targets and baseline as arrays of the right shapes and dtypes."""
    # Arrays on devices keep their sharding; NumPy arrays are copied when they are used.
    images = images if isinstance(images, jax.Array) else np.asarray(images, np.float32)
    targets = np.asarray(targets)
    count = _outputs.eval_shape(logit_fn, images)["logit"].shape[1]
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


def outputs(logit_fn: LogitFn, images: Array) -> dict[str, jax.Array]:
    """The outputs of all labels: a name of `OUTPUTS` -> `[B, K]`, float32.

    Args:
      logit_fn: see the module docstring.
      images: float32 `[B, H, W, C]`.
    """
    return _outputs(as_partial(logit_fn), images)


@jax.jit
def _outputs(logit_fn: Partial, images: Array) -> dict[str, jax.Array]:
    logits = logit_fn(images).astype(jnp.float32)
    return {"logit": logits, "probability": jax.nn.sigmoid(logits)}


def _select(values: ArrayLike, targets: np.ndarray) -> np.ndarray:
    """The columns `targets` `[B, T]` of `[B, K]`: `[B, T]`."""
    return np.take_along_axis(np.asarray(values), targets, axis=1)


def _selected(logit_fn: Partial, images: Array, targets: Array, output: str) -> jax.Array:
    """The outputs `[B, T]` of the labels `targets` `[B, T]`, to be differentiated."""
    logits = jnp.take_along_axis(logit_fn(images).astype(jnp.float32), targets, axis=1)
    return jax.nn.sigmoid(logits) if output == "probability" else logits


# Only evaluated for shapes. Jitted to cache its traces: tracing takes longer than many gradients.
@functools.partial(jax.jit, static_argnames="output")
def _vjp(
    logit_fn: Partial, images: Array, targets: Array, output: str
) -> Callable[[jax.Array], tuple[jax.Array]]:
    return jax.vjp(lambda x: _selected(logit_fn, x, targets, output), images)[1]


@jax.jit
def replace(images: Array, baseline: Array, mask: Array) -> jax.Array:
    """Images in which pixels with `mask` 1 are those of the baseline.

    Args:
      images: float32 `[B, H, W, C]`.
      baseline: float32, of the shape of the images.
      mask: float32 `[H, W]` or `[B, H, W]`, 0 or 1.
    """
    mask = mask[..., None]
    return jnp.asarray(images * (1 - mask) + baseline * mask)


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


def _attribution(
    maps: np.ndarray, start: np.ndarray, end: np.ndarray, output: str, tolerance: float
) -> Attribution:
    change = end.astype(np.float64) - start
    residual = maps.sum(axis=(2, 3, 4), dtype=np.float64) - change
    relative = np.abs(residual) / np.maximum(np.abs(change), FLOORS[output])
    return Attribution(maps, start, end, residual, relative, relative > tolerance)
