"""Orders DICOM slices and checks that they form one evenly spaced stack."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from maknet_jax.ct.dicom import Header
from maknet_jax.ct.reading import LARGEST_SERIES
from maknet_jax.errors import Rejected

SAME_POSITION = 0.01  # mm
UNEVEN = 1.5  # largest ratio of a distance between neighbours to the median, or its inverse


def order_slices(headers: Sequence[Header]) -> tuple[list[Header], float]:
    """Sorts the slices of one series from head to feet and checks that they form a stack.

    Args:
      headers: at least one.

    Returns:
      (headers in order, mm between neighbours along the normal; nan for a single slice).

    Raises:
      Rejected: slices differ, two share a position, or one is missing.
    """
    _check_alike(headers)
    first = headers[0]
    if len(headers) == 1:
        return [first], math.nan
    if len(headers) * first.shape[0] * first.shape[1] * 2 > LARGEST_SERIES:
        raise Rejected(f"{len(headers)} slices take more than {LARGEST_SERIES >> 30} GiB")
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    normal *= -np.sign(normal[2])  # towards the feet
    places = [float(normal @ np.asarray(header.position)) for header in headers]
    # Paths break ties, so that the message about two slices at one position is deterministic.
    ranks = sorted(range(len(headers)), key=lambda k: (round(places[k], 2), headers[k].path))
    ordered = [headers[k] for k in ranks]
    return ordered, _slice_distance(ordered, [places[k] for k in ranks])


def _check_alike(headers: Sequence[Header]) -> None:
    first = headers[0]
    for header in headers:
        if header.problem:
            raise Rejected(f"{pathlib.Path(header.path).name}: {header.problem}")
        names = f"{pathlib.Path(first.path).name} and {pathlib.Path(header.path).name}"
        if header.shape != first.shape:
            raise Rejected(f"the matrix differs within the series: {names}")
        if header.frame_of_reference != first.frame_of_reference:
            raise Rejected(f"FrameOfReferenceUID differs within the series: {names}")
        if not np.allclose(header.orientation, first.orientation, rtol=0, atol=1e-3):
            raise Rejected(f"the orientation differs within the series: {names}")
        if not np.allclose(header.spacing, first.spacing, rtol=0, atol=1e-3, equal_nan=True):
            raise Rejected(f"PixelSpacing differs within the series: {names}")
        if header.position is None and len(headers) > 1:
            raise Rejected(f"{pathlib.Path(header.path).name}: no ImagePositionPatient")


def _slice_distance(headers: Sequence[Header], places: Sequence[float]) -> float:
    """The median distance in mm of slices at sorted places along the normal."""
    gaps = np.diff(places)
    for k in np.flatnonzero(gaps < SAME_POSITION)[:1]:
        raise Rejected(
            f"two slices at one position ({places[k]:.2f} mm along the normal): "
            f"{pathlib.Path(headers[k].path).name} and {pathlib.Path(headers[k + 1].path).name}"
        )
    median = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    worst = int(np.argmax(np.maximum(gaps / median, median / gaps)))
    if max(gaps[worst] / median, median / gaps[worst]) > UNEVEN:
        raise Rejected(
            f"uneven slices: {gaps[worst]:.2f} mm between {pathlib.Path(headers[worst].path).name} "
            f"and {pathlib.Path(headers[worst + 1].path).name}, {median:.2f} mm elsewhere"
        )
    return median
