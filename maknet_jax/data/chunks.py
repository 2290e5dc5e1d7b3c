"""Chunks of ArrayRecord files: written by any process, and put together into shards by one.

ArrayRecord writes Riegeli files (github.com/google/riegeli, doc/riegeli_records_file_format.md): a
sequence of chunks, which here hold one record each, interrupted by a block header every 64 KiB. A
chunk does not depend on its place, but the block headers do, and so do the last chunks of a file,
which list the places. ArrayRecord itself writes every chunk, into memory or a temporary file; only
the block headers are computed here. The bytes of a shard are those of one ArrayRecord writer.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from array_record.python import array_record_module

from maknet_jax.errors import InputError, system_error

# One record per group, so that random access decompresses the requested record only.
_OPTIONS = "group_size:1,zstd:3"
_PLAIN = "group_size:{},uncompressed"
_BLOCK, _BLOCK_HEADER = 1 << 16, 24  # bytes
_USABLE = _BLOCK - _BLOCK_HEADER
_CHUNK_HEADER = struct.Struct("<5Q")  # its hash, size, hash of the data, type, decoded size
_SIGNATURE = 40  # bytes of the first chunk of a file, a header without data
_PADDED = 1 << 17  # bytes of a record
_MAGIC = 0x71930E704FDAE05E  # at the end of ArrayRecord files
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Compressed records.

    Attributes:
      content: their chunks, one after the other, without block headers.
      sizes: bytes of each chunk.
      lengths: bytes of each record.
      digests: SHA-256 of each record.
    """

    content: bytes = b""
    sizes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()


def compress(records: Iterable[bytes]) -> Chunks:
    """Compresses records; the only work on a shard that takes long.

    Raises:
      OSError: the system has no room for them; without a file name.
    """
    lengths, digests = [], []

    def noted() -> Iterator[bytes]:
        for record in records:
            lengths.append(len(record))
            digests.append(hashlib.sha256(record).digest())
            yield record

    stream, sizes = _write(noted(), _OPTIONS)
    sizes = sizes[1 : 1 + len(lengths)]
    content = bytes(stream[_SIGNATURE : _SIGNATURE + sum(sizes)])
    return Chunks(content, tuple(sizes), tuple(lengths), tuple(digests))


