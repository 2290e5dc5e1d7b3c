"""Files in folders, and in zip and tar archives, which are read as folders without unpacking.

The path of a member is the path of its archive, a slash, and its name: `scans.zip/s1/IM1.dcm`. An
archive is refused as a whole if it is damaged, encrypted or built to do harm. A compressed tar can
only be read from its beginning, so `reading_order` matters: `in_order` sorts paths by it.
"""

import errno
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from maknet_jax.ct import archives
from maknet_jax.ct.reading import content_id_of, one_line
from maknet_jax.errors import Rejected

_INSIDE = re.compile(rf"(?:{'|'.join(map(re.escape, archives.ENDINGS))})(?=/)", re.IGNORECASE)
Path = str | os.PathLike[str]
Content = TypeVar("Content")


def is_archive(path: Path) -> bool:
    """Whether a path is the file of a zip or tar archive, by its name."""
    return os.fspath(path).lower().endswith(archives.ENDINGS) and os.path.isfile(path)


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
    return _read(path, lambda file: file.read())


def content_id(path: Path) -> str:
    """An id computed from the content of a file, which is never in memory as a whole.

    Raises:
      OSError: it cannot be read.
    """
    return _read(path, content_id_of)


def _read(path: Path, read: Callable[[IO[bytes]], Content]) -> Content:
    with open_file(path) as file:
        try:
            return read(file)
        except archives.DAMAGED as error:
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
    if inside is None or not inside[0].lower().endswith(tuple(archives.COMPRESSED)):
        return "", 0
    return inside[0], _archive(inside[0]).offset(inside[1])


def is_sequential(path: str) -> bool:
    """Whether a path is that of a member of a compressed tar."""
    return bool(reading_order(path)[0])


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
        for name in [name for name in files if name.lower().endswith(archives.ENDINGS)]:
            reason = "an archive in an archive is not read: unpack it"
            failures.append((os.path.join(folder, name), reason))
            files.remove(name)
        return folders, files
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if archives.is_junk(entry.name):
                continue
            try:
                if entry.is_dir() or is_archive(entry.path):
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    reason = f"a dead link to {os.readlink(entry.path)}"
                    failures.append((entry.path, reason))
                else:  # a named pipe, a socket or a device
                    failures.append((entry.path, "neither a file nor a folder"))
            except OSError as error:
                failures.append((entry.path, f"cannot be read ({error.strerror})"))
    return folders, files


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


def _archive(path: str) -> archives.Archive:
    state = os.stat(path)
    archive, problem = _open_archive(path, state.st_mtime_ns, state.st_size)
    if archive is None:
        raise Rejected(problem)
    return archive


@functools.lru_cache(maxsize=4)
def _open_archive(path: str, _mtime_ns: int, _size: int) -> tuple[archives.Archive | None, str]:
    """(archive, "") or (None, why it is refused); a refusal is remembered, too."""
    return archives.open_archive(path)
