"""What signals do: they interrupt a command, or are noted while a loop must save its state."""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from maknet_jax import console
from maknet_jax.errors import STOP_SIGNALS, InputError, Stopped

AGAIN = "run the same command to resume"
_reasons: list[str] = []  # of `request`, instead of a signal from outside
_noting = 0  # number of active `noted_signals`
_handling = 0  # number of active `_handlers`


def request(reason: str) -> None:
    """Stops the command as a signal does, unless it has ended; any thread may call it.

    Args:
      reason: replaces the name of the signal in the message.
    """
    if not _handling:
        return
    _reasons.append(reason.removesuffix(f"; {AGAIN}"))
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)


def is_noting() -> bool:
    """Whether a loop notes signals at the moment, to save its state."""
    return _noting > 0


@contextlib.contextmanager
def _handlers(handler: Any, *, final: bool = False) -> Iterator[None]:
    """Installs `handler` for all `STOP_SIGNALS`; does nothing outside of the main thread."""
    global _handling
    before = {}
    with contextlib.suppress(ValueError):
        for number in STOP_SIGNALS:
            # `nohup` ignores SIGHUP, and the command must survive the end of its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    ignored = False
    _handling += bool(before)
    try:
        yield
    except Stopped:
        ignored = final
        raise
    finally:
        _handling -= bool(before)
        for number, previous in before.items():
            signal.signal(number, signal.SIG_IGN if ignored else previous)


@contextlib.contextmanager
def raising_signals(*, final: bool = False) -> Iterator[None]:
    """Within the block each of `STOP_SIGNALS` raises `Stopped`.

    Signals that arrive while the exception propagates are ignored: they must not interrupt the
    clean-up. Should the exception be lost in the code that it interrupted, the next one raises it.
    Compiled code may make another exception of it, which becomes `Stopped` again. A signal during
    an import waits for its end: an exception in the midst of that of jaxlib aborts the process.

    Args:
      final: the process ends after the block: after a `Stopped`, signals stay ignored.
    """
    names: list[str] = []
    outside = _imports(sys._getframe())
    unraisable_hook = sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_propagating():
            return
        names.append(signal.Signals(number).name)  # the message names the first
        if _imports(frame) > outside:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise Stopped(f"{(_reasons or names)[0]}; {AGAIN}")

    def raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
        # Python drops an exception raised within a __del__: raise it again after it returns.
        if unraisable.exc_type is Stopped:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            unraisable_hook(unraisable)

    alarm = None
    _reasons.clear()
    with contextlib.suppress(ValueError):  # not in the main thread
        alarm = signal.signal(signal.SIGALRM, stop)
        sys.unraisablehook = raise_again
    try:
        with _handlers(stop, final=final):
            try:
                yield
            except Exception as error:
                stopped = _stopped_before(error)
                if stopped is None or isinstance(error, (OSError, InputError)):
                    raise
                raise stopped from None
    finally:
        sys.unraisablehook = unraisable_hook
        if alarm is not None:
            # A pending alarm without a handler would kill the process.
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)


def _imports(frame: FrameType | None) -> int:
    """The number of frames of imports among a frame and its callers."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count


def _is_propagating() -> bool:
    """Whether the interrupted code runs because of a `Stopped`, as clean-up does."""
    return _stopped_before(sys.exception()) is not None


def _stopped_before(error: BaseException | None) -> Stopped | None:
    """The `Stopped` that led to an exception, or is it."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yields a list to which signals append; a loop checks it between steps.

    At the end of the block a signal that came too late for the loop is raised for the caller.
    """
    global _noting
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if not caught:
            reason = "".join(f"{reason}: " for reason in _reasons[:1])
            console.say_from_signal(f"{reason}stopping after this step; its state will be saved")
        caught.append(number)

    _noting += 1
    try:
        with _handlers(note):
            yield caught
    finally:
        _noting -= 1
    if caught:
        signal.raise_signal(caught[0])


@contextlib.contextmanager
def timer(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Calls a function in another thread if the block takes longer than `seconds`."""
    waiting = threading.Timer(seconds, call)
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Stops the command after `seconds` as a signal does; None sets no limit."""
    if seconds is None:
        yield
        return
    reason = f"the time limit of {seconds:.10g} s has passed"
    with timer(seconds, functools.partial(request, reason)):
        yield
