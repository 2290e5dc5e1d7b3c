"""Reads the files of an untrusted bundle, from a folder or a .zip."""

import contextlib
import dataclasses
import pathlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping

from maknet_jax.errors import InputError

LARGEST_RATIO = 100  # of the size of a zip's member to its compressed size
# Raised by zipfile on damaged archives; OSError is for invalid offsets in the file.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    OSError,
)


@dataclasses.dataclass(frozen=True)
class Member:
    """A file of a bundle: its size in bytes, and `read(n)`, which reads at most n bytes."""

    size: int
    read: Callable[[int], bytes]


def damaged(path: pathlib.Path, reason: str) -> InputError:
    """The error of a bundle that cannot be used."""
    return InputError(f"bundle {path} is damaged or incomplete: {reason}: export or copy it again")


@contextlib.contextmanager
def open_members(path: pathlib.Path) -> Iterator[Mapping[str, Member]]:
    """Yields the files of a folder or a .zip by name; nothing is extracted to disk.

    Hidden files of a folder are skipped.

    Raises:
      InputError: it is not a readable zip, or a member has a path, is a link, or is a zip bomb.
    """
    if not path.is_file():
        yield _folder_members(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            yield _zip_members(path, archive)
    except _BROKEN_ZIP as error:
        if isinstance(error, InputError) or getattr(error, "filename", None):
            raise
        raise damaged(path, f"not a readable zip ({' '.join(str(error).split())})") from None


def _folder_members(folder: pathlib.Path) -> dict[str, Member]:
    members = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_file():
            raise damaged(folder, f"{path.name} does not belong there")

        def read(size: int, path: pathlib.Path = path) -> bytes:
            with path.open("rb") as file:
                return file.read(size)

        members[path.name] = Member(path.stat().st_size, read)
    return members


def _zip_members(path: pathlib.Path, archive: zipfile.ZipFile) -> dict[str, Member]:
    """The members by name, without the folder that may contain all of them."""
    members: dict[str, Member] = {}
    entries = archive.infolist()
    folders = {entry.filename.rpartition("/")[0] for entry in entries if not entry.is_dir()}
    for entry in entries:
        parts = entry.filename.rstrip("/").split("/")
        if {"", ".", ".."} & set(parts) or "\\" in entry.filename or ":" in entry.filename:
            raise damaged(path, f"{entry.filename!r} is not the name of a file inside the zip")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise damaged(path, f"{entry.filename!r} is a link or a device")
    for entry in entries:
        if entry.is_dir():
            continue
        parts = entry.filename.split("/")
        if len(parts) > 2 or len(folders) > 1 or parts[-1] in members:
            raise damaged(path, f"{entry.filename!r} does not belong there")
        if entry.flag_bits & 1:
            raise damaged(path, f"{entry.filename!r} is encrypted")
        if entry.file_size > LARGEST_RATIO * max(entry.compress_size, 1 << 10):
            size = f"{entry.file_size:,} bytes"
            raise damaged(path, f"{entry.filename!r} expands {LARGEST_RATIO} times, to {size}")

        def read(size: int, entry: zipfile.ZipInfo = entry) -> bytes:
            with archive.open(entry) as file:
                return file.read(size)

        members[parts[-1]] = Member(entry.file_size, read)
    return members
