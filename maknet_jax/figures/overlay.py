"""Attribution maps as colours over the CT, and pictures as data URIs for HTML pages."""

import base64
import io

import numpy as np
from PIL import Image
from scipy import ndimage

# Colours of pixels that raise and lower the output: distinct for colour-blind readers, and visible
# on grey.
RAISES, LOWERS = (255, 120, 0), (0, 140, 255)
BLUR = 64  # maps are blurred by their height / BLUR


def scale_of(*maps: np.ndarray, quantile: float = 0.995) -> float:
    """The value with full opacity in each of several maps, which can then be compared.

    It is the largest of their quantiles of absolute values: one pixel cannot hide the others.
    """
    return max((float(np.quantile(np.abs(one), quantile)) for one in maps), default=0.0) or 1.0


def smooth(attribution: np.ndarray, sigma: float | None = None) -> np.ndarray:
    """A map `[H, W]` blurred for display, because single pixels are noisy; preserves the sum.

    Args:
      attribution: the map.
      sigma: of the Gaussian in pixels; None takes H / `BLUR`, at least one pixel.
    """
    sigma = max(1.0, len(attribution) / BLUR) if sigma is None else sigma
    return ndimage.gaussian_filter(np.asarray(attribution, np.float32), sigma, mode="constant")


def colours(attribution: np.ndarray, scale: float) -> np.ndarray:
    """A map `[H, W]` as uint8 RGBA `[H, W, 4]`: the hue is its sign, the opacity its size."""
    strength = np.clip(np.abs(attribution) / scale, 0, 1)
    hue = np.where((attribution > 0)[..., None], RAISES, LOWERS)
    opacity = np.rint(255 * strength**0.7)[..., None]
    return np.concatenate([hue, opacity], axis=-1).astype(np.uint8)


def over(grey: np.ndarray, rgba: np.ndarray) -> np.ndarray:
    """RGBA over a grey picture: uint8 `[H, W]` and `[H, W, 4]` -> `[H, W, 3]`."""
    opacity = rgba[..., 3:].astype(np.float32) / 255
    mixed = grey[..., None] * (1 - opacity) + rgba[..., :3] * opacity
    return np.rint(mixed).astype(np.uint8)


def to_uri(picture: np.ndarray, *, lossy: bool = True) -> str:
    """uint8 `[H, W]`, `[H, W, 3]` or `[H, W, 4]` as a data URI: WebP, or PNG if not `lossy`."""
    file = io.BytesIO()
    kind = "webp" if lossy else "png"
    # Method 1 takes a fifth of the time of the default, 4, for files of the same size.
    options = {"quality": 80, "method": 1} if lossy else {}
    Image.fromarray(picture).save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
