"""Integrated Gradients (Sundararajan et al. 2017; paper, section 5.1) and two controls, in batches.

All is written against logit_fn(images float32 [B, H, W, C]) -> logits [B, K], images as the network
sees them: here black is 0 and means -1024 HU under the default window (`baselines`). Give
`jax.tree_util.Partial(apply, variables)` rather than a closure: weights are then arguments of the
compiled program and no constants in it. Inputs that are split over devices stay split; a process
must hold all of them: each takes images of its own, as `maknet attribute` does.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from maknet_jax.errors import InputError

METHODS = ("trapezoid", "right", "midpoint", "gauss")
OUTPUTS = ("probability", "logit")
# An output that hardly changes between baseline and image has no meaningful relative error: the
# residual is divided by at least this much.
FLOORS = {"probability": 0.01, "logit": 0.1}
TOLERANCE = 0.01
# On a CPU chunks that stay near its caches are the fastest; an accelerator may use half of itself.
CPU_BUDGET = 1 << 28


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Maps, and how far each is from complete; arrays of NumPy.

    Attributes:
      maps: float32 `[B, T, H, W, C]`: what each value adds to the output of label T.
      start: `[B, T]`, the output at the baseline.
      end: `[B, T]`, the output at the image.
      residual: `[B, T]`, the map's sum less (end - start): 0 if complete.
      relative: |residual| / max(|end - start|, floor), the floor as in `FLOORS`.
      flagged: bool, where `relative` exceeds the tolerance.
    """

    maps: np.ndarray
    start: np.ndarray
    end: np.ndarray
    residual: np.ndarray
    relative: np.ndarray
    flagged: np.ndarray


def quadrature(method, steps):
    """Places in [0, 1] and weights that sum to 1, as float64 arrays.

    The trapezoid has steps + 1 places, the others `steps`. "right" is the sum of the original
    paper; the error of its ends falls with 1 / steps only.

    Raises:
      InputError: an unknown method or fewer steps than 1.
    """
    if method not in METHODS or steps < 1:
        raise InputError(
            f"method {method!r} with {steps} steps: choose {', '.join(METHODS)} and 1 step or more"
        )
    if method == "gauss":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return (places + 1) / 2, weights / 2
    if method == "trapezoid":
        weights = np.full(steps + 1, 1 / steps)
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps + 1), weights
    shift = {"right": 1.0, "midpoint": 0.5}[method]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


def check(method, steps, refine, output):
    """Raises InputError unless `integrated_gradients` takes these options."""
    quadrature(method, steps)
    if refine < 0 or refine and method != "trapezoid":
        raise InputError(f"refine {refine} with {method}: 0 or more, above 0 with trapezoid only")
    if output not in OUTPUTS:
        raise InputError(f"output {output!r} is unknown: choose {' or '.join(OUTPUTS)}")


def integrated_gradients(
    logit_fn,
    images,
    targets,
    baseline,
    *,
    steps=50,
    method="trapezoid",
    output="probability",
    refine=0,
    chunk=None,
    tolerance=TOLERANCE,
    rows=None,
):
    """Integrates the gradient along the line from `baseline` to `images`.

    The labels of one image share its forward passes. The path is walked in chunks by a Python loop:
    inside `lax.map` or `lax.scan` convolutions are almost five times slower on a CPU.

    Args:
      logit_fn: images -> logits, see the module.
      images: float32 `[B, H, W, C]`.
      targets: int `[B, T]`, the labels to explain.
      baseline: of the images' shape, or one that broadcasts to it.
      steps: of the path.
      method: "trapezoid", "right", "midpoint" or "gauss" (Gauss-Legendre).
      output: what is attributed, the "probability" or the "logit".
      refine: how often the steps of an image with a flagged map are doubled at most, by the
        trapezoid only: it reuses what it has. Max pooling puts kinks into the path, at which the
        error of every method falls with 1 / steps only.
      chunk: places of the path a call; None takes what `fit` finds, as for rows. The result does
        not depend on either.
      tolerance: of the relative residual.
      rows: images a call, a multiple of the devices.

    Returns:
      An `Attribution`.

    Raises:
      InputError: an argument is out of range.
    """
    check(method, steps, refine, output)
    logit_fn = as_partial(logit_fn)
    images, targets, baseline = _checked(logit_fn, images, targets, baseline, output)
    if chunk is None or rows is None:
        fits = fit(logit_fn, images, targets.shape[1], output=output)
        chunk, rows = (
            own if own is not None else found
            for own, found in zip((chunk, rows), fits, strict=True)
        )
    if chunk < 1 or rows < 1:
        raise InputError(f"chunk {chunk} and rows {rows} should be 1 or more")
    parts = []
    for start in range(0, len(images), rows):
        own = slice(start, start + rows)
        some = [_rows(images, own, images), targets[own], _rows(baseline, own, images)]
        found = _refined(logit_fn, *some, steps, method, refine, output, chunk, tolerance)
        parts.append([getattr(found, field.name) for field in dataclasses.fields(found)])
    return Attribution(*map(np.concatenate, zip(*parts, strict=True)))


