"""Orders DICOM slices and divides them into stacks of one acquisition each.

The files of one SeriesInstanceUID may hold copies of a slice, slices of another matrix, several
acquisitions or even several patients. Each stack that comes out of `find_stacks` has one geometry
and one slice per position; what does not fit is listed with its reason.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from maknet_jax.ct import acquisition, containers, dicom, dicom_frames
from maknet_jax.ct.blocks import LATERAL, Block, find_blocks
from maknet_jax.ct.dicom import Header
from maknet_jax.ct.reading import LARGEST_SERIES, Overrides
from maknet_jax.errors import Rejected

SAME_POSITION = 0.01  # mm
_ANY = Overrides(assume_hu=True, allow_lossy=True)  # checked elsewhere
_WEAK = 3  # fewest slices of a stack that is told apart by folder or time alone


class _Partition(NamedTuple):
    """A property by which slices may be divided.

    Attributes:
      name: of the property.
      labels: its value for each slice.
      mixed: whether two values alternate along the stack.
      decisive: whether alternating values prove that two acquisitions are mixed.
    """

    name: str
    labels: Sequence[object]
    mixed: bool
    decisive: bool


@dataclasses.dataclass(frozen=True)
class Stack:
    """The slices of one acquisition.

    Attributes:
      headers: head to feet.
      blocks: their division; one block if the slices are evenly spaced and aligned.
      distance: mm between neighbours along the normal; nan for a single slice, or if it changes.
      copies: (path, path of the slice that it repeats) of dropped copies.
    """

    headers: list[Header]
    blocks: tuple[Block, ...]
    distance: float
    copies: tuple[tuple[str, str], ...] = ()


def find_stacks(headers: Sequence[Header]) -> tuple[list[Stack], list[tuple[str, str]]]:
    """Divides the files of one series into stacks.

    Args:
      headers: at least one, without problems.

    Returns:
      (stacks by the path of their first slice, (path, reason) of slices that belong to none).
    """
    failures: list[tuple[str, str]] = []
    parts = _alike(headers)
    largest = max(parts, key=len)
    if len(parts) > 1 and len(largest) == 1:
        reason = _difference(*(part[0] for part in parts[:2]))
        return [], [(headers[0].path, f"{reason} (all {len(headers)} slices differ)")]
    stacks = []
    for part in parts:
        if len(part) == 1 and part is not largest:
            failures.append((part[0].path, _difference(largest[0], part[0])))
            continue
        try:
            stacks += _stacks_of(part, failures)
        except Rejected as error:
            failures.append((part[0].path, str(error)))
    return sorted(stacks, key=lambda stack: stack.headers[0].path), failures


def order_slices(headers: Sequence[Header]) -> Stack:
    """Orders the slices of one stack, or of a part of one, from head to feet.

    Args:
      headers: at least one.

    Raises:
      Rejected: slices differ, two share a position, or their distances are irregular.
    """
    for header in headers:
        if header.problem:
            raise Rejected(f"{_name(header)}: {header.problem}")
    parts = _alike(headers)
    if len(parts) > 1:
        raise Rejected(_difference(parts[0][0], parts[1][0]))
    ordered, places = _sorted(headers)
    return _arrange(ordered, places)


def _name(header: Header) -> str:
    return pathlib.Path(header.path).name


def _alike(headers: Sequence[Header]) -> list[list[Header]]:
    """Groups slices of one patient, study, frame of reference and geometry."""
    parts: list[list[Header]] = []
    for header in headers:
        for part in parts:
            if not _difference(part[0], header):
                part.append(header)
                break
        else:
            parts.append([header])
    return parts


def _difference(first: Header, header: Header) -> str:
    """Why two slices of a series cannot be in one stack; "" if they can."""
    if header.shape != first.shape:
        difference = "the matrix differs"
    elif (header.position is None) != (first.position is None):
        difference = "ImagePositionPatient is missing"
    elif header.frame_of_reference != first.frame_of_reference:
        difference = "FrameOfReferenceUID differs"
    elif header.person != first.person:
        pairs = zip(acquisition.PERSON, header.person, first.person, strict=True)
        difference = next(name for name, one, other in pairs if one != other) + " differs"
    elif header.orientation != first.orientation and not np.allclose(
        header.orientation, first.orientation, rtol=0, atol=1e-3
    ):
        difference = "the orientation differs"
    elif header.spacing != first.spacing and not np.allclose(
        header.spacing, first.spacing, rtol=0, atol=1e-3, equal_nan=True
    ):
        difference = "PixelSpacing differs"
    else:
        return ""
    return f"{difference} within the series: {_name(first)} and {_name(header)}"


def _sorted(headers: Sequence[Header]) -> tuple[list[Header], list[float]]:
    """(headers from head to feet, their places in mm along the normal)."""
    first = headers[0]
    if len(headers) == 1:
        return [first], [0.0]
    for header in headers:
        if header.position is None:
            raise Rejected(f"{_name(header)}: no ImagePositionPatient")
    if len(headers) * first.shape[0] * first.shape[1] * 2 > LARGEST_SERIES:
        raise Rejected(f"{len(headers)} slices take more than {LARGEST_SERIES >> 30} GiB")
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    normal *= -np.sign(normal[2])  # towards the feet
    places = [float(normal @ np.asarray(header.position)) for header in headers]
    # Paths break ties, so that the copy that is kept is deterministic.
    ranks = sorted(range(len(headers)), key=lambda k: (round(places[k], 2), headers[k].path))
    return [headers[k] for k in ranks], [places[k] for k in ranks]


def _stacks_of(headers: Sequence[Header], failures: list[tuple[str, str]]) -> list[Stack]:
    """The stacks of slices of one geometry; appends unreadable copies to `failures`."""
    ordered, places = _sorted(headers)
    kept, copies = _without_copies(ordered, places, failures)
    ordered, places = [ordered[k] for k in kept], [places[k] for k in kept]
    try:
        stacks = _divide(ordered, places, whole=False)
    except Rejected as error:
        if not copies:
            raise
        one, other = copies[0]
        raise Rejected(
            f"{error} ({len(copies)} copies dropped: {_name(other)} repeats {_name(one)})"
        ) from None
    dropped = tuple((copy.path, original.path) for original, copy in copies)
    first = dataclasses.replace(stacks[0], copies=dropped)
    return [first, *stacks[1:]]


def _without_copies(
    headers: Sequence[Header], places: Sequence[float], failures: list[tuple[str, str]]
) -> tuple[list[int], list[tuple[Header, Header]]]:
    """(indices of the distinct slices, (slice, dropped copy) pairs) of sorted slices.

    A copy is a slice at the same position with the same HU. A slice that cannot be read is dropped
    if another one there has its SOPInstanceUID and can be read.
    """
    kept: list[int] = []
    copies = []
    starts = [0, *(np.flatnonzero(np.diff(places) >= SAME_POSITION) + 1).tolist(), len(places)]
    for start, stop in zip(starts, starts[1:], strict=False):
        if stop - start == 1:
            kept.append(start)
            continue
        originals: dict[object, int] = {}
        for digest in (_file_digest, _image_digest):
            cluster = list(originals.values()) or list(range(start, stop))
            originals = {}
            for k in cluster:
                original = originals.setdefault(digest(headers[k]), k)
                if original != k:
                    copies.append((headers[original], headers[k]))
            if len(originals) == 1:
                break
        broken = {k: key for key, k in originals.items() if isinstance(key, Rejected)}
        readable = {headers[k].uid for k in originals.values() if k not in broken}
        for k in sorted(originals.values()):
            if k in broken and headers[k].uid in readable:
                failures.append((headers[k].path, str(broken[k])))
            else:
                kept.append(k)
    return kept, copies


def _file_digest(header: Header) -> object:
    """A digest of a file, or the header itself if it cannot be read."""
    file, frame = dicom_frames.split_path(header.path)
    try:
        return _rounded(header), frame, hashlib.sha256(containers.read_file(file)).digest()
    except OSError:
        return header


def _image_digest(header: Header) -> object:
    """A digest of the HU of a slice; a Rejected if they cannot be read.

    The frames of one file are different images: they are not compared.
    """
    if dicom_frames.split_path(header.path)[1] is not None:
        return header
    try:
        _, hu = dicom.read_slice(header.path, _ANY)
    except Rejected as error:
        return error
    return _rounded(header), hashlib.sha256(hu.tobytes()).digest()


def _rounded(header: Header) -> tuple[float, ...]:
    return tuple(round(mm, 1) for mm in header.position or ())


def _divide(headers: Sequence[Header], places: Sequence[float], *, whole: bool) -> list[Stack]:
    """Divides sorted slices of one geometry by acquisition where they overlap.

    Args:
      headers: head to feet.
      places: mm along the normal.
      whole: whether the slices must be one stack without missing slices.

    Raises:
      Rejected: two slices share a position, or acquisitions alternate, and no division gives whole
        stacks.
    """
    doubled = bool((np.diff(places) < SAME_POSITION).any())
    partitions = list(_partitions(headers, places))
    for partition in partitions:
        labels = partition.labels
        parts = [[k for k, x in enumerate(labels) if x == label] for label in dict.fromkeys(labels)]
        fewest = 2 if partition.decisive else _WEAK
        if len(parts) < 2 or min(map(len, parts)) < fewest or not (doubled or partition.mixed):
            continue
        try:
            stacks = []
            for part in parts:
                chosen = [headers[k] for k in part], [places[k] for k in part]
                stacks += _divide(*chosen, whole=True)
            return stacks
        except Rejected:
            continue
    for partition in partitions:
        if not doubled and partition.mixed and partition.decisive:
            raise Rejected(_mixture(headers, partition))
    stack = _arrange(headers, places)
    if whole and not all(block.joined for block in stack.blocks[1:]):
        raise Rejected("slices are missing")
    return [stack]


def _mixture(headers: Sequence[Header], partition: _Partition) -> str:
    other = next(k for k, label in enumerate(partition.labels) if label != partition.labels[0])
    return (
        f"two acquisitions are mixed: {partition.name} alternates between the slices, as in "
        f"{_name(headers[0])} and {_name(headers[other])}, but does not divide them into whole "
        "stacks"
    )


def _partitions(headers: Sequence[Header], places: Sequence[float]) -> Iterator[_Partition]:
    """Yields the properties by which slices may be divided, the most reliable first."""
    for column, name in enumerate(acquisition.MARKS):
        labels: list[object] = [header.marks[column] for header in headers]
        if len(set(labels)) > 1:
            decisive = name in acquisition.DECISIVE
            yield _Partition(name, labels, _alternate(labels), decisive)
    numbers = [header.times[acquisition.TIMES.index("InstanceNumber")] for header in headers]
    if all(numbers) and len(set(numbers)) < len(numbers):
        # Acquisitions that are numbered alike: the second slice with a number is of the second.
        seen: collections.Counter[str] = collections.Counter()
        labels = []
        for number in numbers:
            labels.append(seen[number])
            seen[number] += 1
        yield _Partition("the repeated InstanceNumber", labels, _alternate(labels), True)
    labels = [os.path.dirname(header.path) for header in headers]
    yield _Partition("the folder", labels, _alternate(labels), False)
    # Two fields of view; along a tilted stack the position changes steadily.
    labels = [round(_lateral(headers[0], header) / LATERAL) for header in headers]
    yield _Partition("the position", labels, False, False)
    for column, name in enumerate(acquisition.TIMES):
        times = [header.times[column] for header in headers]
        if all(times) and len(set(times)) > 1:
            labels = list(_passes(times, places))
            yield _Partition(name, labels, _alternate(labels), False)


def _passes(times: Sequence[str], places: Sequence[float]) -> list[int]:
    """Labels slices by the pass over the patient: a pass ends where the direction turns."""
    try:
        order = np.argsort([float(time) for time in times], kind="stable")
    except ValueError:  # a date and time with its zone
        order = np.argsort(times, kind="stable")
    labels = [0] * len(times)
    direction, number = 0.0, 0
    for before, after in zip(order, order[1:], strict=False):
        step = places[after] - places[before]
        if direction * step < 0 or abs(step) < SAME_POSITION:
            number, direction = number + 1, 0.0
        else:
            direction = step
        labels[after] = number
    return labels


def _alternate(labels: Sequence[object]) -> bool:
    """Whether two labels alternate: A, B, A, B, with any slices between them.

    Blocks of a step-and-shoot acquisition follow each other, and a repeated slice lies within
    another acquisition: neither alternates. Nor does, in a long stack, an exchange at the border of
    two blocks.
    """
    changes = sum(one != other for one, other in zip(labels, labels[1:], strict=False))
    if changes - (len(set(labels)) - 1) <= min(2, len(labels) // 8):
        return False
    opened: list[object] = []
    closed: set[object] = set()
    for label in labels:
        if label in closed:
            return True
        if label in opened:
            while opened[-1] != label:
                closed.add(opened.pop())
        else:
            opened.append(label)
    return False


def _lateral(one: Header, other: Header) -> float:
    """Mm between the first pixels of two slices across the normal."""
    if one.position is None or other.position is None:
        return 0.0
    step = np.subtract(other.position, one.position)
    axes = np.reshape(one.orientation, (2, 3))
    return float(np.linalg.norm(axes @ step))


def _arrange(headers: Sequence[Header], places: Sequence[float]) -> Stack:
    """The stack of sorted slices.

    Raises:
      Rejected: two slices share a position, or see `find_blocks`.
    """
    for k in np.flatnonzero(np.diff(places) < SAME_POSITION)[:1]:
        raise Rejected(
            f"two slices at one position ({places[k]:.2f} mm along the normal): "
            f"{_name(headers[k])} and {_name(headers[k + 1])}"
        )
    lateral = [_lateral(one, other) for one, other in zip(headers, headers[1:], strict=False)]
    blocks, distance = find_blocks(places, lateral, [_name(header) for header in headers])
    return Stack(list(headers), blocks, distance)
