"""Large volumes outside of memory: in an unnamed temporary file that is mapped page by page.

A series of 2,000 slices of 512 x 512 is 1 GB of int16. Mapped pages count as memory of the process
until they are released; the operating system keeps their content in its own cache or on the disk.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from maknet_jax import console

IN_MEMORY = 128 << 20  # bytes; larger arrays are mapped
BLOCK = 32 << 20  # bytes that are read or written before pages are released


def empty(shape: Sequence[int], dtype: DTypeLike = np.int16) -> np.ndarray:
    """A new array; a large one is mapped. Without room in the temporary folder, logs why not."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=tuple(shape))
    except OSError as error:
        console.Log().say(
            f"a volume of {size >> 20:,} MiB is kept in memory, because the temporary "
            f"folder cannot hold it ({error.strerror or error}): set TMPDIR to one with more room"
        )
        return np.empty(shape, dtype)


def release(array: np.ndarray) -> None:
    """Releases the pages of a mapped array, or of a view of one; later accesses read them again."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields consecutive parts of an array along its first axis, and releases them afterwards."""
    count = max(1, BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), count):
        yield array[start : start + count]
        release(array)


class Slices:
    """The slices of a volume, collected one by one and then put into order."""

    def __init__(self, count: int) -> None:
        """Args: count: the number of slices."""
        self._total, self._count = count, 0
        self._planes = np.empty((0, 0, 0), np.int16)
        self.alike = True

    def append(self, plane: np.ndarray) -> None:
        """Adds a slice, int16 `[Y, X]`; `alike` is False after one of another shape."""
        if not self._count:
            self._planes = empty((self._total, *plane.shape))
        self.alike &= plane.shape == self._planes.shape[1:]
        if self.alike:
            self._planes[self._count] = plane
        self._count += 1
        if self._count % max(1, BLOCK // max(1, plane.nbytes)) == 0:
            release(self._planes)

    def ordered(self, order: Sequence[int]) -> np.ndarray:
        """The volume `[Z, Y, X]`, whose slice k is the one that was added as number `order[k]`."""
        steps = set(np.diff(order).tolist())
        if len(order) == self._total and steps <= {1}:
            return self._planes
        if len(order) == self._total and steps == {-1}:
            return self._planes[::-1]
        volume = empty((len(order), *self._planes.shape[1:]))
        for number, k in enumerate(order):
            volume[number] = self._planes[k]
            if number % 64 == 63:
                release(volume)
                release(self._planes)
        return volume
