"""The checked tables of contents of zip and tar archives, and their members as files."""

import bz2
import errno
import gzip
import io
import lzma
import os
import posixpath
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from maknet_jax.ct.reading import one_line
from maknet_jax.errors import Rejected

MOST_MEMBERS = 300_000
HIGHEST_RATIO = 200  # bytes of all members per byte of the archive ...
SMALL = 64 << 20  # ... beyond these bytes
_LARGEST_HEADER = 1 << 20  # bytes of a header in a tar

COMPRESSED: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
ENDINGS = (".zip", ".tar", *COMPRESSED)

# What zipfile, tarfile and the decompressors raise on damaged files; gzip's has no errno.
DAMAGED: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    EOFError,
    ValueError,
    RuntimeError,
    struct.error,
)


def open_archive(path: str) -> "tuple[Archive | None, str]":
    """(archive, "") or (None, why it is refused)."""
    try:
        return (_Zip if path.lower().endswith(".zip") else _Tar)(path), ""
    except Rejected as error:
        return None, f"refused as a whole: {error}"
    except DAMAGED as error:
        return None, f"refused as a whole: damaged archive ({one_line(error)})"


def is_junk(name: str) -> bool:
    """Whether a file or folder is skipped silently."""
    return name.startswith(".") or name == "__MACOSX"


class Archive:
    """The checked table of contents of an archive."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._limit = max(SMALL, HIGHEST_RATIO * os.path.getsize(path))
        self._total = 0
        self._members: dict[str, Any] = {}
        self._folders: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}

    def _add(self, name: str, size: int, member: Any) -> None:
        """Adds a file; raises Rejected if the archive is built to do harm."""
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", name) or "\0" in name:
            raise Rejected(f"the member {name!r} is outside of the archive")
        self._total += size
        if self._total > self._limit:
            raise Rejected(
                f"its members unpack to more than {self._limit >> 20} MiB, {HIGHEST_RATIO} times "
                "its size: a decompression bomb"
            )
        if len(self._members) >= MOST_MEMBERS:
            raise Rejected(f"more than {MOST_MEMBERS} members")
        name = posixpath.normpath(name)
        if name in self._members:
            raise Rejected(f"two members are named {name!r}")
        self._members[name] = member
        folder, _, base = name.rpartition("/")
        if any(map(is_junk, name.split("/"))):
            return
        self._folders.setdefault(folder, (set(), []))[1].append(base)
        while folder:
            parent, _, base = folder.rpartition("/")
            self._folders.setdefault(parent, (set(), []))[0].add(base)
            folder = parent

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder of that name."""
        return name in self._folders

    def has_member(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self._members

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """The sorted names of the folders and of the files in a folder."""
        folders, files = self._folders.get(folder, (set(), []))
        return sorted(folders), sorted(files)

    def _member(self, name: str) -> Any:
        try:
            return self._members[name]
        except KeyError:
            text = f"{self.path}/{name}"
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text) from None

    def open(self, name: str) -> IO[bytes]:
        """Opens a member for reading; raises OSError if it is missing or damaged."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """The size of a member in bytes; raises OSError if it is missing."""
        raise NotImplementedError

    def offset(self, name: str) -> int:
        """The place of a member in the unpacked tar; 0 in a zip."""
        return 0


class _Zip(Archive):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        if _central_directory_size(path) > MOST_MEMBERS * 512:
            raise Rejected(f"more than {MOST_MEMBERS} members")
        self._zip = zipfile.ZipFile(path)
        for info in self._zip.infolist():
            if stat.S_ISLNK(info.external_attr >> 16):
                raise Rejected(f"the member {info.filename!r} is a link")
            if info.flag_bits & 1:
                raise Rejected(f"the member {info.filename!r} is encrypted")
            if not info.is_dir():
                self._add(info.filename, info.file_size, info)

    def open(self, name: str) -> IO[bytes]:
        try:
            return self._zip.open(self._member(name))
        except DAMAGED as error:
            text = f"damaged archive: {one_line(error)}"
            raise OSError(errno.EIO, text, f"{self.path}/{name}") from None

    def size(self, name: str) -> int:
        return self._member(name).file_size


def _central_directory_size(path: str) -> int:
    """The bytes of a zip's table of contents, before it is read into memory; 0 if unknown."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 65_557))  # the record and its longest comment
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) < end + 16:
            return 0
        (length,) = struct.unpack_from("<L", tail, end + 12)
        if length == 0xFFFFFFFF and end >= 20 and tail[end - 20 : end - 16] == b"PK\6\7":
            (place,) = struct.unpack_from("<Q", tail, end - 12)
            file.seek(min(place, os.path.getsize(path)))
            record = file.read(56)
            length = struct.unpack_from("<Q", record, 40)[0] if len(record) == 56 else 0
    return length


class _Tar(Archive):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        ending = next((end for end in COMPRESSED if path.lower().endswith(end)), "")
        self.stream: IO[bytes] = COMPRESSED[ending](path) if ending else open(path, "rb")
        self.lock = threading.Lock()
        try:
            headers = cast("IO[bytes]", _Headers(self.stream))
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                for info in tar:
                    if not (info.isreg() or info.isdir()) or info.issparse():
                        raise Rejected(f"the member {info.name!r} is a link or a special file")
                    if info.isreg():
                        self._add(info.name, info.size, (info.offset_data, info.size))
        except BaseException:
            self.stream.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self.stream.close()

    def open(self, name: str) -> IO[bytes]:
        return io.BufferedReader(_Part(self, *self._member(name)), 1 << 16)

    def size(self, name: str) -> int:
        return self._member(name)[1]

    def offset(self, name: str) -> int:
        return self._members.get(name, (0, 0))[0]


class _Headers:
    """A stream of which tarfile reads headers only: nothing large."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._read, self.seek, self.tell = stream.read, stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if size > _LARGEST_HEADER:
            raise Rejected(f"a header of {size >> 20} MiB")
        return self._read(size)


class _Part(io.RawIOBase):
    """One member of a tar, as a file."""

    def __init__(self, tar: _Tar, start: int, size: int) -> None:
        self._tar, self._start, self._size, self._place = tar, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        with self._tar.lock:
            self._tar.stream.seek(self._start + self._place)
            content = self._tar.stream.read(wanted)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
