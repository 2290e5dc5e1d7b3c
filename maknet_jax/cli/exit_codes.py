"""How a command ends: errors and signals are one line on stderr and an exit code."""

import contextlib
import signal
import sys

from maknet_jax.cli.options import BAD_INPUT, DONE, STOPPED
from maknet_jax.errors import InputError, Stopped


def exit_code(prog, work):
    """Calls `work()`, which may return an exit code of its own; `prog` says what went wrong."""
    try:
        with _signals_stop():
            return work() or DONE
    except InputError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return BAD_INPUT
    except Stopped as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{prog}: {error.filename}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT


@contextlib.contextmanager
def _signals_stop():
    # `train` catches the signals itself, to save between two steps.
    def stop(number, _):
        caught.append(number)  # the first one is the user's, others only repeat it
        raise Stopped(f"{signal.Signals(caught[0]).name}; run the same command again")

    def again(unraisable):
        # Raised within a __del__ it was lost there: it comes again as soon as that is over.
        if unraisable.exc_type is Stopped:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(unraisable)

    caught, before, hook = [], {}, sys.unraisablehook
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            before[number] = signal.signal(number, stop)
        sys.unraisablehook = again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # its handler goes: what is due would kill
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
