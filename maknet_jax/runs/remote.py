"""Workdirs in object stores (s3:// and gs://): a local copy, uploaded whenever it has changed.

URL/manifest.json      the checkpoints that exist, with the size and the SHA-256 of each object
URL/checkpoints/N/...  the files of a checkpoint, as Orbax wrote them; also URL/best/N/...
URL/config.json, ...   the other files of the workdir
URL/.running.tmp       its owner, see `remote_owner`

Orbax writes into the local copy. The objects of a checkpoint are uploaded first, and a new
manifest, which a store replaces atomically, last: what it does not name does not exist. The bucket
decides: when a run starts, its local copy is made equal to the bucket. Of several processes the
first one uploads, because all hold the same state; each has a copy of its own.
"""

import contextlib
import fcntl
import hashlib
import json
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax

from maknet_jax import console, files
from maknet_jax.data import object_store
from maknet_jax.errors import InputError, Stopped
from maknet_jax.runs import claim, ownership, remote_owner
from maknet_jax.training import sharding

MANIFEST = "manifest.json"
CHECKPOINTS = ("checkpoints", "best")
_CLAIM = ("dataset.json", "config.json")  # in the order in which a run claims its workdir
_NO_RUN = "does not exist, or is not a workdir of `maknet train`"
_THREADS = 8  # objects that are copied at once
_ATTEMPTS = 5  # how often a workdir that changes while it is read is read again

Entries = dict[str, dict[str, Any]]  # checkpoints/N -> its folder, and its files' sizes and digests


class _Damaged(ValueError):
    """A checkpoint whose objects do not match their digests."""


