"""A slice to paint on: HU, organs, and masks of simple shapes in mm."""

import math

import numpy as np
from scipy import ndimage

from maknet_jax.phantom import reference


class Canvas:
    """The HU and the organs of one slice, painted shape by shape.

    Attributes:
      x, y: float32 `[rows, columns]`, mm from the middle of the body.
      hu: float32 `[rows, columns]`.
      organs: uint8 `[rows, columns]`, values of `reference.ORGANS`.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        """Fills the slice with air."""
        self.x, self.y = x, y
        self.hu = np.full(x.shape, -1000, np.float32)
        self.organs = np.zeros(x.shape, np.uint8)

    def ellipse(
        self, cx: float, cy: float, a: float, b: float, angle: float = 0.0, power: float = 2.0
    ) -> np.ndarray:
        """Bool `[rows, columns]`: an ellipse or, above power 2, a rounded box (mm, radians)."""
        if min(a, b) <= 0:
            return np.zeros(self.x.shape, bool)
        dx, dy = self.x - cx, self.y - cy
        if angle:
            c, s = math.cos(angle), math.sin(angle)
            dx, dy = c * dx + s * dy, c * dy - s * dx
        if power == 2.0:
            return np.square(dx / a) + np.square(dy / b) < 1
        return np.abs(dx / a) ** power + np.abs(dy / b) ** power < 1

    def bar(self, x0: float, y0: float, x1: float, y1: float, radius: float) -> np.ndarray:
        """Bool `[rows, columns]`: the pixels within `radius` of a line segment (mm)."""
        along = np.array([x1 - x0, y1 - y0])
        t = ((self.x - x0) * along[0] + (self.y - y0) * along[1]) / max(along @ along, 1e-6)
        t = t.clip(0, 1)
        return np.hypot(self.x - x0 - t * along[0], self.y - y0 - t * along[1]) < radius

    def paint(self, mask: np.ndarray, hu: float | np.ndarray, organ: str | None = None) -> None:
        """Sets the HU (a number or an image) and optionally the organ of all pixels in `mask`."""
        self.hu[mask] = hu[mask] if isinstance(hu, np.ndarray) else hu
        if organ is not None:
            self.organs[mask] = reference.VALUE[organ]

    def bone(
        self, mask: np.ndarray, organ: str | None, inside: float = 230, cortex: float = 620
    ) -> None:
        """Paints spongy bone within a cortex of about one pixel; HU inside and of the cortex."""
        self.paint(mask, cortex, organ)
        self.paint(ndimage.binary_erosion(mask), inside)
