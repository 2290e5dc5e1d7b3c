"""Faithfulness of attribution maps: deletion and insertion, with intervals.

Petsiuk et al. 2018: delete pixels in the order of a map and measure how the confidence falls, or
insert them into the baseline and measure how it rises. An uninformative map does no better than
random pixels.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from maknet_jax.attribution.integrated_gradients import Array, LogitFn, outputs, replace
from maknet_jax.errors import InputError


def ranks(attribution: np.ndarray) -> np.ndarray:
    """The rank of each pixel of `[..., H, W]` by descending attribution, from 0."""
    flat = attribution.reshape(*attribution.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(flat.shape[-1]), axis=-1)
    return places.reshape(attribution.shape)


def random_ranks(differs: np.ndarray, seed: int) -> np.ndarray:
    """Ranks of pixels in random order, with those that differ from the baseline first.

    Deleting air changes nothing, so any map would look good beside a control that deletes air.

    Args:
      differs: bool `[..., H, W]`, see `perturbation.differs`.
      seed: seed of the order.

    Returns:
      int `[..., H, W]`.
    """
    return ranks(np.random.default_rng(seed).random(differs.shape) + differs)


def curves(
    logit_fn: LogitFn,
    images: Array,
    targets: ArrayLike,
    baseline: Array,
    order: np.ndarray,
    shares: ArrayLike,
    *,
    output: str = "probability",
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs while pixels are deleted, and while they are inserted.

    Args:
      logit_fn: see `integrated_gradients`, also for the sharding of inputs.
      images: float32 `[B, H, W, C]`.
      targets: int `[B]`, one label per image.
      baseline: float32 `[B, H, W, C]`.
      order: int `[B, H, W]`, the result of `ranks`.
      shares: `[F]`, the shares of the pixels, ascending from 0 to 1.
      output: "probability" or "logit".

    Returns:
      (deletion, insertion), each `[B, F]`.

    Raises:
      InputError: the shares do not ascend from 0 to 1.
    """
    shares = np.asarray(shares)
    if shares[0] != 0 or shares[-1] != 1 or (np.diff(shares) <= 0).any():
        raise InputError(f"shares {shares.tolist()} should ascend from 0 to 1")
    rows = np.arange(len(images))
    deletion: list[jax.Array] = []
    insertion: list[jax.Array] = []
    for share in shares:
        deleted = (order < round(share * order[0].size)).astype(np.float32)
        for values, mask in ((deletion, deleted), (insertion, 1 - deleted)):
            values.append(outputs(logit_fn, replace(images, baseline, mask))[output])
    # Copied to the host only at the end, so that the loop never blocks on the devices.
    curves = (np.stack(jax.device_get(values), axis=1) for values in (deletion, insertion))
    deleting, inserting = (curve[rows, :, np.asarray(targets)] for curve in curves)
    return deleting, inserting


def area(curve: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The area under curves `[..., F]` over the shares `[F]`: the mean output along the curve."""
    return np.trapezoid(curve, shares, axis=-1)


def mass_inside(attribution: np.ndarray, region: np.ndarray) -> float:
    """The share of the positive attribution mass inside a region; nan if there is no such mass.

    Args:
      attribution: `[H, W]`.
      region: bool `[H, W]`.
    """
    positive = np.maximum(attribution, 0)
    total = positive.sum(dtype=np.float64)
    return float(positive[region].sum(dtype=np.float64) / total) if total > 0 else np.nan


def bootstrap(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over images, by resampling groups of images.

    Args:
      values: `[N]`, one value per image.
      groups: for each image its patient or series: images of one group are not independent. None
        treats every image as independent.
      seed: seed of the draws.
      draws: number of resamplings.
      level: confidence level of the interval.

    Raises:
      InputError: there are no values, or some are not finite.
    """
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise InputError(
            f"{values.size} values, {np.isfinite(values).sum()} of them finite: an interval needs "
            "at least one, all finite"
        )
    numbers = np.arange(values.size)
    if groups is not None:
        numbers = np.unique(groups, return_inverse=True)[1]
    counts, sums = np.bincount(numbers), np.bincount(numbers, values)
    rows = np.random.default_rng(seed).integers(counts.size, size=(draws, counts.size))
    means = sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
