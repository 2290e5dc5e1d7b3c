"""The unit check of all readers: do the values of a series look like Hounsfield units?

The verdict depends on the values alone, so the same array gets the same one from DICOM, NIfTI, PNG
and Python. The table of verdicts is in docs/ct_input.md; the thresholds are our choice, between
the values of real CT and of the same CT in other units.
"""

import math

import numpy as np

from maknet_jax.ct.reading import STRICT, Overrides
from maknet_jax.errors import Rejected

AIR = -1024  # HU
LOWEST, HIGHEST = -32768, 32767  # int16

_FLOOR = -1500  # HU; nothing is less dense than air: values below are padding
_SCANNER_PADDING = -4096  # HU; no scanner pads below this, software does
_METAL = 3100  # HU; denser than bone, and above the 12-bit range of most scanners
_LOSS = 8  # HU; how far lossy compression moves padding
_CHUNK = 1 << 15  # values that are counted at once, so that they stay in the cache
_SMALLEST_SPAN = 20  # HU; the noise of a phantom spans more
# Most values of a label map, and voxels per value; display images have 200 to 256 values.
_MOST_LABELS, _LABEL_VOXELS = 160, 500
_MOST_DEEP, _MOST_METAL = 0.05, 0.07  # shares of all values, and of the body


class Values:
    """The distribution of the values of one series, collected plane by plane."""

    def __init__(self) -> None:
        self._patterns = np.zeros(1 << 16, np.int64)  # counts of 0 to HIGHEST, LOWEST to -1
        self._low, self._high = np.inf, -np.inf
        self._above = 0
        self._fractions = False

    def add(self, plane: np.ndarray, padded: np.ndarray | None = None) -> np.ndarray:
        """Counts the values of a plane and converts it to HU.

        Args:
          plane: integers or floats of any shape, after slope and intercept.
          padded: bool, the declared padding: it becomes air and is not counted; None means none.

        Returns:
          int16, rounded to the nearest (halves to even) and clipped.

        Raises:
          Rejected: some values are not finite.
        """
        counted = plane if padded is None else plane[~padded]
        if plane.dtype.kind == "f" and not np.isfinite(counted).all():
            raise Rejected("some values are not finite")
        if counted.size:
            low, high = float(counted.min()), float(counted.max())
            self._low, self._high = min(self._low, low), max(self._high, high)
            self._above += int((counted > HIGHEST).sum()) if high > HIGHEST else 0
        if plane.dtype.kind == "f" and not self._fractions:
            self._fractions = bool((np.abs(counted - np.rint(counted)) > 0.01).any())
        hu = _to_int16(plane)
        if padded is not None:
            hu = np.where(padded, np.int16(AIR), hu)
        self._count(hu, padded)
        return hu

    def update(self, other: "Values") -> None:
        """Adds what another instance counted in other planes of the series."""
        self._patterns += other._patterns
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        self._above += other._above
        self._fractions |= other._fractions

    def _count(self, hu: np.ndarray, padded: np.ndarray | None) -> None:
        """Counts int16 values; those that are padded have become AIR and are not counted."""
        patterns = hu.ravel().view(np.uint16)
        for k in range(0, len(patterns), _CHUNK):
            # Faster than np.bincount, which needs the range of the values and a new array.
            np.add.at(self._patterns, patterns[k : k + _CHUNK].astype(np.intp), 1)
        if padded is not None:
            self._patterns[AIR] -= np.count_nonzero(padded)

    def __len__(self) -> int:
        """The number of values that were counted."""
        return int(self._patterns.sum())

    def check(self, overrides: Overrides = STRICT) -> None:
        """Checks that the series is in HU.

        Raises:
          Rejected: it is not, unless `overrides.assume_hu`. The message gives the evidence.
        """
        evidence = "" if overrides.assume_hu else self._evidence()
        if not evidence:
            return
        low, high = (f"{value:.6g}" for value in (self._low, self._high))
        advice = (
            "store Hounsfield units (water 0, air -1000), or add --assume-hu (assume_hu=True) if "
            "they are"
        )
        if labels := self._labels():
            evidence = labels
            advice = (
                "remove it from the input, which should be CT (`maknet prepare segmentations` "
                "reads masks beside their CT)"
            )
        raise Rejected(f"values from {low} to {high} are not HU: {evidence}; {advice}")

    def _labels(self) -> str:
        """Which kind of mask has these values, which are not HU; "" if none has."""
        values = np.sort(np.flatnonzero(self._patterns).astype(np.uint16).view(np.int16))
        # 0 is the background of a mask; 16-bit PNGs are read with an offset.
        if self._fractions or self._above or not len(values) or values[0] not in (0, LOWEST):
            return ""
        if len(values) == 1:
            return "an empty mask or image" if len(self) and values[0] == self._high else ""
        if len(values) == 2:
            return "a binary mask"
        many = min(_MOST_LABELS, len(self) // _LABEL_VOXELS)
        return f"a label map of {len(values) - 1} values" if len(values) <= many else ""

    def _evidence(self) -> str:
        """Why the values are not HU, or ""."""
        total = len(self)
        if not total:
            return "all pixels are padding"
        counts = np.roll(self._patterns, -LOWEST)
        places = np.searchsorted(counts.cumsum(), (0.0005 * total, 0.9995 * total))
        span = int(places[1] - places[0])
        if self._high - self._low < _SMALLEST_SPAN or span < _SMALLEST_SPAN // 2:
            return "they are constant or normalised"
        if self._fractions and span < 100:
            return f"they have fractions, and 99.9 % of them span {span}: normalised"
        if self._above:
            return f"{self._above} of them are above {HIGHEST}: wrong slope, intercept or padding"
        return _scaled(counts, total) or _shifted(counts, total)


def _scaled(counts: np.ndarray, total: int) -> str:
    deep = _between(counts, LOWEST, _FLOOR - 1).copy()
    border = _SCANNER_PADDING - LOWEST
    for part in (deep[:border], deep[border:]):  # one constant each is padding
        peak = int(np.argmax(part))
        part[max(0, peak - _LOSS) : peak + _LOSS + 1] = 0
    deep_share = float(deep.sum()) / total
    metal = int(_between(counts, _METAL + 1, HIGHEST).sum())
    metal_share = metal / max(1, int(_between(counts, -500, HIGHEST).sum()))
    if deep_share / _MOST_DEEP + metal_share / _MOST_METAL > 1:
        return (
            f"{deep_share:.1%} of them are below {_FLOOR} without being padding, and "
            f"{metal_share:.1%} of those of the body are above {_METAL}: scaled"
        )
    distinct = np.flatnonzero(_between(counts, _FLOOR, HIGHEST)) + _FLOOR
    if metal and math.gcd(*distinct.tolist()) % 10 == 0:
        return f"all are multiples of 10, and some are above {_METAL}: scaled"
    return ""


def _shifted(counts: np.ndarray, total: int) -> str:
    values = _between(counts, _FLOOR, HIGHEST)
    if not values[:-_FLOOR].any():
        return f"none is from {_FLOOR} to -1, like air and fat: shifted, labels or a picture"
    gas = _between(counts, _FLOOR, -501)
    tissue, bone = (int(_between(counts, *ends).sum()) for ends in ((800, 1200), (250, 650)))
    # One constant may be padding.
    no_air = int(gas.sum() - gas.max()) < 0.001 * total
    if no_air and tissue > 0.01 * total and tissue > 2 * bone:
        return f"{tissue / total:.1%} of them are near 1000 as if it were tissue, with no air"
    return ""


def _between(counts: np.ndarray, low: int, high: int) -> np.ndarray:
    """A view of the counts of the values low..high."""
    return counts[low - LOWEST : high - LOWEST + 1]


def _to_int16(plane: np.ndarray) -> np.ndarray:
    if plane.dtype == np.int16:
        return plane
    if plane.dtype.kind in "iu":
        return np.clip(plane, *_limits(plane.dtype)).astype(np.int16)
    return np.clip(np.rint(plane), LOWEST, HIGHEST).astype(np.int16)


def _limits(dtype: np.dtype) -> tuple[int, int]:
    """LOWEST and HIGHEST within the range of an integer type."""
    info = np.iinfo(dtype)
    return max(LOWEST, int(info.min)), min(HIGHEST, int(info.max))
