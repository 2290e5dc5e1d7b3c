"""The result of `Model.attribute`."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Integrated Gradients of B images for T labels each.

    Attributes:
      images: int16 HU `[B, S, S, 3]`.
      ids: of the images: SERIES:SLICE, or the row of the array.
      labels: B tuples of the T explained labels.
      maps: float32 `[B, T, S, S, 3]`: the contribution of each value to the confidence.
      relative: `[B, T]`, completeness error relative to the explained change.
      flagged: bool `[B, T]`, True where `relative` exceeds 1 %.
      start: `[B, T]`, the confidence at the baseline.
      end: `[B, T]`, the confidence at the image.
      flags: B tuples: what is doubtful about the image, see `evaluation.series.FLAGS`. Only the
        flags of the network are known of images in an array.
    """

    images: np.ndarray
    ids: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    maps: np.ndarray
    relative: np.ndarray
    flagged: np.ndarray
    start: np.ndarray
    end: np.ndarray
    flags: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.maps.shape))
        names = ", ".join(dict.fromkeys(name for row in self.labels for name in row))
        flagged = f"{int(self.flagged.sum())} of {self.flagged.size} incomplete"
        doubtful = ", ".join(dict.fromkeys(name for row in self.flags for name in row))
        flags = f"; flags: {doubtful}" if doubtful else ""
        return f"<Integrated Gradients of {names}: maps {shape}, {flagged}{flags}>"
