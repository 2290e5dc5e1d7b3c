"""What the commands share: exit codes, the parser, types of options, the start of JAX."""

import argparse
import math
import os
import pathlib

from maknet_jax.errors import InputError

DONE, BAD_INPUT, SOME_REJECTED, STOPPED = 0, 2, 3, 75


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        """Says what is wrong in one line."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def config_changes(parser, rest, own=None):
    """The changes of a config page, FIELD=VALUE each, among the arguments that a parser left over.

    Args:
      parser: says what is wrong.
      rest: what it left over; anything but --config.FIELD=VALUE is an error.
      own: field -> what to write in its place, for fields that the caller sets.
    """
    changes = [text.removeprefix("--config.") for text in rest]
    for text, change in zip(rest, changes, strict=True):
        field, equals, _ = change.partition("=")
        if text == change or not equals:
            parser.error(f"unknown argument {text!r}: a config field is --config.FIELD=VALUE")
        for name, instead in (own or {}).items():
            if f"{field}.".startswith(f"{name}."):
                parser.error(f"{text!r} is set here already: {instead}")
    return changes


def verb(verbs, name, text, example, run, *, takes_config=False):
    """Adds a verb that calls `run(parsed options)`; with an example under its help."""
    verb = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run, takes_config=takes_config)
    return verb


def png_window(verb):
    """Adds --png-window."""
    verb.add_argument(
        "--png-window",
        type=window,
        metavar="LOW,HIGH",
        help="HU that 0 and 255 of 8-bit PNGs mean, as --png-window=-175,275",
    )


def window(text):
    """The type of LOW,HIGH in HU."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be LOW,HIGH in HU") from None
    if not -math.inf < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: LOW should be below HIGH, both finite")
    return low, high


def count(text):
    """The type of whole numbers from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number from 1 on")
    return int(text)


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def distributed(verb):
    """Adds --distributed."""
    verb.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes: TPU pods, Slurm, Open MPI and Kubernetes are "
        "found; else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which",
    )


def start_jax(distributed=False):
    """Joins the other processes if asked to, and keeps compiled programs between runs."""
    import jax

    if distributed:
        try:
            given = {
                name: int(os.environ[f"JAX_{name.upper()}"])
                for name in ("num_processes", "process_id")
                if f"JAX_{name.upper()}" in os.environ
            }
            jax.distributed.initialize(**given)
        except ValueError as error:
            raise InputError(
                f"--distributed: {error}: set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
                "and JAX_PROCESS_ID"
            ) from None
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maknet" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache.expanduser()))