class Copy:
    """The local copy of a workdir in an object store.

    Attributes:
      url: of the workdir.
      folder: the local copy.
    """

    def __init__(self, url: str, folder: pathlib.Path, *, may_be_new: bool = False) -> None:
        """Nothing is copied yet.

        Args:
          url: of the workdir.
          folder: the local copy.
          may_be_new: whether it may hold no run yet.
        """
        self.url, self.folder = url, folder
        self.owner: remote_owner.Owner | None = None
        self._may_be_new = may_be_new
        self._store, self._root = object_store.open_store(url)
        self._saved: Entries = {}
        self._uploaded: dict[str, tuple[int, int]] = {}

    def download(self) -> None:
        """Makes the local copy equal to the bucket; files with the right digest stay.

        Raises:
          InputError: the bucket cannot be read, or none of its last checkpoints is intact.
        """
        with object_store.one_line(self.url, _NO_RUN):
            for attempt in range(_ATTEMPTS):
                self._saved = self._read_manifest()
                try:
                    self._download_files()
                    self._download_checkpoints()
                    return
                except FileNotFoundError:  # a training that runs has deleted a checkpoint
                    if attempt == _ATTEMPTS - 1:
                        raise

    def upload(self) -> None:
        """Makes the bucket equal to the local copy; other processes than the first do nothing.

        Raises:
          InputError: the bucket cannot be written, or another command has taken it over.
        """
        if jax.process_index() > 0:
            return
        with object_store.one_line(self.url, remote_owner.NO_BUCKET):
            if self.owner:
                self.owner.check()
            self._upload_files()
            self._upload_checkpoints()

    def clean(self) -> None:
        """Deletes objects of checkpoints that a killed upload left."""
        with object_store.one_line(self.url):
            known = {
                f"{self._root}/{entry['folder']}/{name}"
                for entry in self._read_manifest().values()
                for name in entry["files"]
            }
            for kind in CHECKPOINTS:
                for path in self._find(kind):
                    if path not in known:
                        self._store.rm_file(path)

    def check_free(self) -> None:
        """Checks that the bucket holds a run, or nothing.

        Raises:
          InputError: it holds something else, or cannot be read.
        """
        with object_store.one_line(self.url):
            names = {path.removeprefix(f"{self._root}/") for path in self._find()}
        # The first object of the claim may be that of a killed command.
        if names - {ownership.FILE, _CLAIM[0]} and _CLAIM[-1] not in names:
            raise InputError(
                f"{self.url} holds something other than output of `maknet train`: choose a new "
                "--workdir"
            )

    def read_token(self) -> str | None:
        """The token of the owner; None without one."""
        with object_store.one_line(self.url):
            owner = remote_owner.read(self._store, f"{self._root}/{ownership.FILE}")
        return owner.get("token")

    @contextlib.contextmanager
    def owned(self, command: str) -> Iterator[None]:
        """Owns the bucket within the block, see `remote_owner.owned`."""
        with remote_owner.owned(self._store, self._root, self.url, command) as self.owner:
            yield

    def _find(self, folder: str = "") -> list[str]:
        """The paths of all objects in a folder of the workdir."""
        return self._store.find(f"{self._root}/{folder}".rstrip("/"))

    def _read_manifest(self) -> Entries:
        try:
            content = self._store.cat_file(f"{self._root}/{MANIFEST}")
        except FileNotFoundError:  # a run before its first checkpoint
            return {}
        try:
            saved = json.loads(content)["checkpoints"]
            for name, entry in saved.items():
                _check_entry(name, entry)
            return saved
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{self.url}/{MANIFEST} is damaged ({reason}): restore a copy of it"
            ) from None

    def _download_files(self) -> None:
        """Copies the files that are not of a checkpoint. TensorBoard's are only written."""
        names = [path.removeprefix(f"{self._root}/") for path in self._find()]
        names = [name for name in names if "/" not in name and _is_plain(name)]
        if _CLAIM[-1] not in names:
            if not self._may_be_new:
                raise FileNotFoundError(self.url)
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was never uploaded
            return
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            if path.name not in (*names, ownership.FILE) and not path.name.startswith(CHECKPOINTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in names:
            object_store.copy_object(self._store, f"{self._root}/{name}", self.folder / name)

    def _download_checkpoints(self) -> None:
        """Copies the checkpoints that the local copy lacks, and deletes those of no manifest."""
        for kind in CHECKPOINTS:
            for path in (self.folder / kind).glob("*"):
                if f"{kind}/{path.name}" not in self._saved:
                    shutil.rmtree(path)
        damaged: dict[str, str] = {}
        for name, entry in self._saved.items():
            target = self.folder / name
            if _describe(target) == entry["files"]:
                continue
            shutil.rmtree(target, ignore_errors=True)
            try:
                self._download_checkpoint(entry, target)
            except _Damaged as error:
                damaged[name] = str(error)
        for name, reason in damaged.items():
            console.Log().say(f"skipping damaged checkpoint {self.url}/{name}: {reason}")
        last = [name for name in self._saved if name.startswith("checkpoints/")]
        if last and not set(last) - damaged.keys():
            raise InputError(
                f"no checkpoint in {self.url} can be read ({last[-1]}: {damaged[last[-1]]}): "
                "restore a copy or start in another workdir"
            )

    def _download_checkpoint(self, entry: dict[str, Any], target: pathlib.Path) -> None:
        with files.write_folder(target) as folder:

            def copy(name: str) -> None:
                source = f"{self._root}/{entry['folder']}/{name}"
                for _ in range(2):  # an error of the transfer may pass
                    if object_store.copy_object(self._store, source, folder / name) == sha[name]:
                        return
                raise _Damaged(f"{name} does not match its digest")

            sha = {name: digest for name, (_, digest) in entry["files"].items()}
            with futures.ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(copy, sha))

    def _upload_files(self) -> None:
        """Uploads the files that are not of a checkpoint, those of the claim first."""
        names = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}
        for name in (*_CLAIM, *sorted(names - {*_CLAIM})):
            path = self.folder / name
            if not _is_plain(name) or not path.is_file():
                continue
            version = path.stat().st_size, path.stat().st_mtime_ns
            if self._uploaded.get(name) != version:
                # Read at once, because logs grow.
                self._store.pipe_file(f"{self._root}/{name}", path.read_bytes())
                self._uploaded[name] = version

    def _upload_checkpoints(self) -> None:
        """Uploads new checkpoints, then the manifest, then deletes what it no longer names."""
        saved: Entries = {}
        for path in (path for kind in CHECKPOINTS for path in (self.folder / kind).glob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.name.isdigit():
                saved[name] = self._upload_checkpoint(name)
        if saved == self._saved:
            return
        content = json.dumps({"checkpoints": saved}, indent=2).encode()
        if self.owner:
            self.owner.check()
        self._store.pipe_file(f"{self._root}/{MANIFEST}", content)
        before, self._saved = self._saved, saved
        kept = {entry["folder"] for entry in saved.values()}
        for entry in before.values():
            if entry["folder"] not in kept:
                self._store.rm(f"{self._root}/{entry['folder']}", recursive=True)

    def _upload_checkpoint(self, name: str) -> dict[str, Any]:
        """Uploads a checkpoint unless the manifest names it; returns its entry."""
        described, entry = _describe(self.folder / name), self._saved.get(name)
        if entry and entry["files"] == described:
            return entry
        # One that replaces another of the same step must not touch its objects.
        text = json.dumps(described, sort_keys=True).encode()
        folder = f"{name}-{hashlib.sha256(text).hexdigest()[:8]}" if entry else name

        def put(file: str) -> None:
            self._store.put_file(str(self.folder / name / file), f"{self._root}/{folder}/{file}")

        with futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(put, described))
        return {"folder": folder, "files": described}


