"""Pieces of long DICOM series, which several processes read and one process checks as a series."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from maknet_jax.ct import containers, dicom, dicom_frames, reading, search, units
from maknet_jax.ct.search import SeriesRef
from maknet_jax.ct.stacks import Stack, order_slices
from maknet_jax.errors import Rejected


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the checks of a whole series need to know of a piece.

    Attributes:
      headers: of the slices of the piece, in order.
      values: the distribution of their values.
    """

    headers: tuple[dicom.Header, ...]
    values: units.Values


def can_divide(ref: SeriesRef) -> bool:
    """Whether pieces of a series can be read alone: DICOM files of one slice each.

    The members of a compressed tar can only be read in order.
    """
    return bool(ref.blocks) and not any(
        dicom_frames.split_path(path)[1] is not None or containers.is_sequential(path)
        for path in ref.paths
    )


def read_slices(
    ref: SeriesRef,
    add: Callable[[np.ndarray], None],
    overrides: reading.Overrides = reading.STRICT,
) -> Evidence:
    """Reads the slices of a series or of a piece of one, in the order in which files are read best.

    Args:
      ref: a DICOM series, or a piece of one.
      add: called with each slice, int16 HU `[Y, X]`.
      overrides: what is read although it would be rejected.

    Returns:
      The evidence for `check`.

    Raises:
      Rejected: a file cannot be used; the message starts with its name.
    """
    headers, values = [], units.Values()
    paths = dicom_frames.in_order(ref.paths)
    slices = dicom.read_slices(paths, values, overrides)
    with reading.quiet():  # once, because for each slice it takes as long as some checks
        for path in paths:
            try:
                _, (header, plane) = next(slices)
            except Rejected as error:
                raise Rejected(f"{search.relative_name(path, ref.root)}: {error}") from error
            headers.append(header)
            add(plane)
    return Evidence(tuple(headers), values)


def check(pieces: Iterable[Evidence], overrides: reading.Overrides = reading.STRICT) -> Stack:
    """Checks the values and the geometry of a series.

    Args:
      pieces: the evidence of all pieces, in order.
      overrides: what is read although it would be rejected.

    Raises:
      Rejected: the values are not HU, or the slices do not form one stack.
    """
    headers: list[dicom.Header] = []
    values = units.Values()
    for piece in pieces:
        headers += piece.headers
        values.update(piece.values)
    values.check(overrides)
    return order_slices(headers)


def check_planned(ref: SeriesRef, stack: Stack) -> None:
    """Checks that a series was read as it was planned.

    Raises:
      Rejected: its files have changed since the search.
    """
    paths: Sequence[str] = [header.path for header in stack.headers]
    read = stack.blocks, stack.headers[0].standard_spacing
    if list(ref.paths) != paths or repr((ref.blocks, ref.spacing)) != repr(read):
        raise Rejected("the files have changed since the command started: run it again")
