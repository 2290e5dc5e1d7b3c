"""The command line: `maknet VERB`. Each verb is a Python function; these files only read options.

Exit codes: 0 done; 2 bad arguments or input (one line says which); 3 done, but some inputs were
rejected (`failures.csv`); 75 stopped by a signal, the same command goes on.
"""

import contextlib
import os
import signal
import sys

import maknet_jax
from maknet_jax.cli import data, explain, inference, lesions, students, training
from maknet_jax.cli.options import Parser, exit_code
from maknet_jax.errors import Stopped


def main(argv=None):
    """Runs one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    changes = [text for text in rest if text.startswith("--config.") and "=" in text]
    strange = [text for text in rest if not options.takes_config or text not in changes]
    if strange:
        hint = ": write --config.FIELD=VALUE" if strange[0].startswith("--config.") else ""
        parser.error(f"unknown argument {strange[0]!r}{hint}")
    options.overrides = [text.removeprefix("--config.") for text in changes]
    # XLA and grain log through absl and C++: a user's lines should not drown in theirs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    def work():
        with _signals_stop():
            return options.run(options)

    return exit_code("maknet", work)


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


def _parser():
    parser = Parser(
        prog="maknet",
        description="Train networks that label body parts on CT. Research software, not a medical "
        "device.",
        epilog="example: maknet demo --out /tmp/maknet-demo",
    )
    parser.add_argument("--version", action="version", version=maknet_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for stage in (data, training, students, inference, explain, lesions):
        stage.add_verbs(verbs)
    return parser
