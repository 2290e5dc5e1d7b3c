"""From slices in Hounsfield units to network input (paper, section 4.1).

Air and table around the body are cropped, the rest is resized to `size` x `size`, and three
consecutive slices become the channels. Values remain int16 HU; the window is applied on the device,
so changing it needs no new records.

The paper says only that the black background around the scan is clipped before resizing to
256 x 256. Our choices: the crop rule (`CROP_RULE`, see `body_box`), one box for all three slices,
stretching the box to a square, padding replaced by air, and repeating the edge slice of a volume.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from maknet_jax.ct import paged, units

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels, half open

AIR = units.AIR
PADDING = -2000  # HU; scanners pad pixels outside their field of view with this or less
CROP_RULE = "body mask > -500 HU, opening 7x7 at 512, components >= 5 % of the largest, margin 1 %"

BODY = -500  # HU; above lung and foam, below fat and skin


def clean(hu: np.ndarray) -> np.ndarray:
    """Replaces padding and values below air by air: HU of any shape -> int16."""
    return np.where(hu <= PADDING, np.int16(AIR), np.maximum(hu, AIR)).astype(np.int16)


def body_box(hu: np.ndarray, *, threshold: float = BODY) -> Box:
    """The bounding box of the body without air and table.

    A morphological opening of 7 x 7 pixels at 512 x 512 (scaled with the matrix) removes thin
    shells, blankets and tubes. The largest remaining component is the body. Other components, such
    as arms and legs, are included if they have at least 5 % of its area, unless they are flat and
    lie below it, like a table.

    This rule is our choice. LesaNet's code has a simpler one: the bounding box of the pixels above
    -768 HU after a 7 x 7 opening, which includes thick tables; its training does not use it.

    Args:
      hu: int16 `[H, W]`.
      threshold: HU above which a pixel can be body.

    Returns:
      (top, left, bottom, right), half open; the whole slice if no body is found.
    """
    height, width = hu.shape
    # Half resolution is precise enough for a box and four times faster.
    stride = 2 if min(height, width) >= 256 else 1
    mask = hu[::stride, ::stride] > threshold
    if threshold > BODY:  # the window maps lungs and fat to black, but skin encloses them
        mask = ndimage.binary_fill_holes(mask)
    reach = max(1, round(min(height, width) * 3 / 512 / stride))
    mask = _opening(mask, reach)
    components, count = ndimage.label(mask)
    if count == 0:
        return 0, 0, height, width
    areas = np.bincount(components.ravel())[1:]
    boxes = ndimage.find_objects(components)
    largest = int(np.argmax(areas))
    floor = boxes[largest][0].stop
    body = [boxes[largest]]
    for number, (area, box) in enumerate(zip(areas, boxes, strict=True)):
        if number == largest or area < 0.05 * areas[largest]:
            continue
        rows, columns = box[0].stop - box[0].start, box[1].stop - box[1].start
        flat = columns > 3 * rows
        if not (flat and (box[0].start + box[0].stop) / 2 > floor - rows):
            body.append(box)
    margin = round(0.01 * max(height, width))
    top = min(box[0].start for box in body) * stride - margin
    left = min(box[1].start for box in body) * stride - margin
    bottom = max(box[0].stop for box in body) * stride + margin
    right = max(box[1].stop for box in body) * stride + margin
    return max(top, 0), max(left, 0), min(bottom, height), min(right, width)


def _opening(mask: np.ndarray, reach: int) -> np.ndarray:
    # A square is separable: minimum then maximum along each axis.
    size = 2 * reach + 1
    eroded = ndimage.minimum_filter(mask.view(np.uint8), size, mode="constant")
    return ndimage.maximum_filter(eroded, size, mode="constant").astype(bool)


def resize(hu: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Crops `[H, W]` to `box` and resizes it to `[size, size]`: bilinear, antialiased, int16."""
    top, left, bottom, right = box
    picture = Image.fromarray(np.ascontiguousarray(hu, np.float32))
    resized = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
    return np.rint(np.asarray(resized)).astype(np.int16)


def make_triplet(
    slices: Sequence[np.ndarray], size: int, *, threshold: float = BODY
) -> tuple[np.ndarray, Box]:
    """Three neighbouring slices as one image.

    Args:
      slices: three int16 `[H, W]` arrays in HU, head to feet; may contain padding.
      size: the edge of the result.
      threshold: HU above which a pixel can be body, see `body_threshold`.

    Returns:
      (image, box): int16 `[size, size, 3]`, and the box of the middle slice, used for all three.
    """
    planes = [clean(plane) for plane in slices]
    box = body_box(planes[1], threshold=threshold)
    return np.stack([resize(plane, box, size) for plane in planes], axis=-1), box


def centres(count: int, *, overlap: bool) -> range:
    """The middle slices of the triplets of a volume of `count` slices.

    Unlabelled volumes are cut without overlap (paper, section 4.1); the last one or two slices are
    dropped if `count` is not a multiple of three (our choice). With overlap every slice is a middle
    slice.
    """
    return range(count) if overlap else range(1, count - 1, 3)


def neighbours(hu: np.ndarray, centre: int) -> list[np.ndarray]:
    """Slices `centre - 1` to `centre + 1` of `[Z, H, W]`; at the ends the edge is repeated."""
    last = len(hu) - 1
    return [hu[max(centre - 1, 0)], hu[centre], hu[min(centre + 1, last)]]


def body_threshold(hu: np.ndarray, png_window: tuple[float, float] | None = None) -> float:
    """The threshold of `body_box` for a volume.

    8-bit images are clipped to a display window, and fat and lung may be at its low end. For them
    the threshold is 2 % of the window above its low end, if that is higher than the usual one.
    Unclipped CT has values below the window and keeps the usual threshold.

    Args:
      hu: int16 of any shape.
      png_window: (low, high) in HU of 8-bit images.
    """
    if png_window is None:
        return BODY
    if any(block.min() < np.floor(png_window[0]) for block in paged.blocks(hu)):
        return BODY
    low, high = png_window
    return max(BODY, low + 0.02 * (high - low))
