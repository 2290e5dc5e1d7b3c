"""Shared by the commands: exit codes, the parser, common options and the start of JAX."""

import argparse
import contextlib
import csv
import ctypes
import inspect
import itertools
import math
import os
import pathlib
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from maknet_jax import files
from maknet_jax.errors import did_you_mean

OVERRIDES = ("assume_hu", "allow_lossy")  # stored by `override_options`
_FILES = (".csv", ".json", ".html", ".npz", ".png", ".zip")  # endings that no output folder has
ACCELERATORS = ("accel*", "nvidia[0-9]*", "kfd", "vfio/[0-9]*")  # in /dev: TPUs and GPUs
DONE, BAD_INPUT, SOME_REJECTED, STOPPED = 0, 2, 3, 75


class Parser(argparse.ArgumentParser):
    """Reports an error in one line and exits with code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reports unknown options first: an error about a missing one would hide the typo."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is not None:
            return super().parse_known_args(words, namespace)
        self._check_options(words)
        chosen, unparsed = super().parse_known_args(words, namespace)
        extra = [word for word in unparsed if word != "--"]
        if extra and not extra[0].startswith("-") and not self.get_default("takes_config"):
            self._reject_extra(extra[0], chosen)
        return chosen, unparsed

    def _reject_extra(self, word: str, chosen: argparse.Namespace) -> NoReturn:
        """Reports a superfluous positional argument; a command declares at most one."""
        action = next(iter(self._get_positional_actions()), None)
        if action is None:
            expected = "the command takes options only; separate the values of one by commas"
        elif action.nargs is not None:
            expected = (
                f"write all values of {action.dest} together, without options between them, and "
                "separate the values of an option by commas"
            )
        else:
            several = self.get_default("several") or ""
            out = ", with another --out" * hasattr(chosen, "out")
            expected = (
                f"expected one {action.dest}, which is {getattr(chosen, action.dest)!r}: "
                f"{several}run the command once for each{out}"
            )
        self.error(f"unexpected argument {word!r}: {expected}")

    def _check_options(self, words: Sequence[str]) -> None:
        """Reports an unknown option; fields of a config, if it takes them, are checked later."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if not name.startswith("--") or " " in name or name in known:
                continue
            if name.startswith("--config.") and self.get_default("takes_config") is not False:
                continue
            hint = did_you_mean(name, known, likeness=0.6)
            self.error(f"unknown option {word!r}{f': {hint}' if hint else ''}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Names the choices that are nearest to an unknown value; argparse calls it."""
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is unknown: {hint}")

    def error(self, message: str) -> NoReturn:
        """Prints the message in one line and exits."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


# Options that may be a URL: a data set, a workdir that is read, and what is not a path.
_MAY_BE_URL = {"data", "records", "model"}
_MAY_BE_URL |= {"citation", "ids", "licence", "license_name", "name", "overrides", "scheduler"}
_MAY_BE_URL |= {"source"}


def check_paths(chosen: argparse.Namespace) -> None:
    """Checks that no option is a URL, before anything is read or written.

    Raises:
      InputError: one is; object stores are not supported there.
    """
    allowed = _MAY_BE_URL | getattr(chosen, "may_be_url", set())
    for name, value in vars(chosen).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name not in allowed:
                files.check_local(text.partition("=")[2] or text)  # SPLIT=DIR


def selected(chosen: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the parsed options by name, as keyword arguments of a verb."""
    return {name: getattr(chosen, name) for name in names}


def show(text: str, *, error: bool = False) -> None:
    """Prints text on standard output or error; names in it cannot send control characters."""
    lines = map(files.printable, text.split("\n"))
    print("\n".join(lines), file=sys.stderr if error else sys.stdout)


def config_changes(
    parser: argparse.ArgumentParser,
    unparsed: Sequence[str],
    reserved: Mapping[str, str] | None = None,
) -> list[str]:
    """The config changes, FIELD=VALUE each, among the arguments that a parser did not consume.

    Args:
      parser: reports errors.
      unparsed: the remaining arguments; anything but --config.FIELD=VALUE is an error.
      reserved: field -> the option to use instead, for fields that the command sets.
    """
    changes = [text.removeprefix("--config.") for text in unparsed]
    for text, change in zip(unparsed, changes, strict=True):
        field, equals, _ = change.partition("=")
        if text == change or not equals:
            parser.error(f"unknown argument {text!r}: a config field is --config.FIELD=VALUE")
        for name, instead in (reserved or {}).items():
            if f"{field}.".startswith(f"{name}."):
                parser.error(f"{text!r} is set by this command: {instead}")
    return changes


def verb(
    verbs: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    takes_config: bool = False,
) -> argparse.ArgumentParser:
    """Adds a verb.

    Args:
      verbs: the parsers of all verbs.
      name: the name of the verb.
      run: called with the parsed options; returns the exit code, or None for `DONE`. Its docstring
        is the help: one paragraph, then an indented example.
      takes_config: whether --config.FIELD=VALUE is allowed.
    """
    text, _, example = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
    text = " ".join(text.split())
    verb = verbs.add_parser(
        name,
        help=text[:1].lower() + text[1:].removesuffix("."),  # python -OO has no docstrings
        description=textwrap.fill(text, 79),
        epilog=f"example:\n{textwrap.indent(textwrap.dedent(example), '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run, takes_config=takes_config)
    return verb


def model(verb: argparse.ArgumentParser, text: str = "the trained network") -> None:
    """Adds --model and its older name --workdir; the value is stored as `model`."""
    verb.add_argument(
        "--model",
        "--workdir",
        required=True,
        help=f"{text}: a workdir of `maknet train` or its s3:// URL, a bundle (folder or .zip) of "
        "`maknet export`, "
        "or the name of a released model",
    )


def png_window(verb: argparse.ArgumentParser) -> None:
    """Adds --png-window."""
    verb.add_argument(
        "--png-window",
        type=window,
        metavar="LOW,HIGH",
        help="HU of pixel values 0 and 255 in 8-bit PNGs, as in --png-window=-175,275",
    )


def pseudonyms(verb: argparse.ArgumentParser) -> None:
    """Adds --pseudonyms and --salt-file."""
    verb.add_argument(
        "--pseudonyms",
        action="store_true",
        help="write pseudonyms instead of the names of series, files and patients",
    )
    verb.add_argument(
        "--salt-file",
        help="secret key that turns UIDs into ids, created if absent "
        "(default: ~/.config/maknet/salt)",
    )


def scheduler(verb: argparse.ArgumentParser) -> None:
    """Adds --scheduler."""
    verb.add_argument(
        "--scheduler",
        metavar="tcp://HOST:8786",
        help="use the workers of this Dask scheduler instead of processes here; they must see the "
        "same files under the same paths (extra `dask`)",
    )


def override_options(verb: argparse.ArgumentParser, *, dicom: bool = True) -> None:
    """Adds --assume-hu and, where DICOM is read, --allow-lossy."""
    verb.add_argument(
        "--assume-hu",
        action="store_true",
        help="read values as Hounsfield units even if they do not look like it; recorded",
    )
    verb.set_defaults(allow_lossy=False)
    if dicom:
        verb.add_argument(
            "--allow-lossy",
            action="store_true",
            help="read DICOM with lossy compression, which does not preserve HU; recorded",
        )


def checkpoint(verb: argparse.ArgumentParser) -> None:
    """Adds --checkpoint."""
    verb.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="the best one by validation AUC, or the last one (default: best)",
    )


def words(text: str) -> list[str] | None:
    """The type of WORD,WORD,...; None for an empty text. A word with a comma may be quoted."""
    rows = list(csv.reader([text], skipinitialspace=True))
    return [word.strip() for word in rows[0]] if rows and rows[0] else None


def window(text: str) -> tuple[float, float]:
    """The type of LOW,HIGH in HU."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} should be LOW,HIGH in HU, as in -175,275"
        ) from None
    if not -math.inf < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: LOW and HIGH should be finite, LOW below HIGH")
    return low, high


def shares(text: str) -> dict[str, float]:
    """The type of SPLIT=SHARE,..."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(share) for name, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} should be SPLIT=SHARE,..., as in train=0.8,val=0.2"
        ) from None


