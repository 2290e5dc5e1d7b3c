"""Errors and signals become one line on standard error and an exit code."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from maknet_jax.cli.options import BAD_INPUT, DONE, STOPPED, show
from maknet_jax.errors import ADVICE, InputError, OutputExists, Stopped


def exit_code(prog: str, work: Callable[[], int | None]) -> int:
    """Runs `work` and returns the exit code of the process.

    Args:
      prog: the name of the command, at the start of the line that reports an error.
      work: returns an exit code; None means `DONE`.
    """
    try:
        with _signals_raise():
            return work() or DONE
    except InputError as error:
        message = error.command_message if isinstance(error, OutputExists) else str(error)
        code = BAD_INPUT
    except Stopped as error:
        message, code = f"stopped: {error}", STOPPED
    except OSError as error:  # a full disk, a missing permission
        if error.errno is None:
            raise
        name = f"{error.filename}: " if error.filename is not None else ""
        advice = f": {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        message, code = f"{name}{error.strerror}{advice}", BAD_INPUT
    show(" ".join(f"{prog}: {message}".split("\n")), error=True)
    return code


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise `Stopped`; `train` installs its own handlers."""
    received: list[int] = []
    handlers = {}
    unraisable_hook = sys.unraisablehook

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)  # the message names the first; later ones only repeat it
        raise Stopped(f"{signal.Signals(received[0]).name}; run the same command again to resume")

    def raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
        # Python drops an exception raised within a __del__: raise it again after it returns.
        if unraisable.exc_type is Stopped:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            unraisable_hook(unraisable)

    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            handlers[number] = signal.signal(number, stop)
        sys.unraisablehook = raise_again
    try:
        yield
    finally:
        # A pending alarm without a handler would kill the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = unraisable_hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
