"""Atomic writes, the limit of open files, and the check of a claimed output folder."""

import contextlib
import errno
import json
import os
import pathlib
import re
import resource
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any

from maknet_jax.errors import InputError

PNG_SOFTWARE = "maknet-jax"  # the text chunk "Software" of the PNGs that this package writes

# Bytes of a name that are not UTF-8 (as Python decodes them), control characters, and characters
# that reverse or break lines.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

# A URL, or what `pathlib` makes of one: s3:/bucket. A scheme has two letters or more.
_REMOTE = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/.*")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, such as gs://bucket/runs, and not a path of this machine."""
    return _REMOTE.match(os.fspath(path)) is not None


def check_local(path: str | os.PathLike[str]) -> None:
    """Checks that a path is not a URL, which `pathlib` would turn into a local folder.

    Raises:
      InputError: it is one.
    """
    if is_remote(path):
        url = re.sub(":/+", "://", os.fspath(path), count=1)
        raise InputError(
            f"{url} is not a path of this machine, and object stores are not supported here: pass "
            "a local path, such as a mount of the bucket or a copy"
        )


def printable(text: str) -> str:
    """`text` for a terminal or a table: what cannot be printed is escaped, as in `M\\xfcller`."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        code -= 0xDC00
    short = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return short or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


@contextlib.contextmanager
def write_whole(
    path: str | os.PathLike[str], mode: str = "w", *, private: bool = False
) -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` that is renamed to it if the block succeeds.

    Args:
      path: the final name; its folder is created.
      mode: "w" (UTF-8 text; lone surrogates, which stand for other bytes, are escaped) or "wb".
      private: only the owner may read the file; otherwise permissions follow the umask.

    Raises:
      OSError: the disk is full, for example; its `filename` is `path`.
    """
    check_local(path)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    try:
        handle, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    except OSError as error:  # name the final file in the message, not the temporary one
        raise type(error)(error.errno, error.strerror, str(path)) from None
    encoding = None if "b" in mode else "utf-8"
    newline, errors = (None, None) if "b" in mode else ("", "backslashreplace")
    try:
        with os.fdopen(handle, mode, encoding=encoding, newline=newline, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:  # mkstemp creates files that only their owner can read
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def check_file_name(path: str | os.PathLike[str], ending: str, option: str = "--out") -> None:
    """Checks, before any work, that an output is named like a file and is not a folder.

    Args:
      path: the file to write.
      ending: the expected ending, such as ".csv", in any case.
      option: the option that names it, for the message.

    Raises:
      InputError: it is a folder, or has another ending.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        example = path / f"output{ending}"
        raise InputError(f"{option} {path} is a folder: name a file in it, such as {example}")
    if path.suffix.lower() != ending:
        example = path.with_suffix(ending)
        raise InputError(f"{option} {path} should end in {ending}: pass {example}")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the name of a file to errors of the block that lack one: writing to it, for example."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def write_folder(
    path: str | os.PathLike[str], *, replace: Callable[[pathlib.Path], bool] | None = None
) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path` that is renamed to it if the block succeeds.

    Args:
      path: the final name; it must not exist or be an empty folder, unless `replace` allows more.
      replace: replace(path) says whether an existing `path` may be replaced.

    Raises:
      InputError: `path` exists and may not be replaced.
    """
    check_local(path)
    path = pathlib.Path(path).absolute()
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not (replace and replace(path)):
        raise InputError(f"{path} exists and would be overwritten: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as parent:
        new, old = pathlib.Path(parent) / "new", pathlib.Path(parent) / "old"
        new.mkdir()
        yield new
        if occupied:
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if occupied:
                old.rename(path)
            raise


def raise_handle_limit(most: int = 65_536) -> None:
    """Raises the soft limit of open files of this process to the hard limit, or to `most`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than its hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def has_foreign_files(folder: str | os.PathLike[str], *names: str) -> bool:
    """Whether `folder` is a file, or holds anything but `names` and leftover temporary files.

    A killed process leaves hidden temporary files.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return folder.exists()
    return any(
        path.name not in names and not (path.name[0] == "." and path.suffix == ".tmp")
        for path in folder.iterdir()
    )


def check_claim(
    folder: str | os.PathLike[str],
    records: Mapping[str, Mapping[str, Any]],
    *,
    command: str,
    option: str,
    may_change: Collection[str] = (),
    leftovers: Collection[str] = (),
    upgrade: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Checks that a folder may be written: it is empty, or holds a run with the same `records`.

    Args:
      folder: the output folder; it need not exist.
      records: file name -> JSON object that describes the run. The last one is the claim: it is
        written last, so without it the others are leftovers of a killed process.
      command: the command that writes the folder, for the message: "maknet train".
      option: the option that names the folder, for the message: "--workdir".
      may_change: keys that may change on resume; "data.path" is the key `path` of the object
        `data`. Keys of records before the last one start with the stem of the file's name.
      leftovers: names of other files that a run leaves if it ends before its claim is written.
      upgrade: upgrade(file name, stored record) -> the record as this version writes it.

    Raises:
      InputError: the folder holds foreign files or another run.
    """
    check_local(folder)
    folder = pathlib.Path(folder)
    claim = list(records)[-1]
    if not (folder / claim).is_file():
        names = (pathlib.Path(name).parts[0] for name in records)
        if has_foreign_files(folder, *names, *leftovers):
            raise InputError(
                f"{folder} holds something other than output of `{command}`: choose a new {option}"
            )
        return
    for name, record in records.items():
        prefix = "" if name == claim else pathlib.Path(name).stem
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(stored, dict):
            raise InputError(f"{folder / name} is damaged: restore a copy or choose a new {option}")
        if upgrade is not None:
            stored = upgrade(name, stored)
        before, now = _flatten(stored, prefix), _flatten(json.loads(json.dumps(record)), prefix)
        for key in sorted((before | now).keys() - set(may_change)):
            if before.get(key) != now.get(key):
                old, new = (_shorten(values.get(key)) for values in (before, now))
                raise InputError(
                    f"{folder} holds output of `{command}` with {key} {old}, not {new}: choose "
                    f"another {option} or repeat the command that started it"
                )


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    parts = [_flatten(child, f"{prefix}.{key}".strip(".")) for key, child in node.items()]
    return {key: value for part in parts for key, value in part.items()}


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN raises ValueError: it is not JSON."""
    with write_whole(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: it is truncated or not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is not valid JSON ({reason}): restore a copy of it") from None
