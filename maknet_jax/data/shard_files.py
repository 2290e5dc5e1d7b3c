"""Writes shards atomically, from records that other processes have compressed."""

import contextlib
import hashlib
import itertools
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator
from typing import IO

from maknet_jax import files
from maknet_jax.data import chunks

_FLUSH = 0.2  # seconds between flushes of a shard that is being written
_BATCH = 16  # records that are compressed at once


class Shard:
    """A shard that is being written, see `open_shard`."""

    def __init__(self, file: IO[bytes]) -> None:
        """Starts an empty shard in an empty file."""
        self._file, self._layout = file, chunks.Layout()
        self._digests: list[bytes] = []
        self._file.writelines(self._layout.start())

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, records: chunks.Chunks) -> None:
        """Appends records."""
        self._file.writelines(self._layout.add(records))
        self._digests += records.digests

    def keep(self, count: int) -> None:
        """Drops all records but the first `count`."""
        if count < len(self):
            self._layout.keep(count)
            del self._digests[count:]
            self._file.seek(self._layout.size)
            self._file.truncate()

    def end(self) -> None:
        """Completes the file."""
        self._file.writelines(self._layout.end())
        self._file.flush()

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the records in order."""
        return hashlib.sha256(b"".join(self._digests)).hexdigest()

    @property
    def first(self) -> str:
        """SHA-256 of the first record; "" without one."""
        return self._digests[0].hex() if self._digests else ""


@contextlib.contextmanager
def open_shard(path: str | os.PathLike[str]) -> Iterator[Shard]:
    """Yields a new shard, which replaces the file if the block succeeds.

    Raises:
      OSError: it cannot be written, for example because the disk is full; its `filename` is `path`,
        as that of all errors of the block that name no file.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with files.naming(path), temporary.open("wb") as file, _flushing(file):
            shard = Shard(file)
            yield shard
            shard.end()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_shard(path: str | os.PathLike[str], payloads: Iterable[bytes]) -> tuple[int, str]:
    """Writes one shard of encoded examples atomically; returns (count, digest), see `Shard`.

    Raises:
      OSError: see `open_shard`.
    """
    with open_shard(path) as shard:
        remaining = iter(payloads)
        while batch := list(itertools.islice(remaining, _BATCH)):
            shard.add(chunks.compress(batch))
    return len(shard), shard.digest


@contextlib.contextmanager
def _flushing(file: IO[bytes]) -> Iterator[None]:
    """Flushes a file to the disk while the block writes it, and completely at its end.

    Flushing a large shard at its end takes about a second, in which the writer would only wait.

    Raises:
      OSError: it cannot be flushed.
    """
    done = threading.Event()
    errors: list[OSError] = []

    def flush() -> None:
        try:
            while not done.wait(_FLUSH):
                os.fsync(file.fileno())
        except OSError as error:  # the system reports it once only
            errors.append(error)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]
    os.fsync(file.fileno())
