"""Data sets on s3:// and gs://: copied to a local cache through fsspec, and checked there.

    CACHE/NAME-FINGERPRINT/dataset.json and the shards that were needed

CACHE is $MAKNET_CACHE or ~/.cache/maknet/data. A shard is in the cache only if its records matched
their digest after the copy. A changed data set has another fingerprint and so another folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

from maknet_jax import files
from maknet_jax.data.examples import RecordSource
from maknet_jax.errors import InputError, installing

SCHEMES = ("s3", "gs")
_THREADS = 8  # shards that are copied at once


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a data set can be copied from there."""
    scheme, separator, _ = os.fspath(path).partition("://")
    return bool(separator) and scheme in SCHEMES


def cache() -> pathlib.Path:
    """The folder of all copies."""
    if folder := os.environ.get("MAKNET_CACHE"):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maknet/data"


def copy_description(url: str) -> pathlib.Path:
    """Copies `dataset.json`; returns the folder of the data set in the cache.

    Raises:
      InputError: there is none, or the object store cannot be read.
    """
    filesystem, root = open_store(url)
    with one_line(url):
        content = filesystem.cat_file(f"{root}/dataset.json")
    try:
        info = json.loads(content)
        fingerprint = hashlib.sha256(str(info["fingerprint"]).encode()).hexdigest()[:16]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{url}/dataset.json is damaged ({error}): copy it again") from None
    folder = cache() / f"{pathlib.PurePosixPath(root).name}-{fingerprint}"
    with files.write_whole(folder / "dataset.json", "wb") as file:
        file.write(content)
    return folder


def copy_shards(url: str, folder: pathlib.Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Copies the shards that are not in the cache yet.

    Args:
      url: of the data set.
      folder: of the data set in the cache.
      shards: entries of `dataset.json`.

    Raises:
      InputError: a shard cannot be read, or its records do not match their digest.
    """
    missing = [shard for shard in shards if not (folder / shard["file"]).is_file()]
    if not missing:
        return
    filesystem, root = open_store(url)

    def copy(shard: Mapping[str, Any]) -> None:
        with one_line(f"{url}/{shard['file']}"):
            _copy_shard(filesystem, f"{root}/{shard['file']}", folder / shard["file"], shard)

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, missing))


def copy_object(store: Any, source: str, target: pathlib.Path) -> str:
    """Copies an object to a file, atomically; returns the SHA-256 of its bytes.

    Args:
      store: see `open_store`.
      source: the path of the object in it.
      target: the file; its folder is created.

    Raises:
      OSError: the disk is full, for example; its `filename` is `target`.
      Exception: the object store cannot be read, see `one_line`.
    """
    digest = hashlib.sha256()
    with files.write_whole(target, "wb") as file, store.open(source, "rb") as remote:
        while part := remote.read(1 << 20):
            with files.naming(target):
                file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _copy_shard(store: Any, source: str, target: pathlib.Path, shard: Mapping[str, Any]) -> None:
    """Copies a shard, which appears under its name only if its records match their digest."""
    unchecked = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        copy_object(store, source, unchecked)
        try:
            actual = _digest(unchecked)
        except InputError as error:  # names the copy, not the object
            raise ValueError(str(error)) from None
        if actual != shard.get("digest", actual):
            raise ValueError("its records do not match their digest: copy the data set again")
        unchecked.replace(target)
    except OSError as error:
        if error.filename == str(unchecked):
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise
    finally:
        unchecked.unlink(missing_ok=True)


def _digest(path: pathlib.Path) -> str:
    """SHA-256 over the records of a shard, as `shard_files.write_shard` returns it."""
    source, digest = RecordSource([path]), hashlib.sha256()
    for number in range(len(source)):
        digest.update(hashlib.sha256(source.payload(number)).digest())
    source.close()
    return digest.hexdigest()


def open_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
      InputError: its package is not installed, or the URL is malformed.
    """
    import fsspec  # slow to import, and only needed here

    with one_line(url):
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return filesystem, root.rstrip("/")


@contextlib.contextmanager
def one_line(
    url: str, missing: str = "does not exist, or is not a finished data set"
) -> Iterator[None]:
    """Turns the errors of an object store, of any type, into one line that names the URL.

    Args:
      url: of the object.
      missing: the message if the object or the bucket does not exist.

    Raises:
      InputError: in place of any error but those of local files.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{url} needs a package that is not installed ({error}): {installing('cloud')}; for "
            "gs:// also gcsfs"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{url} {missing}") from None
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and str(error.filename).startswith(str(cache())):
            raise  # a full disk, for example
        raise InputError(f"{url}: {' '.join(str(error).split())[:300]}") from None
