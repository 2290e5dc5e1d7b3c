"""One command at a time writes an output folder.

The owner locks `FOLDER/.running.tmp`, which names it, and renews its time stamp. The lock ends with
the process, however it ends, and works between the processes of one host. On other hosts the time
stamp shows whether the owner is alive. The name is that of a temporary file, which no command takes
for output.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from maknet_jax import console
from maknet_jax.errors import InputError

FILE = ".running.tmp"
BEAT = 5.0  # seconds between renewals
STALE = 30.0  # seconds since the last one, after which the owner counts as dead
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def owned(
    folder: pathlib.Path, command: str, option: str, *, file: str | None = None
) -> Iterator[str]:
    """Owns a folder within the block; yields a token that is written in it.

    Args:
      folder: the output folder; created if needed, and removed if it stays empty.
      command: that owns it, for messages: "maknet train".
      option: the option that names the folder, for messages: "--workdir".
      file: owns only this file or folder in it, and those named after it.

    Raises:
      InputError: another command that runs owns it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path, token = folder / (f".{file}{FILE}" if file else FILE), uuid.uuid4().hex
    me = {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "token": token}
    place = folder / file if file else folder
    handle = _lock(path, place, option)
    try:
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
            os.fsync(handle)
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, str(path)) from None
        done = threading.Event()
        renewing = threading.Thread(target=_renew, args=(handle, done), daemon=True)
        renewing.start()
        try:
            yield token
        finally:
            done.set()
            renewing.join()
    finally:
        # Removed while it is locked: whoever opened it before takes it for another file.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def read_token(folder: pathlib.Path) -> str | None:
    """The token of the owner of a folder; None without one."""
    return _read(folder / FILE).get("token")


def _renew(handle: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # no owner, or one that has just begun
        return {}
    return content if isinstance(content, dict) else {}


def _lock(path: pathlib.Path, place: pathlib.Path, option: str) -> int:
    """An open file at `path`, locked by this process and without another owner."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(refusal(place, _read(path), option)) from None
            except OSError as error:  # the file system has no locks: the time stamp decides
                if error.errno not in _UNSUPPORTED:
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    _wait_until_stale(path, place, option)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner has just ended and removed it


def refusal(place: object, owner: Mapping[str, Any], option: str) -> str:
    """The message for a command that wants a place which another one owns.

    Args:
      place: the folder or the URL.
      owner: its host, process and command.
      option: the option that names the place.
    """
    return (
        f"{place} is in use by `{owner.get('command', 'maknet')}`, process "
        f"{owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}: wait until "
        f"it ends, choose another {option}, or add --distributed if they belong together"
    )


def _wait_until_stale(path: pathlib.Path, place: pathlib.Path, option: str) -> None:
    """Waits for the owner that an earlier command on another host may still be.

    Raises:
      InputError: it renews its time stamp.
    """
    owner = _read(path)
    if not owner or owner.get("host") == socket.gethostname():
        return  # locks show that it has ended
    before = path.stat().st_mtime
    if _age(path) < STALE:
        console.Log().say(
            f"waiting up to {STALE:g} s to see whether process {owner.get('pid')} on "
            f"{owner.get('host')} is still running in {place}"
        )
    while _age(path) < STALE:
        time.sleep(min(1.0, BEAT))
        if not path.exists():
            return
        if path.stat().st_mtime != before:
            raise InputError(refusal(place, _read(path), option))


def _age(path: pathlib.Path) -> float:
    """Seconds since the time stamp, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".now.", suffix=".tmp") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
