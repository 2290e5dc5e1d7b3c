"""Errors and signals become one line on standard error and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from maknet_jax.cli.options import BAD_INPUT, DONE, STOPPED, show
from maknet_jax.errors import ADVICE, InputError, OutputExists, Stopped
from maknet_jax.runs import stopping

if TYPE_CHECKING:
    from maknet_jax.runs.peers import Peers


def exit_code(
    prog: str,
    work: Callable[[], int | None],
    *,
    seconds: float | None = None,
    final: bool = False,
) -> int:
    """Runs `work` and returns the exit code of the process.

    One of several processes that fails ends here instead: JAX would wait for all others first.

    Args:
      prog: the name of the command, at the start of the line that reports an error.
      work: returns an exit code; None means `DONE`.
      seconds: `work` is stopped after them, as by a signal.
      final: the process ends with this code: signals no longer matter after the first.
    """
    unexpected = False
    try:
        with stopping.raising_signals(final=final), stopping.time_limit(seconds):
            code = work() or DONE
            if others := _others():
                others.leave(code)
            return code
    except Stopped as error:
        message, code = f"stopped: {error}", STOPPED
    except Exception as error:
        described = _describe(error)
        unexpected = described is None
        if unexpected and not _others():
            raise
        failed = traceback.format_exc()
        message, code = described or (f"{type(error).__name__}: {error}", BAD_INPUT)
    others = _others()
    if others:
        ended, text = others.conclude(
            code, message.removeprefix("stopped: "), unexpected=unexpected
        )
        if unexpected and others.verdict is None:
            sys.stderr.write(failed)  # an error of our own
        message, code = f"{'stopped: ' if ended == STOPPED else ''}{text}", ended
    show(" ".join(f"{prog}: {message}".split("\n")), error=True)
    if others:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


def _others() -> "Peers | None":
    """The other processes of `--distributed`; without it JAX is not imported for the question."""
    peers = sys.modules.get("maknet_jax.runs.peers")
    return peers.current() if peers else None


def _describe(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of an expected error; None for others."""
    if isinstance(error, OutputExists):
        return error.command_message, BAD_INPUT
    if isinstance(error, InputError):
        return str(error), BAD_INPUT
    if isinstance(error, OSError) and error.errno is not None:  # a full disk, a missing permission
        name = f"{error.filename}: " if error.filename is not None else ""
        advice = f": {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        return f"{name}{error.strerror}{advice}", BAD_INPUT
    return None
