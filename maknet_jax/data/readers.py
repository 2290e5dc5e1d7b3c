"""Open shards: a bounded number of file handles per process, and errors of the system by name.

ArrayRecord keeps a file handle for every open shard, and half a million images are about a thousand
shards. All record sources of a process therefore share one pool, which closes the shard that was
not read for the longest time.
"""

import collections
import errno
import os
import resource
import threading

from array_record.python import array_record_module

# As `ArrayRecordDataSource` opens shards: random access gains nothing from reading ahead.
_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
_NO_HANDLES = (errno.EMFILE, errno.ENFILE)


def system_error(error: Exception, path: str | os.PathLike[str]) -> OSError | None:
    """The error of the operating system that ArrayRecord reports as another type, or None.

    ArrayRecord raises RuntimeError or ValueError with the text of the error: "open() failed: Too
    many open files; opening /x". Its other errors are about the content of the file.

    Args:
      error: raised by ArrayRecord.
      path: the file, for the message.
    """
    text = " ".join(str(error).split()).partition("failed: ")[2].partition(";")[0]
    code = next((code for code in errno.errorcode if os.strerror(code) == text), None)
    if code is None:
        return None
    if code in _NO_HANDLES:
        text = f"{text}: raise the limit (ulimit -n) or run fewer processes"
    return OSError(code, text, os.fspath(path))


class Readers:
    """The open shards of a process, at most `limit()` of them; safe to use from several threads."""

    def __init__(self) -> None:
        self._open: collections.OrderedDict[str, array_record_module.ArrayRecordReader] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @staticmethod
    def limit() -> int:
        """Half of the file handles that this process may open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(1, soft // 2) if soft != resource.RLIM_INFINITY else 65_536

    def read(self, path: str, number: int) -> bytes:
        """Reads one record.

        Args:
          path: the shard.
          number: of the record in the shard.

        Raises:
          OSError: the system could not read it, for example for lack of file handles. It was tried
            twice, the second time with all other shards closed if handles were lacking.
          RuntimeError: the content of the shard is damaged.
        """
        for attempt in range(2):
            try:
                return self._reader(path).read([number])[0]
            except RuntimeError as error:
                failure = system_error(error, path)
                self._close(None if failure and failure.errno in _NO_HANDLES else path)
                if failure is None:
                    raise
                if attempt:
                    raise failure from None
        raise AssertionError  # the second attempt returns or raises

    def count(self, path: str) -> int:
        """The number of records of a shard.

        Raises:
          OSError: see `read`.
          RuntimeError: the content of the shard is damaged.
        """
        if not (reader := self._reader(path)).ok():
            self.read(path, 0)  # raises the reason
            reader = self._reader(path)
        return reader.num_records()

    def _reader(self, path: str) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if (reader := self._open.get(path)) is not None:
                self._open.move_to_end(path)
                return reader
        reader = array_record_module.ArrayRecordReader(path, **_OPTIONS)
        with self._lock:
            self._open[path] = reader
            limit = self.limit()
            while len(self._open) > limit:
                self._open.popitem(last=False)  # closed when no other thread reads it
        return reader

    def _close(self, path: str | None) -> None:
        """Forgets a shard, or all of them: a reader that failed once keeps failing."""
        with self._lock:
            if path is None:
                self._open.clear()
            else:
                self._open.pop(path, None)


POOL = Readers()