def folder(text: str) -> str:
    """The type of output folders: rejects the names of files."""
    path = pathlib.Path(text)
    if path.is_dir():
        return text
    if path.exists():
        raise argparse.ArgumentTypeError(f"{text} is a file: pass the name of a folder")
    if path.suffix.lower() in _FILES:
        also = "; `export --zip` also writes the .zip" if path.suffix.lower() == ".zip" else ""
        raise argparse.ArgumentTypeError(
            f"{text} is the name of a file, but a folder is written: pass {path.with_suffix('')}"
            f"{also}"
        )
    return text


def count(text: str) -> int:
    """The type of positive integers."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a positive integer")
    return int(text)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(verb: argparse.ArgumentParser) -> None:
    """Adds --distributed with its limits, and --stop-after."""
    verb.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes: detects TPU pods, Slurm, Open MPI and Kubernetes; "
        "elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    verb.add_argument(
        "--heartbeat",
        type=duration,
        default=15.0,
        metavar="TIME",
        help="with --distributed: a process that is silent for this long is lost, and all others "
        "end (default: 15s)",
    )
    verb.add_argument(
        "--start-timeout",
        type=duration,
        default=300.0,
        metavar="TIME",
        help="with --distributed: wait this long for all processes to start (default: 5m)",
    )
    verb.add_argument(
        "--stop-after",
        type=duration,
        metavar="TIME",
        help="stop after this time as at a signal, exit code 75, as in --stop-after 11h50m",
    )


def duration(text: str) -> float:
    """The type of times such as 11h50m, 90s or 2d; in seconds."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    parts = [float(part or 0) for part in found.groups()] if found else []
    seconds = sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} should be a time such as 11h50m, 90s or 2d")
    return seconds


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, on hosts without an accelerator, to train faster.

    XLA allocates the temporary arrays of a step at each call. By default glibc returns blocks of
    that size to the kernel, which clears every page of the next one: a third of the CPU time of
    MAKNet's training step. Prediction of small batches was slower with it
    (`benchmarks/RESULTS.md`). Values in the environment have precedence.
    """
    if any(next(pathlib.Path("/dev").glob(pattern), None) for pattern in ACCELERATORS):
        return
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    # malloc.h: trim threshold (-1: never), top pad, blocks from mmap, arenas. Large blocks of other
    # arenas than the main one would come from mmap all the same.
    for parameter, value in ((-1, -1), (-2, 64 << 20), (-4, 0), (-8, 1)):
        mallopt(parameter, value)


def start_jax(chosen: argparse.Namespace | None = None) -> None:
    """Starts JAX with the compilation cache on.

    Args:
      chosen: the options of `processes`; None runs a single process.

    Raises:
      InputError: the environment does not say which process this is.
    """
    import jax

    if chosen is not None and chosen.distributed:
        from maknet_jax.runs import peers

        peers.start(chosen.heartbeat, chosen.start_timeout)
    elif chosen is not None and os.environ.get("SLURM_NTASKS", "1") != "1":
        show(
            f"maknet: SLURM_NTASKS is {os.environ['SLURM_NTASKS']}, but --distributed is missing: "
            "every task does all the work",
            error=True,
        )
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maknet" / "xla"
        with contextlib.suppress(RuntimeError):  # no home folder: programs are compiled each time
            jax.config.update("jax_compilation_cache_dir", str(cache.expanduser()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # default: 1 s
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
