"""Divides the slices of a stack into blocks of evenly spaced, aligned slices."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maknet_jax.errors import Rejected

UNEVEN = 1.5  # largest ratio of a distance between neighbours to the usual one, or its inverse
LATERAL = 5.0  # mm; more between neighbours is a jump, after the shift that a tilted gantry gives
TILT = math.tan(math.radians(30))


class Block(NamedTuple):
    """Consecutive slices of a stack at one distance.

    Attributes:
      start: the first slice.
      stop: the slice after the last.
      distance: mm between neighbours; nan for a single slice.
      offset: mm from the first slice of the stack to the first slice of the block.
      joined: whether the first slice is adjacent to the last one of the previous block, so that
        only the distance changes; False for the first block, and after a missing slice or a
        lateral jump.
    """

    start: int
    stop: int
    distance: float
    offset: float
    joined: bool


def segment(blocks: Sequence[Block], index: int, count: int) -> tuple[int, int]:
    """The range (first, stop) around a slice without a missing slice or a lateral jump.

    Args:
      blocks: of the stack; empty if there is one.
      index: of the slice.
      count: slices in the stack.
    """
    breaks = [block.start for block in blocks if not block.joined]
    first = max([0, *(start for start in breaks if start <= index)])
    return first, min([count, *(start for start in breaks if start > index)])


def find_blocks(
    places: Sequence[float], lateral: Sequence[float], names: Sequence[str]
) -> tuple[tuple[Block, ...], float]:
    """Divides sorted slices into blocks.

    A single larger distance is a gap: slices are missing. Two or more equal ones are a change of
    spacing, as heads have it. A slice between others at their usual distance is neither.

    Args:
      places: mm along the normal, increasing.
      lateral: mm across the normal between each slice and the next.
      names: of the slices, for messages.

    Returns:
      (blocks, mm between neighbours: the lower median, or nan for a single slice or where the
      distance changes).

    Raises:
      Rejected: the distances are irregular, or the slices are not aligned.
    """
    if len(places) == 1:
        return (Block(0, 1, math.nan, 0.0, False),), math.nan
    gaps = np.diff(places)
    jumps = np.flatnonzero(np.asarray(lateral) > LATERAL + TILT * gaps)
    if len(jumps) > len(gaps) / 4:
        k = jumps[0]
        raise Rejected(
            f"the slices are not aligned: {lateral[k]:.1f} mm sideways between {names[k]} and "
            f"{names[k + 1]}"
        )
    starts = {0: False} | _changes(gaps, names) | dict.fromkeys((jumps + 1).tolist(), False)
    bounds = sorted(starts)
    blocks = []
    for start, stop in zip(bounds, [*bounds[1:], len(places)], strict=True):
        inside = gaps[start : stop - 1]
        if starts[start] and not len(inside):
            inside = gaps[start - 1 : start]
        distance = _median(inside) if len(inside) else math.nan
        blocks.append(Block(start, stop, distance, float(places[start] - places[0]), starts[start]))
    distances = [block.distance for block in blocks if math.isfinite(block.distance)]
    even = len(blocks) == 1 or (distances and max(distances) <= UNEVEN * min(distances))
    return tuple(blocks), _median(gaps) if even else math.nan


def _median(gaps: np.ndarray) -> float:
    """The lower median."""
    return float(np.sort(gaps)[(len(gaps) - 1) // 2])


def _changes(gaps: np.ndarray, names: Sequence[str]) -> dict[int, bool]:
    """The first slice of each later block -> whether it is joined to the previous one."""
    median = _median(gaps)
    if np.maximum(gaps / median, median / gaps).max() <= UNEVEN:
        return {}
    runs: list[tuple[int, int]] = []  # half-open ranges of gaps
    for k, gap in enumerate(gaps):
        start = runs[-1][0] if runs else 0
        if k and max(gap / gaps[start], gaps[start] / gap) <= UNEVEN:
            runs[-1] = start, k + 1
        else:
            runs.append((k, k + 1))
    usual = [_median(gaps[start:stop]) for start, stop in runs]
    around = [usual[max(k - 1, 0) : k] + usual[k + 1 : k + 2] for k in range(len(runs))]
    missing = [
        stop - start == 1 and usual[k] > max([UNEVEN * median, *around[k]])
        for k, (start, stop) in enumerate(runs)
    ]
    starts: dict[int, bool] = {}
    for k, (start, stop) in enumerate(runs):
        if missing[k]:
            starts[stop] = False  # the next block starts with its own first slice
            continue
        before, after = k and not missing[k - 1], k + 1 < len(runs) and not missing[k + 1]
        others = usual[k - 1 : k] * bool(before) + usual[k + 1 : k + 2] * bool(after)
        needed = 3 if before and after else 2  # two distances may surround one slice too many
        if len(runs) == 1 or (others and usual[k] < min(others) and stop - start < needed):
            raise _uneven(gaps, names, start, stop, min(others, default=median))
        if before:
            starts[start + 1] = True
    if sum(missing) > 1 + len(gaps) // 5:
        start = runs[missing.index(True)][0]
        raise _uneven(gaps, names, start, start + 1, median)
    return starts


def _uneven(
    gaps: np.ndarray, names: Sequence[str], start: int, stop: int, usual: float
) -> Rejected:
    """The error that names the most unusual distance among the gaps from `start` to `stop`."""
    ratios = gaps[start:stop] / usual
    k = start + int(np.argmax(np.maximum(ratios, 1 / ratios)))
    return Rejected(
        f"uneven slices: {gaps[k]:.2f} mm between {names[k]} and {names[k + 1]}, "
        f"{usual:.2f} mm elsewhere"
    )
