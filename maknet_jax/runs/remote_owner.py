"""One command at a time writes a workdir in an object store.

The owner creates the object `URL/.running.tmp`, which names it, and rewrites it with another count
every `BEAT` seconds. Object stores have no locks that end with a process: an owner whose count does
not change for `STALE` seconds is dead. An owner that finds another one in its place stops writing.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from maknet_jax import console
from maknet_jax.data import object_store
from maknet_jax.errors import InputError
from maknet_jax.runs import ownership, stopping

BEAT = 15.0  # seconds between renewals; each is a request
NO_BUCKET = "cannot be written, because its bucket does not exist: create the bucket"
STALE = 60.0  # seconds without one, after which the owner counts as dead


class Owner:
    """This command, as the owner of a workdir in an object store.

    Attributes:
      token: identifies it.
    """

    def __init__(self, store: Any, root: str, url: str, command: str) -> None:
        """For the arguments see `owned`."""
        self.token = uuid.uuid4().hex
        self._store, self._path, self._url = store, f"{root}/{ownership.FILE}", url
        self._entry: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": command,
            "token": self.token,
            "beat": 0,
        }

    def take(self) -> None:
        """Becomes the owner.

        Raises:
          InputError: another command is.
        """
        while True:
            with contextlib.suppress(FileNotFoundError):
                self._wait_until_dead()
                self._store.rm_file(self._path)
            with contextlib.suppress(FileExistsError):  # another command was faster
                self._write(mode="create")
                break
        self.check()  # of a store that ignores mode="create", the last one wins

    def check(self) -> None:
        """Checks that this command is still the owner.

        Raises:
          InputError: another command has taken over.
        """
        owner = read(self._store, self._path)
        if owner.get("token") != self.token:
            raise InputError(ownership.refusal(self._url, owner, "--workdir"))

    def renew(self, done: threading.Event) -> None:
        """Renews the object until `done`; stops the command if another one has taken over."""
        while not done.wait(BEAT):
            try:
                self.check()
                self._entry["beat"] += 1
                self._write()
            except InputError as error:
                stopping.request(str(error))
                return
            except Exception:  # the connection may return
                continue

    def leave(self) -> None:
        """Removes the object, unless another command has taken over."""
        with contextlib.suppress(Exception):  # the next owner sees that it is not renewed
            self.check()
            self._store.rm_file(self._path)

    def _write(self, **options: Any) -> None:
        self._store.pipe_file(self._path, json.dumps(self._entry).encode(), **options)

    def _wait_until_dead(self) -> None:
        """Waits until the owner is known to be dead.

        Raises:
          InputError: it renews its object.
          FileNotFoundError: no command owns it.
        """
        before = self._store.cat_file(self._path)
        owner, ends = _parse(before), time.monotonic() + STALE
        if not owner or _has_ended(owner):
            return
        console.Log().say(
            f"waiting up to {STALE:g} s to see whether process {owner.get('pid')} on "
            f"{owner.get('host')} still writes {self._url}"
        )
        while time.monotonic() < ends:
            time.sleep(min(1.0, STALE / 10))
            if self._store.cat_file(self._path) != before:
                raise InputError(ownership.refusal(self._url, owner, "--workdir"))


@contextlib.contextmanager
def owned(store: Any, root: str, url: str, command: str) -> Iterator[Owner]:
    """Owns a workdir within the block.

    Args:
      store: see `object_store.open_store`.
      root: the path of the workdir in it.
      url: of the workdir, for messages.
      command: that owns it, for messages: "maknet train".

    Raises:
      InputError: another command that runs owns it, or the store cannot be written.
    """
    owner, done = Owner(store, root, url, command), threading.Event()
    with object_store.one_line(url, NO_BUCKET):
        owner.take()
    renewing = threading.Thread(target=owner.renew, args=(done,), daemon=True)
    renewing.start()
    try:
        yield owner
    finally:
        done.set()
        renewing.join()
        owner.leave()


def read(store: Any, path: str) -> dict[str, Any]:
    """The owner that an object names; an empty dict without one."""
    try:
        return _parse(store.cat_file(path))
    except FileNotFoundError:
        return {}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host that no longer exists."""
    if owner.get("host") != socket.gethostname():
        return False
    if owner.get("pid") == os.getpid():  # restarted in a container
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, TypeError, OSError):
        return False
    return False