def _is_plain(name: str) -> bool:
    """Whether a file is neither of a checkpoint, nor the manifest, nor temporary."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name != MANIFEST and not name.startswith(CHECKPOINTS)


def _check_entry(name: str, entry: dict[str, Any]) -> None:
    """Checks an entry of a manifest, whose names become paths on this host and in the bucket.

    Raises:
      ValueError: a name is not that of a checkpoint or of a file in it, or a file has no size or
        digest. Entries of other types raise a KeyError, TypeError or AttributeError.
    """
    if not re.fullmatch(rf"({'|'.join(CHECKPOINTS)})/\d+", name):
        raise ValueError(f"{name!r} does not name a checkpoint")
    if not re.fullmatch(rf"{name}(-[0-9a-f]{{8}})?", entry["folder"]):
        raise ValueError(f"{entry['folder']!r} is not a folder of {name}")
    for file, (size, digest) in entry["files"].items():
        if not isinstance(size, int) or not isinstance(digest, str):
            raise ValueError(f"{name}/{file} has no size and digest")
        if file.startswith("/") or {"", ".", ".."} & set(file.split("/")):
            raise ValueError(f"{file!r} is not below {name}")


def _describe(folder: pathlib.Path) -> dict[str, list[Any]]:
    """{file: [size, SHA-256]} of all files in a folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local(url: str, kind: str) -> pathlib.Path:
    """The folder of a local copy; it has the name of the workdir."""
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return object_store.cache() / kind / digest / pathlib.PurePosixPath(url).name


@contextlib.contextmanager
def opened(url: str, command: str) -> Iterator[Copy]:
    """Owns a workdir in an object store within the block and yields its local copy.

    The copy is uploaded at the end of the block, unless it fails. A collective if there are several
    processes.

    Args:
      url: of the workdir.
      command: that owns it, for messages: "maknet train".

    Raises:
      InputError: the bucket cannot be read or written, another command owns it, or it holds
        something else.
    """
    index = jax.process_index()
    folder = _local(url, f"workdirs-{index}" if index else "workdirs")
    copy = Copy(url, folder, may_be_new=True)
    with contextlib.ExitStack() as stack:
        problem = ""
        try:
            copy.check_free()
            if index == 0:
                stack.enter_context(copy.owned(command))
        except InputError as error:
            problem = str(error)
        claim.raise_any(problem)
        owner = sharding.exchange(copy.owner.token if copy.owner else None)[0]
        try:
            if copy.read_token() != owner:
                raise InputError(
                    f"process {index} on {socket.gethostname()} does not see the objects of "
                    f"process 0 in {url}: all processes need the same endpoint"
                )
            copy.download()
            if index == 0:
                copy.clean()
        except InputError as error:
            problem = str(error)
        claim.raise_any(problem)
        try:
            yield copy
        except Stopped:
            copy.upload()
            raise
        copy.upload()


def view(url: str) -> pathlib.Path:
    """A local copy of a workdir in an object store, for reading; one command at a time updates it.

    Raises:
      InputError: the bucket cannot be read, or it holds no run.
    """
    folder = _local(url, "runs")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Copy(url, folder).download()
    return folder