def _refined(logit_fn, images, targets, baseline, steps, method, refine, output, chunk, tolerance):
    given = logit_fn, images, targets, baseline
    found = _along(*given, *quadrature(method, steps), output, chunk, tolerance)
    for _ in range(refine):
        again = found.flagged.any(axis=1)[:, None, None, None, None]
        if not again.any():
            break
        # The trapezoid of twice the steps is its mean with the midpoints.
        middle = _along(*given, *quadrature("midpoint", steps), output, chunk, tolerance)
        finer = np.where(again, (found.maps + middle.maps) / 2, found.maps)
        found = _attribution(finer, found.start, found.end, output, tolerance)
        steps *= 2
    return found


def fit(logit_fn, images, labels, *, output="probability", budget=None):
    """(places of the path, images) that fit into the memory of the devices: 1 a device or more.

    A place keeps its activations for the way back; their sizes are known from the shapes alone.
    The way back needs about a third of that again for each label, beside images and gradients.

    Args:
      logit_fn: see the module.
      images: `[B, H, W, C]`, or their shape and dtype.
      labels: T.
      output: see `integrated_gradients`.
      budget: bytes a device; None takes 256 MiB on CPU and half of an accelerator.
    """

    def kept(count):
        points = jax.ShapeDtypeStruct((count, *images.shape[1:]), jnp.float32)
        targets = jax.ShapeDtypeStruct((count, labels), jnp.int32)
        back = _way_back.eval_shape(as_partial(logit_fn), points, targets, output)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    devices = getattr(getattr(images, "sharding", None), "device_set", None) or {jax.devices()[0]}
    if budget is None:
        stats = next(iter(devices)).memory_stats() or {}
        budget = stats.get("bytes_limit", 2 * CPU_BUDGET) // 2
    images_a_device = -(-images.shape[0] // len(devices))
    an_image = 4 * math.prod(images.shape[1:])
    a_place = (kept(2) - kept(1)) * (1 + labels / 3) + 2 * an_image * (1 + labels)
    room = max(1, int(budget // a_place))
    # Groups of one size where that is possible: each size is a program of its own.
    rows = -(-images_a_device // -(-images_a_device // room))
    return room // rows, rows * len(devices)


def _rows(array, own, like):
    """Rows of an array, on the devices in the way of `like` if that is there."""
    return jax.device_put(array[own], like.sharding) if isinstance(like, jax.Array) else array[own]


def _along(logit_fn, images, targets, baseline, places, weights, output, chunk, tolerance):
    calls = -(-len(places) // chunk)
    chunk = -(-len(places) // calls)
    # One shape of chunk is one compiled program: the last is filled up with weights of 0.
    places, weights = (
        np.pad(values, (0, calls * chunk - len(values))).astype(np.float32).reshape(calls, chunk)
        for values in (places, weights)
    )
    total = 0.0
    for some, their_weights in zip(places, weights, strict=True):
        total += _path_gradients(logit_fn, images, baseline, targets, some, their_weights, output)
    maps = _times_change(total, images, baseline)
    start, end = (_outputs(logit_fn, x, targets, output) for x in (baseline, images))
    return _attribution(maps, start, end, output, tolerance)


def _checked(logit_fn, images, targets, baseline, output):
    """The arguments as arrays of the right shapes and kinds."""
    if output not in OUTPUTS:
        raise InputError(f"output {output!r} is unknown: choose {' or '.join(OUTPUTS)}")
    # What lies on devices stays there as it is split; NumPy's arrays go where they are needed.
    images = images if isinstance(images, jax.Array) else np.asarray(images, np.float32)
    targets, count = np.asarray(targets), _logits.eval_shape(as_partial(logit_fn), images).shape[1]
    if targets.ndim != 2 or len(targets) != len(images) or targets.dtype.kind not in "iu":
        raise InputError(
            f"targets of shape {targets.shape} should be whole numbers [{len(images)}, T]: a row "
            "an image"
        )
    if targets.size == 0 or targets.min() < 0 or targets.max() >= count:
        raise InputError(f"targets should be labels 0 to {count - 1}, at least one an image")
    try:
        on = jnp if isinstance(images, jax.Array) else np
        baseline = on.broadcast_to(on.asarray(baseline, np.float32), images.shape)
    except ValueError:
        raise InputError(
            f"a baseline of shape {np.shape(baseline)} does not broadcast to images of "
            f"{images.shape}: give a number, one image or as many"
        ) from None
    return images, targets.astype(np.int32), baseline


def as_partial(logit_fn):
    """A function as something that a jitted function takes as an argument."""
    return logit_fn if isinstance(logit_fn, Partial) else Partial(logit_fn)


def _selected(logit_fn, images, targets, output):
    """The outputs of the labels `targets` `[B, T]`."""
    logits = jnp.take_along_axis(logit_fn(images).astype(jnp.float32), targets, axis=1)
    return jax.nn.sigmoid(logits) if output == "probability" else logits


_outputs = jax.jit(_selected, static_argnames="output")


# For their shapes alone. Jitted: a trace takes longer than many gradients, and is kept so.
@jax.jit
def _logits(logit_fn, images):
    return logit_fn(images)


@functools.partial(jax.jit, static_argnames="output")
def _way_back(logit_fn, images, targets, output):
    return jax.vjp(lambda x: _selected(logit_fn, x, targets, output), images)[1]


@functools.partial(jax.jit, static_argnames="output")
def masked_outputs(logit_fn, images, baseline, mask, targets, output):
    """The outputs where a mask, 0 or 1 of `[H, W]` or `[B, H, W]`, has made images baseline."""
    mask = mask[..., None]
    return _selected(logit_fn, images * (1 - mask) + baseline * mask, targets, output)


@functools.partial(jax.jit, static_argnames="output")
def _path_gradients(logit_fn, images, baseline, targets, places, weights, output):
    """The weighted sum over places of d output / d image: `[B, T, H, W, C]`."""
    batch, count, labels = len(images), len(places), targets.shape[1]
    along = places[None, :, None, None, None]
    points = baseline[:, None] + along * (images - baseline)[:, None]
    points = points.reshape(-1, *images.shape[1:])
    wanted = jnp.repeat(targets, count, axis=0)
    # One forward pass and, linear in its cotangent, a way back for each label.
    _, back = jax.vjp(lambda x: _selected(logit_fn, x, wanted, output), points)
    cotangents = jnp.tile(weights, batch)[None, :, None] * jnp.eye(labels)[:, None, :]
    (gradients,) = jax.vmap(back)(cotangents)
    gradients = gradients.reshape(labels, batch, count, *images.shape[1:])
    return gradients.sum(axis=2).swapaxes(0, 1)


@jax.jit
def _times_change(gradients, images, baseline):
    return gradients * (images - baseline)[:, None]


def _attribution(maps, start, end, output, tolerance):
    maps, start, end = (np.asarray(array) for array in (maps, start, end))
    change = end.astype(np.float64) - start
    residual = maps.sum(axis=(2, 3, 4), dtype=np.float64) - change
    relative = np.abs(residual) / np.maximum(np.abs(change), FLOORS[output])
    return Attribution(maps, start, end, residual, relative, relative > tolerance)
