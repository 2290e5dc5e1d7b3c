"""Shared by the file readers: size limits, overrides, silenced libraries, error text, content ids.

Imports no NumPy: the command line uses it.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import IO

from maknet_jax.errors import Rejected

LARGEST_MATRIX = 4096  # rows or columns of a slice
LARGEST_SERIES = 8 << 30  # bytes of int16
MOST_READS = 2_000_000  # of one DICOM file: some seconds; a header has hundreds, with frames more


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What is read although it would be rejected.

    Attributes:
      assume_hu: series whose values do not look like HU.
      allow_lossy: DICOM files with lossy compression.
    """

    assume_hu: bool = False
    allow_lossy: bool = False

    def used(self) -> dict[str, bool]:
        """The fields that are set, for records and settings; earlier versions have none."""
        return {name: True for name, value in dataclasses.asdict(self).items() if value}


STRICT = Overrides()


_quiet_lock = threading.Lock()
_quiet_readers = 0
_quiet_exit = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings and log lines of pydicom and nibabel while any thread reads.

    `warnings.catch_warnings` alone is not thread-safe (the last thread to exit wins), so the first
    reader enters it and the last one exits it.
    """
    global _quiet_readers, _quiet_exit
    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel.global")]
    with _quiet_lock:
        _quiet_readers += 1
        if _quiet_readers == 1:
            _quiet_exit = contextlib.ExitStack()
            _quiet_exit.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for logger in loggers:
                for name, value in (("disabled", True), ("propagate", False)):
                    _quiet_exit.callback(setattr, logger, name, getattr(logger, name))
                    setattr(logger, name, value)  # child loggers ignore `disabled` alone
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_readers -= 1
            if _quiet_readers == 0:
                _quiet_exit.close()


def one_line(error: BaseException) -> str:
    """The type and message of an exception on one line of limited length."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def content_id(content: bytes) -> str:
    """An id computed from the SHA-256 of some bytes, for files without a UID."""
    return "sha256:" + hashlib.sha256(content).hexdigest()[:32]


def content_id_of(file: IO[bytes]) -> str:
    """`content_id` of an open file, which is not read into memory as a whole."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return "sha256:" + digest.hexdigest()[:32]


def bounded(file: IO[bytes]) -> "IO[bytes] | Bounded":
    """A file of which a parser can read at most `MOST_READS` pieces.

    An element takes at least eight bytes, so a small file in memory has fewer of them. It is
    returned as it is: `Bounded` would add a tenth to the time to parse a header.
    """
    small = isinstance(file, io.BytesIO) and file.getbuffer().nbytes < MOST_READS
    return file if small else Bounded(file)


class Bounded:
    """A binary file that is read in a limited number of pieces, which bounds the time to parse it.

    A parser needs a read for every element, so a file of many empty elements takes minutes.
    """

    def __init__(self, file: IO[bytes], factor: int = 1) -> None:
        self._read, self.seek, self.tell = file.read, file.seek, file.tell
        self._left = self._most = MOST_READS * factor

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes, or all.

        Raises:
          Rejected: after `MOST_READS` calls, times `factor`.
        """
        self._left -= 1
        if self._left < 0:
            raise Rejected(f"more than {self._most} elements: not a CT slice")
        return self._read(size)
