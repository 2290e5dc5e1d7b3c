"""Workarounds for Orbax: paths that it takes for patterns, and what its threads log."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from maknet_jax import files
from maknet_jax.errors import InputError

PAUSE = 0.2  # seconds in which most threads of a failed save end


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps log lines and tracebacks of Orbax's threads off the terminal; its error is raised.

    After a failure, threads that write other arrays still report theirs, long after the block.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def unless_closed(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    logger.addFilter(_drop)
    sys.unraisablehook = unless_closed
    try:
        yield
    except BaseException:  # most threads end within the pause; for the others both stay in place
        time.sleep(PAUSE)
        raise
    logger.removeFilter(_drop)
    sys.unraisablehook = hook


def _drop(_: logging.LogRecord) -> bool:
    return False


def check_path(folder: str | os.PathLike[str]) -> None:
    """Checks that Orbax can write checkpoints below a folder.

    Raises:
      InputError: the path contains a character of a pattern. Orbax searches its files by pattern,
        misses those below such a folder, and writes checkpoints that cannot be read.
    """
    files.check_local(folder)
    path = os.path.abspath(folder)
    if wrong := sorted(set(path) & set("[*?")):
        raise InputError(
            f"checkpoints below {path} could not be read, because its path contains "
            f"{' '.join(wrong)}: choose a folder without [ * ? in its whole path"
        )
