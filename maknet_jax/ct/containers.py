"""Files in folders, and in zip and tar archives, which are read as folders without unpacking.

The path of a member is the path of its archive, a slash, and its name: `scans.zip/s1/IM1.dcm`. An
archive is refused as a whole if it is damaged, encrypted or built to do harm. A compressed tar can
only be read from its beginning, so `reading_order` matters: `in_order` sorts paths by it.
"""

import bz2
import errno
import functools
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
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

from maknet_jax.ct.reading import one_line
from maknet_jax.errors import Rejected

MOST_MEMBERS = 300_000
HIGHEST_RATIO = 200  # bytes of all members per byte of the archive ...
SMALL = 64 << 20  # ... beyond these bytes
_LARGEST_HEADER = 1 << 20  # bytes of a header in a tar

_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
ENDINGS = (".zip", ".tar", *_COMPRESSED)
_INSIDE = re.compile(rf"(?:{'|'.join(map(re.escape, ENDINGS))})(?=/)", re.IGNORECASE)
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

Path = str | os.PathLike[str]


def is_archive(path: Path) -> bool:
    """Whether a path is the file of a zip or tar archive, by its name."""
    return os.fspath(path).lower().endswith(ENDINGS) and os.path.isfile(path)


def in_archive(path: Path) -> bool:
    """Whether a path is that of a member of an archive."""
    return _split(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, an archive, or a folder in an archive."""
    inside = _split(path)
    return os.path.isdir(path) or is_archive(path) or bool(inside and _has_folder(*inside))


def is_file(path: Path) -> bool:
    """Whether a path is a regular file, or one in an archive."""
    inside = _split(path)
    return _has_member(*inside) if inside else os.path.isfile(path)


def list_folder(path: Path) -> list[str]:
    """The sorted names of the files in a folder, without hidden ones.

    Raises:
      OSError: it cannot be read.
    """
    _, names = _listing(os.fspath(path), [])
    return names


def open_file(path: Path) -> IO[bytes]:
    """Opens a file for reading bytes.

    Raises:
      OSError: it cannot be read.
    """
    inside = _split(path)
    return _archive(inside[0]).open(inside[1]) if inside else open(path, "rb")


def read_file(path: Path) -> bytes:
    """The content of a file. Of a zip member the checksum is verified.

    Raises:
      OSError: it cannot be read.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except DAMAGED as error:
            raise OSError(errno.EIO, f"damaged archive: {one_line(error)}", str(path)) from None


def size(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
      OSError: it cannot be read.
    """
    inside = _split(path)
    return _archive(inside[0]).size(inside[1]) if inside else os.path.getsize(path)


def modified(path: Path) -> int:
    """When a folder, or the archive that contains it, changed, in ns."""
    inside = _split(path)
    return os.stat(inside[0] if inside else path).st_mtime_ns


def in_order(paths: Iterable[str]) -> list[str]:
    """Sorts the members of compressed tars by their place in it; leaves other paths in order."""
    return sorted(paths, key=reading_order)


def reading_order(path: str) -> tuple[str, int]:
    """(archive, place of the member) in a compressed tar; ("", 0) for any other path."""
    inside = _split(path)
    if inside is None or not inside[0].lower().endswith(tuple(_COMPRESSED)):
        return "", 0
    return inside[0], _archive(inside[0]).offset(inside[1])


def walk(root: Path, failures: list[tuple[str, str]]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields (folder, names of its folders, names of its files), like `os.walk`, all sorted.

    Links are followed, each folder is visited once, and archives are folders. Hidden files and
    `__MACOSX` are skipped. The caller may remove folders that should not be visited.

    Args:
      root: a folder or an archive.
      failures: (path, reason) of what cannot be read is appended.
    """
    visited = {os.path.realpath(root)}
    pending = [os.fspath(root)]
    while pending:
        folder = pending.pop()
        try:
            folders, names = _listing(folder, failures)
        except Rejected as error:
            failures.append((folder, str(error)))
            continue
        except OSError as error:
            failures.append((folder, f"cannot be read ({error.strerror})"))
            continue
        yield folder, folders, names
        for name in reversed(folders):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if real not in visited:
                visited.add(real)
                pending.append(path)


def _listing(folder: str, failures: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(folders, files) in a folder, sorted."""
    inside = (folder, "") if is_archive(folder) else _split(folder)
    folders: list[str] = []
    files: list[str] = []
    if inside:
        folders, files = _archive(inside[0]).listing(inside[1])
        for name in [name for name in files if name.lower().endswith(ENDINGS)]:
            reason = "an archive in an archive is not read: unpack it"
            failures.append((os.path.join(folder, name), reason))
            files.remove(name)
        return folders, files
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _is_junk(entry.name):
                continue
            try:
                if entry.is_dir() or is_archive(entry.path):
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
                elif entry.is_symlink():
                    reason = f"a dead link to {os.readlink(entry.path)}"
                    failures.append((entry.path, reason))
            except OSError as error:
                failures.append((entry.path, f"cannot be read ({error.strerror})"))
    return folders, files


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _split(path: Path) -> tuple[str, str] | None:
    """(archive, name of the member) of a path in an archive, else None."""
    text = os.fspath(path)
    for match in _INSIDE.finditer(text):
        if os.path.isfile(text[: match.end()]):
            return text[: match.end()], text[match.end() + 1 :].rstrip("/")
    return None


def _has_folder(archive: str, name: str) -> bool:
    try:
        return _archive(archive).has_folder(name)
    except (OSError, Rejected):
        return False


def _has_member(archive: str, name: str) -> bool:
    try:
        return _archive(archive).has_member(name)
    except (OSError, Rejected):
        return False


def _archive(path: str) -> "_Archive":
    state = os.stat(path)
    archive, problem = _open_archive(path, state.st_mtime_ns, state.st_size)
    if archive is None:
        raise Rejected(problem)
    return archive


@functools.lru_cache(maxsize=4)
def _open_archive(path: str, _mtime_ns: int, _size: int) -> tuple["_Archive | None", str]:
    """(archive, "") or (None, why it is refused); a refusal is remembered, too."""
    try:
        return (_Zip if path.lower().endswith(".zip") else _Tar)(path), ""
    except Rejected as error:
        return None, f"refused as a whole: {error}"
    except DAMAGED as error:
        return None, f"refused as a whole: damaged archive ({one_line(error)})"


class _Archive:
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
        if any(map(_is_junk, name.split("/"))):
            return
        self._folders.setdefault(folder, (set(), []))[1].append(base)
        while folder:
            parent, _, base = folder.rpartition("/")
            self._folders.setdefault(parent, (set(), []))[0].add(base)
            folder = parent

    def has_folder(self, name: str) -> bool:
        return name in self._folders

    def has_member(self, name: str) -> bool:
        return name in self._members

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        folders, files = self._folders.get(folder, (set(), []))
        return sorted(folders), sorted(files)

    def _member(self, name: str) -> Any:
        try:
            return self._members[name]
        except KeyError:
            text = f"{self.path}/{name}"
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text) from None

    def open(self, name: str) -> IO[bytes]:
        raise NotImplementedError

    def size(self, name: str) -> int:
        raise NotImplementedError

    def offset(self, name: str) -> int:
        raise NotImplementedError


class _Zip(_Archive):
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


class _Tar(_Archive):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        ending = next((end for end in _COMPRESSED if path.lower().endswith(end)), "")
        self.stream: IO[bytes] = _COMPRESSED[ending](path) if ending else open(path, "rb")
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