class Layout:
    """The places of records in a file."""

    def __init__(self) -> None:
        """An empty file."""
        self._raw = 0  # bytes of all chunks
        self._sizes: list[int] = []  # bytes of the chunk of each record
        self._lengths: list[int] = []  # bytes of each record

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return int(_place(self._raw))

    def start(self) -> list[memoryview]:
        """The first bytes of the file.

        Raises:
          InputError: see `check_format`.
        """
        check_format()
        return self._signature()

    def _signature(self) -> list[memoryview]:
        stream, _ = _write((), _OPTIONS)
        return self._place_chunks(stream[:_SIGNATURE], [_SIGNATURE])

    def add(self, chunks: Chunks) -> list[memoryview]:
        """The next bytes of the file: records, and block headers between them."""
        self._sizes += chunks.sizes
        self._lengths += chunks.lengths
        return self._place_chunks(chunks.content, chunks.sizes)

    def keep(self, count: int) -> None:
        """Drops all records but the first `count`; the file ends after them."""
        del self._sizes[count:], self._lengths[count:]
        self._raw = _SIGNATURE + sum(self._sizes)

    def end(self) -> list[memoryview]:
        """The last bytes of the file: the places and sizes of its records."""
        place, count = self.size, len(self._sizes)
        about: dict[int, int | bytes] = {
            1: _VERSION,
            2: count,
            3: count,
            4: _written_options().encode(),
        }
        footers = [_message({1: _message(about)})]
        starts = _place(np.cumsum([_SIGNATURE, *self._sizes[:-1]])) if count else np.zeros(0)
        for start, length in zip(starts.tolist(), self._lengths, strict=True):
            footers.append(_message({1: start, 2: length, 3: 1}))
        options = _OPTIONS.replace("group_size:1", f"group_size:{len(footers)}")
        pieces = self._place_chunk(footers, options) + self._pad()
        postscript = [_message({1: place, 2: _MAGIC})] * 3
        pieces += self._place_chunk(postscript, _PLAIN.format(len(postscript)))
        return pieces + self._pad()

    def _place_chunk(self, records: Sequence[bytes], options: str) -> list[memoryview]:
        """A single chunk with several records."""
        stream, sizes = _write(records, options)
        return self._place_chunks(stream[_SIGNATURE : _SIGNATURE + sizes[1]], sizes[1:2])

    def _pad(self) -> list[memoryview]:
        """Fills the last block."""
        rest = -self._raw % _USABLE
        if not rest:
            return []
        rest += _USABLE * (rest < _CHUNK_HEADER.size)
        return self._place_chunks(_padding(rest), [rest])

    def _place_chunks(self, content: bytes | memoryview, sizes: Sequence[int]) -> list[memoryview]:
        start = self._raw
        ends = start + np.cumsum(sizes, dtype=np.int64)
        self._raw = stop = int(ends[-1]) if len(sizes) else start
        blocks = np.arange(-(-start // _USABLE), -(-stop // _USABLE), dtype=np.int64)
        inside = np.searchsorted(ends, blocks * _USABLE, side="right")  # the chunk at each header
        begins = ends - np.asarray(sizes, np.int64)
        before = blocks * _BLOCK - _place(begins[inside])
        after = _place(ends[inside]) - blocks * _BLOCK
        headers = memoryview(_block_headers(before, after))
        view, pieces, done = memoryview(content), [], 0
        for number, block in enumerate(blocks.tolist()):
            place = block * _USABLE - start
            pieces += [
                view[done:place],
                headers[number * _BLOCK_HEADER : (number + 1) * _BLOCK_HEADER],
            ]
            done = place
        return [*pieces, view[done:]]


@functools.cache
def check_format() -> None:
    """Checks, once per process, that the installed ArrayRecord writes the files of this module.

    Raises:
      InputError: it writes other files; its version is not supported.
    """
    noise = np.random.default_rng(0).bytes(_BLOCK)  # does not compress: the file has three blocks
    examples = [noise, b"", noise[:99]]
    layout = Layout()
    pieces: list[memoryview] = []
    with _file() as path:
        _write_file(path, examples, _OPTIONS)
        expected = np.fromfile(path, np.uint8).tobytes()
    # Chunks of another format cannot even be told apart.
    with contextlib.suppress(ValueError, IndexError, AssertionError, struct.error):
        pieces = [*layout._signature(), *layout.add(compress(examples)), *layout.end()]
    if b"".join(pieces) != expected:
        version = importlib.metadata.version("array-record")
        raise InputError(
            f"array-record {version} writes a file format that maknet-jax does not support: "
            "pip install 'array-record<0.9'"
        )


def _place(raw: np.ndarray | int) -> np.ndarray:
    """The places in a file of the ends of chunks, from the bytes without block headers."""
    blocks, rest = np.divmod(raw, _USABLE)
    return blocks * _BLOCK + np.where(rest > 0, rest + _BLOCK_HEADER, 0)


def _write(records: Iterable[bytes], options: str) -> tuple[memoryview, list[int]]:
    """(the chunks of an ArrayRecord file without block headers, the size of each chunk)."""
    with _file() as path:
        _write_file(path, records, options)
        content = np.fromfile(path, np.uint8)
    stream = memoryview(content.reshape(-1, _BLOCK)[:, _BLOCK_HEADER:].ravel())
    sizes, offset = [], 0
    while offset < len(stream):
        sizes.append(_CHUNK_HEADER.size + _CHUNK_HEADER.unpack_from(stream, offset)[1])
        offset += sizes[-1]
    return stream, sizes


def _write_file(path: str, records: Iterable[bytes], options: str) -> None:
    try:
        writer = array_record_module.ArrayRecordWriter(path, options)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
    except (RuntimeError, ValueError) as error:  # those of the system, too
        failure = system_error(error, path) or OSError(errno.EIO, str(error)[:200])
        raise OSError(failure.errno, failure.strerror) from None


@contextlib.contextmanager
def _file() -> Iterator[str]:
    """The path of a new file, in memory if the system has such files."""
    if not hasattr(os, "memfd_create") or not os.path.exists("/proc/self/fd"):
        with tempfile.TemporaryDirectory() as folder:
            yield os.path.join(folder, "chunks")
        return
    descriptor = os.memfd_create("chunks")
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@functools.cache
def _written_options() -> str:
    """All options of `_OPTIONS`, as files record them."""
    with _file() as path:
        array_record_module.ArrayRecordWriter(path, _OPTIONS).close()
        reader = array_record_module.ArrayRecordReader(path)
        try:
            return reader.writer_options_string()
        finally:
            reader.close()


def _padding(size: int) -> memoryview:
    """A padding chunk: that of a file with one record, whose length determines it."""
    length = _PADDED + (_padded(_PADDED)[1] - size) % _USABLE
    stream, actual = _padded(length)
    assert actual == size, (actual, size)
    return stream


def _padded(length: int) -> tuple[memoryview, int]:
    """(the first padding chunk of a file with one record of this length, its size)."""
    stream, sizes = _write([bytes(length)], _PLAIN.format(1))
    start = sum(sizes[:3])  # the signature, the record and the list of records
    return stream[start : start + sizes[3]], sizes[3]


def _message(fields: dict[int, int | bytes]) -> bytes:
    """A protocol buffer."""
    parts = []
    for number, value in fields.items():
        if isinstance(value, int):
            parts += [_varint(number << 3), _varint(value)]
        else:
            parts += [_varint(number << 3 | 2), _varint(len(value)), value]
    return b"".join(parts)


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


# HighwayHash with 64 bits (github.com/google/highwayhash), on many inputs of 16 bytes at once. A
# state is four arrays [N, 4] of 64-bit numbers.
_KEY = np.frombuffer(b"Riegeli/records\n" * 2, "<u8")
_HALF = np.uint64(32)
_INITIAL = np.array(
    [
        [0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3],
        [0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377],
    ],
    np.uint64,
)
_ZIPPER = np.array([3, 12, 2, 5, 14, 1, 15, 0, 11, 4, 10, 13, 9, 6, 8, 7])  # of each 16 bytes
_ZIPPER = np.concatenate([_ZIPPER, 16 + _ZIPPER])


def _block_headers(before: np.ndarray, after: np.ndarray) -> bytes:
    """Block headers: a hash, the bytes from the start of the chunk at the header, to its end."""
    fields = np.stack([before, after], axis=-1).astype("<u8")
    return np.column_stack([_hash(fields), fields]).astype("<u8").tobytes()


def _hash(fields: np.ndarray) -> np.ndarray:
    """The hashes, uint64 `[N]`, of `[N, 2]` 64-bit numbers."""
    rotated = _KEY << _HALF | _KEY >> _HALF
    first = (_INITIAL[0] ^ _KEY, _INITIAL[1] ^ rotated, *_INITIAL)
    state = [np.tile(row, (len(fields), 1)) for row in first]
    size = np.uint64(16)
    state[0] += (size << _HALF) + size
    halves = state[1].view(np.uint32)
    state[1] = (halves << np.uint32(16) | halves >> np.uint32(16)).view(np.uint64)
    packet = np.zeros((len(fields), 4), np.uint64)
    packet[:, :2] = fields
    packet[:, 3] = fields[:, 1] >> _HALF << _HALF  # the last four bytes again
    _update(state, packet)
    for _ in range(4):
        v0 = state[0]
        _update(state, (v0 << _HALF | v0 >> _HALF)[:, [2, 3, 0, 1]])
    v0, v1, mul0, mul1 = state
    return v0[:, 0] + v1[:, 0] + mul0[:, 0] + mul1[:, 0]


def _update(state: list[np.ndarray], packet: np.ndarray) -> None:
    v0, v1, mul0, mul1 = state
    low = np.uint64(0xFFFFFFFF)
    v1 += mul0 + packet
    mul0 ^= (v1 & low) * (v0 >> _HALF)
    v0 += mul1
    mul1 ^= (v0 & low) * (v1 >> _HALF)
    v0 += _zipped(v1)
    v1 += _zipped(v0)


def _zipped(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words.view(np.uint8)[:, _ZIPPER]).view(np.uint64)
