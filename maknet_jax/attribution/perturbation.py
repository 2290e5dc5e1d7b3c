"""Baselines and perturbed images (paper, section 5.2), in HU, before any normalisation."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from maknet_jax.errors import InputError, Rejected

AIR = -1024  # HU, black
NOISE = 50  # HU: air in a scan is -1000 plus or minus a few tens


def make_baseline(image: np.ndarray, kind: str) -> np.ndarray:
    """The start of the path of attributions, and the replacement of deleted pixels.

    Args:
      image: int16 HU `[H, W, C]`.
      kind: "black" (-1024 HU), "blurred" (sigma a tenth of the edge) or a number in HU.

    Returns:
      int16 HU `[H, W, C]`.

    Raises:
      InputError: an unknown kind.
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
            f"baseline {kind!r} is unknown: choose black, blurred or an integer in HU"
        ) from None


def neighbour(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Fills the region with the pixels around it, mirrored at its edge, so that texture remains.

    Args:
      image: int16 HU `[H, W, C]`.
      region: bool `[H, W]`.

    Returns:
      int16 HU `[H, W, C]`, equal to the image outside the region.

    Raises:
      Rejected: the region is the whole image.
    """
    if not region.any():
        return image.copy()
    if region.all():
        raise Rejected("the region fills the whole image: there are no pixels around it")
    _, edge = ndimage.distance_transform_edt(region, return_indices=True)
    here = np.indices(region.shape)
    # The mirrored pixel is as far outside the edge as the pixel is inside it. If it is outside the
    # image or inside the region, the edge pixel is used instead.
    mirrored = 2 * edge - here
    shape = np.reshape(region.shape, (2, 1, 1))
    clipped = np.clip(mirrored, 0, shape - 1)
    invalid = (mirrored != clipped).any(axis=0) | region[tuple(clipped)]
    source = np.where(invalid, edge, clipped)
    return np.where(region[..., None], image[tuple(source)], image)


def patch(image: np.ndarray, region: np.ndarray, fill: int = AIR) -> np.ndarray:
    """Fills the bounding box of each connected part of the region.

    Args:
      image: int16 HU `[H, W, C]`.
      region: bool `[H, W]`.
      fill: HU, black by default.

    Returns:
      int16 HU `[H, W, C]`.
    """
    changed = image.copy()
    for box in ndimage.find_objects(ndimage.label(region)[0]):
        changed[box] = fill
    return changed


def most_influential(attribution: np.ndarray, share: float) -> np.ndarray:
    """The mask of the pixels with the largest positive attribution.

    Args:
      attribution: `[H, W]`.
      share: maximum share of all pixels, in (0, 1].

    Returns:
      bool `[H, W]`.

    Raises:
      InputError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share} should be above 0 and at most 1")
    count = max(1, round(share * attribution.size))
    order = np.argsort(-attribution.ravel(), kind="stable")[:count]
    mask = np.zeros(attribution.size, bool)
    mask[order] = True
    return mask.reshape(attribution.shape) & (attribution > 0)


def differs(image: np.ndarray, baseline: np.ndarray | int) -> np.ndarray:
    """Whether two HU images `[..., C]` differ by more than the noise of air: bool `[...]`."""
    return (np.abs(image.astype(np.int32) - baseline) > NOISE).any(axis=-1)


def delete(image: np.ndarray, region: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """`image` with the pixels of `baseline` in the region; `[H, W, C]`, bool `[H, W]`."""
    return np.where(region[..., None], baseline, image)


def box_region(box: Sequence[float], crop: Sequence[int], size: int) -> np.ndarray:
    """A box in the slice as a region of the network's image.

    Args:
      box: (left, top, right, bottom) in pixels of the slice from 0 (DeepLesion counts from 1).
      crop: (top, left, bottom, right) of the part of the slice that the image shows.
      size: the edge of the image in pixels.

    Returns:
      bool `[size, size]`; a box inside the crop covers at least one pixel.
    """
    top, left, bottom, right = crop
    start, edge = np.array([top, left]), np.array([bottom - top, right - left])
    corners = [(np.array(place[::-1]) - start) * size / edge for place in (box[:2], box[2:])]
    region = np.zeros((size, size), bool)
    first = np.floor(np.clip(corners[0], 0, size)).astype(int)
    last = np.ceil(np.clip(corners[1], 0, size)).astype(int)
    region[first[0] : last[0], first[1] : last[1]] = True
    return region


def mask_region(mask: np.ndarray, crop: Sequence[int], size: int) -> np.ndarray:
    """A mask or label map `[H, W]` of the slice, cropped and resized like its image (nearest)."""
    top, left, bottom, right = crop
    rows = top + ((np.arange(size) + 0.5) * (bottom - top) / size).astype(int)
    columns = left + ((np.arange(size) + 0.5) * (right - left) / size).astype(int)
    return mask[np.ix_(rows, columns)]
