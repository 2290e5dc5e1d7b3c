"""Baselines and perturbed images (paper, section 5.2), in HU: before any normalisation."""

import numpy as np
from scipy import ndimage

from maknet_jax.errors import InputError, Rejected

AIR = -1024  # HU: black
NOISE = 50  # HU: air in a scan lies around -1000, some tens to either side


def make_baseline(image, kind):
    """What an image is compared with, or filled with where something is deleted.

    Args:
      image: int16 HU `[H, W, C]`.
      kind: "black" (-1024 HU), "blurred" (sigma a tenth of the edge) or a number in HU.

    Returns:
      int16 `[H, W, C]`.
    """
    if kind == "black":
        return np.full_like(image, AIR)
    if kind == "blurred":
        sigma = image.shape[0] / 10
        blurred = ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))
        return np.rint(blurred).astype(np.int16)
    try:
        return np.full_like(image, int(kind))
    except (ValueError, OverflowError):
        raise InputError(
            f"baseline {kind!r} is unknown: choose black, blurred or a whole number of HU"
        ) from None


def neighbour(image, region):
    """The region's pixels become those around it, mirrored at its edge: texture stays texture.

    Args:
      image: int16 HU `[H, W, C]`.
      region: bool `[H, W]`, not all of the image.

    Returns:
      int16 `[H, W, C]`; only the region has changed.
    """
    if not region.any():
        return image.copy()
    if region.all():
        raise Rejected("the region fills the whole image: it has no neighbours to take")
    _, edge = ndimage.distance_transform_edt(region, return_indices=True)
    here = np.indices(region.shape)
    # As far outside as the pixel lies inside; where that is no neighbour, the edge itself.
    mirrored = 2 * edge - here
    shape = np.reshape(region.shape, (2, 1, 1))
    inside = np.clip(mirrored, 0, shape - 1)
    bad = (mirrored != inside).any(axis=0) | region[tuple(inside)]
    source = np.where(bad, edge, inside)
    return np.where(region[..., None], image[tuple(source)], image)


def patch(image, region, fill=AIR):
    """A black patch over each connected part of the region: its bounding box.

    Args:
      image: int16 HU `[H, W, C]`.
      region: bool `[H, W]`.
      fill: HU.
    """
    changed = image.copy()
    for box in ndimage.find_objects(ndimage.label(region)[0]):
        changed[box] = fill
    return changed


def most_influential(attribution, share):
    """The mask of the pixels that raise an output most.

    Args:
      attribution: `[H, W]`.
      share: of all pixels, at most so many; pixels that do not raise it are never taken.

    Returns:
      bool `[H, W]`.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share} should lie above 0 and up to 1")
    count = max(1, round(share * attribution.size))
    order = np.argsort(-attribution.ravel(), kind="stable")[:count]
    mask = np.zeros(attribution.size, bool)
    mask[order] = True
    return mask.reshape(attribution.shape) & (attribution > 0)


def differs(image, baseline):
    """Where two HU images `[..., C]` differ by more than air's own noise: bool `[...]`."""
    return (np.abs(image.astype(np.int32) - baseline) > NOISE).any(axis=-1)


def delete(image, region, baseline):
    """The region's pixels become the baseline's, an image of the same shape."""
    return np.where(region[..., None], baseline, image)


def box_region(box, crop, size):
    """A box of the slice as a region of the network's image.

    Args:
      box: (left, top, right, bottom) in pixels of the slice from 0 (DeepLesion counts from 1).
      crop: (top, left, bottom, right) that was cut out of the slice.
      size: the edge of the image.

    Returns:
      bool `[size, size]`; a box in sight is at least a pixel large.
    """
    top, left, bottom, right = crop
    start, edge = np.array([top, left]), np.array([bottom - top, right - left])
    corners = [(np.array(place[::-1]) - start) * size / edge for place in (box[:2], box[2:])]
    region = np.zeros((size, size), bool)
    first = np.floor(np.clip(corners[0], 0, size)).astype(int)
    last = np.ceil(np.clip(corners[1], 0, size)).astype(int)
    region[first[0] : last[0], first[1] : last[1]] = True
    return region


def mask_region(mask, crop, size):
    """A mask or label map of the slice `[H, W]`, cut and resized as its image was (nearest)."""
    top, left, bottom, right = crop
    rows = top + ((np.arange(size) + 0.5) * (bottom - top) / size).astype(int)
    columns = left + ((np.arange(size) + 0.5) * (right - left) / size).astype(int)
    return mask[np.ix_(rows, columns)]
