"""Do the maps show what the network uses? Deletion and insertion, with intervals over images.

Petsiuk et al. 2018: delete pixels in the order of a map and watch the confidence fall, or put them
into the baseline and watch it rise. A map that knows no more than chance does as random pixels do.
"""

import numpy as np

from maknet_jax.attribution.integrated_gradients import as_partial, masked_outputs
from maknet_jax.errors import InputError


def ranks(attribution):
    """The place of each pixel of `[..., H, W]` from the most raising one, 0, to the last."""
    flat = attribution.reshape(*attribution.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(flat.shape[-1]), axis=-1)
    return places.reshape(attribution.shape)


def random_ranks(differs, seed):
    """Ranks of pixels in random order, first of those that differ from the baseline.

    To delete air changes nothing: a control that drew it would flatter every map.

    Args:
      differs: bool `[..., H, W]`.
      seed: of the order.
    """
    return ranks(np.random.default_rng(seed).random(differs.shape) + differs)


def curves(logit_fn, images, targets, baseline, order, shares, *, output="probability"):
    """Outputs while pixels are deleted, and while they are inserted.

    Args:
      logit_fn: see `integrated_gradients`, also for what a process must hold.
      images: float32 `[B, H, W, C]`.
      targets: int `[B]`, a label an image.
      baseline: float32, as the images.
      order: `[B, H, W]` of `ranks`.
      shares: `[F]` of the pixels, ascending from 0 to 1.
      output: "probability" or "logit".

    Returns:
      (deletion, insertion), each `[B, F]`.
    """
    shares = np.asarray(shares)
    if shares[0] != 0 or shares[-1] != 1 or (np.diff(shares) <= 0).any():
        raise InputError(f"shares {shares.tolist()} should ascend from 0 to 1")
    logit_fn, targets = as_partial(logit_fn), np.asarray(targets, np.int32)[:, None]
    found = ([], [])
    for share in shares:
        gone = (order < round(share * order[0].size)).astype(np.float32)
        for values, mask in zip(found, (gone, 1 - gone), strict=True):
            values.append(masked_outputs(logit_fn, images, baseline, mask, targets, output)[:, 0])
    return tuple(np.stack([np.asarray(value) for value in values], axis=1) for values in found)


def area(curve, shares):
    """The area under curves `[..., F]` over the shares: the mean output on the way."""
    return np.trapezoid(curve, shares, axis=-1)


def mass_inside(attribution, region):
    """The share of a map's raising mass that lies in a region; nan where nothing raises.

    Args:
      attribution: `[H, W]`.
      region: bool `[H, W]`.
    """
    raising = np.maximum(attribution, 0)
    total = raising.sum(dtype=np.float64)
    return float(raising[region].sum(dtype=np.float64) / total) if total > 0 else np.nan


def bootstrap(values, groups=None, *, seed=0, draws=2000, level=0.95):
    """(mean, low, high) of the mean over images, by resampling them, or groups of them.

    Args:
      values: `[N]`, one an image.
      groups: of each image what it shares with those that it is not independent of: its patient or
        series; None takes every image as independent.
      seed: of the draws.
      draws: resamplings.
      level: of the interval.
    """
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise InputError("an interval needs finite values of one image or more")
    groups = np.arange(values.size) if groups is None else np.unique(groups, return_inverse=True)[1]
    counts, sums = np.bincount(groups), np.bincount(groups, values)
    rows = np.random.default_rng(seed).integers(counts.size, size=(draws, counts.size))
    means = sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
