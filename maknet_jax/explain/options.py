"""The shared options of `attribute` and `perturb`, with their defaults.

Imports neither JAX nor NumPy: the command line takes its defaults and choices from here.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from maknet_jax.attribution import METHODS, OUTPUTS
from maknet_jax.ct.reading import Overrides

__all__ = [
    "DISPLAY",
    "METHODS",
    "OUTPUTS",
    "PATH",
    "SHARE",
    "STRATEGIES",
    "DisplayOptions",
    "PathOptions",
    "SelectionOptions",
]

STRATEGIES = ("neighbour", "patch", "attribution", "random")
SHARE = 0.1  # of the pixels that the strategies attribution and random delete


@dataclasses.dataclass(frozen=True)
class SelectionOptions:
    """Which images are explained, for which labels and by which networks.

    Either `path` or `split` is needed.

    Attributes:
      path: a file or folder of CT, or several; the id of a slice is SERIES:NUMBER, as in `maknet
        predict`.
      split: a split of `data`.
      data: a prepared data set; None takes the training data.
      ids: only these images.
      labels: explain these labels; in a labelled split, only images that have any of them. None
        explains the `top` most confident labels of each image.
      top: number of labels per image.
      limit: maximum number of images: with `path` and without `ids` the slices of
        `ranking.best_slices`, of `labels` or of any label; else the first ones.
      compare: a second workdir, shown beside the first.
      checkpoint: "best" or "last".
      png_window: (low, high) in HU of 8-bit PNGs.
      pseudonyms: write pseudonyms instead of the names of series and files.
      salt_file: the secret key of the pseudonyms; None means `~/.config/maknet/salt`.
      ct: the folder of CT that `data` was prepared from, so that pictures show its slices at their
        own resolution: DeepLesion's images, or segmentation cases in NIfTI. None enlarges the
        images of the records.
      assume_hu: read CT files even if their values do not look like HU.
      allow_lossy: read DICOM with lossy compression.
    """

    path: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None
    split: str | None = None
    data: str | pathlib.Path | None = None
    ids: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    top: int = 5
    limit: int | None = None
    compare: str | pathlib.Path | None = None
    checkpoint: str = "best"
    png_window: tuple[float, float] | None = None
    pseudonyms: bool = False
    salt_file: str | pathlib.Path | None = None
    ct: str | pathlib.Path | None = None
    assume_hu: bool = False
    allow_lossy: bool = False

    @property
    def overrides(self) -> Overrides:
        """`assume_hu` and `allow_lossy`, as the readers take them."""
        return Overrides(self.assume_hu, self.allow_lossy)


@dataclasses.dataclass(frozen=True)
class PathOptions:
    """The path of Integrated Gradients, see `integrated_gradients`.

    Attributes:
      steps: number of steps along the path.
      method: one of `METHODS`.
      baseline: the start of the path, "black", "blurred" or a number in HU.
      output: one of `OUTPUTS`.
      refine: maximum number of times that the steps of an image with a flagged map are doubled;
        None takes 4 with the trapezoid and 0 with the others, which cannot be refined.
      batch_size: images per step, rounded up to the devices; None takes one per device.
    """

    steps: int = 50
    method: str = "trapezoid"
    baseline: str = "black"
    output: str = "probability"
    refine: int | None = None
    batch_size: int | None = None

    @property
    def refinements(self) -> int:
        """`refine` with its default resolved."""
        if self.refine is None:
            return 4 if self.method == "trapezoid" else 0
        return self.refine


@dataclasses.dataclass(frozen=True)
class DisplayOptions:
    """How results are shown.

    Attributes:
      window: (low, high) in HU of the pictures; None takes the soft tissue window.
      most_shown: maximum number of images on the HTML page; the other files contain all.
    """

    window: tuple[float, float] | None = None
    most_shown: int = 50


PATH, DISPLAY = PathOptions(), DisplayOptions()
