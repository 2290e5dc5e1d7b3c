"""Open shards: a bounded number of file handles per process.

ArrayRecord keeps a file handle for every open shard, and half a million images are about a thousand
shards. All record sources of a process therefore share one pool, which closes the shard that was
not read for the longest time.
"""

import collections
import resource
import threading

from array_record.python import array_record_module

from maknet_jax.errors import NO_HANDLES, system_error

# As `ArrayRecordDataSource` opens shards: random access gains nothing from reading ahead.
_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}


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
                if payload := self._reader(path).read([number])[0]:
                    return payload
                raise RuntimeError("the file is truncated")  # in the middle, ArrayRecord is silent
            except RuntimeError as error:
                failure = system_error(error, path)
                self.close(None if failure and failure.errno in NO_HANDLES else path)
                if failure is None:
                    raise
                if attempt:
                    raise failure from None
        raise AssertionError  # the second attempt returns or raises

    def count(self, path: str) -> int:
        """The number of records of a shard, which is opened again: it may have been replaced.

        Raises:
          OSError: see `read`.
          RuntimeError: the content of the shard is damaged.
        """
        self.close(path)
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

    def close(self, path: str | None = None) -> None:
        """Closes a shard, or all of them: a reader that failed once keeps failing."""
        with self._lock:
            if path is None:
                self._open.clear()
            else:
                self._open.pop(path, None)


POOL = Readers()
