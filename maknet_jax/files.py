"""Files that are written whole or not at all."""

import contextlib
import errno
import json
import os
import pathlib
import tempfile


@contextlib.contextmanager
def write_whole(path, mode="w", *, private=False):
    """Opens a temporary file beside `path` that takes its name only when the block ends well.

    Args:
      path: the final name; its folder is made.
      mode: "w" (UTF-8 text) or "wb".
      private: only the owner may read the file; else permissions obey the umask.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    try:
        handle, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    except OSError as error:  # the user knows no temporary name
        raise type(error)(error.errno, error.strerror, str(path)) from None
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else ""
    try:
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:  # mkstemp makes files that only their owner reads
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def holds_other(folder, *own):
    """Whether there is more at `folder` than an empty folder, `own` files and what kills left.

    A writer that was killed leaves a hidden temporary file; it says nothing and is no one's.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return folder.exists()
    return any(
        path.name not in own and not (path.name[0] == "." and path.suffix == ".tmp")
        for path in folder.iterdir()
    )


def write_json(path, value):
    """Writes `value` as indented JSON, whole or not at all. NaN is refused (it is not JSON)."""
    with write_whole(path) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path):
    """Reads a JSON file."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
