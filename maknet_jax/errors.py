"""Exceptions for bad input and for a run that a signal stops; hints for misspelt names."""

import collections
import errno
import os
import signal
import sys
from collections.abc import Iterable, Sequence

# What to do about an error of the operating system, after its text.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the command again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise `ulimit -n` or run fewer processes"),
}
NO_HANDLES = (errno.EMFILE, errno.ENFILE)
# Errors that say nothing about the content of a file.
_SYSTEM = {*ADVICE, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE}

# Signals that stop a command. Slurm sends SIGUSR1 or SIGUSR2, a terminal that closes SIGHUP.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
)


def installing(extra: str) -> str:
    """How to install an extra of this package, for an error: it may come from a clone."""
    return f"pip install 'maknet-jax[{extra}]', or '.[{extra}]' in a clone"


class InputError(ValueError):
    """Bad arguments or input; the command prints the message and exits with code 2.

    The message is one line: the value, what is expected, and what to do.
    """


class OutputExists(InputError):
    """An output exists and would be overwritten.

    Attributes:
      command_message: the message in the words of the command line; the text of the exception is
        in those of Python.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Args: path: the output."""
        problem = f"{os.fspath(path)} exists: choose another name or "
        super().__init__(f"{problem}pass overwrite=True")
        self.command_message = f"{problem}add --overwrite"


class NothingUsable(InputError):
    """Every input was rejected; the message counts the most frequent reasons.

    Attributes:
      problem: the first part of the message.
      failures: (input, reason) pairs for `failures.csv`.
    """

    def __init__(self, problem: str, failures: Sequence[tuple[str, str]], most: int = 3) -> None:
        """Args: problem: the first part of the message; most: the number of reasons in it."""
        counts = collections.Counter(reason for _, reason in failures).most_common(most)
        others = len(failures) - sum(count for _, count in counts)
        first = {reason: path for path, reason in reversed(failures)}
        reasons = [
            f"{reason} ({count} inputs)" if count > 1 else f"{first[reason]}: {reason}"
            for reason, count in counts
        ]
        reasons += [f"and {others} others"] if others else []
        super().__init__(problem + (f": {'; '.join(reasons)}" if reasons else ""))
        self.problem, self.failures = problem, tuple(failures)


class Rejected(ValueError):
    """One input (a file, a series, a row) is rejected; the others are processed, exit code 3.

    The message is the reason in `failures.csv`. No input is rejected because this process has too
    many open files: in the handler of such an error, this raises the error itself.
    """

    def __init__(self, *args: object) -> None:
        """Args: args: the reason."""
        handled = sys.exception()
        while handled is not None:
            if isinstance(handled, OSError) and handled.errno in NO_HANDLES:
                raise handled
            handled = handled.__cause__ or handled.__context__
        super().__init__(*args)


class Stopped(BaseException):
    """A signal ended the run after its state was saved; the same command resumes. Exit code 75.

    Derives from BaseException, like KeyboardInterrupt: readers turn any Exception into a rejected
    file, and a signal that arrives while they read must not be reported as a rejected file.
    """


def system_error(error: BaseException, path: str | os.PathLike[str]) -> OSError | None:
    """The error of the operating system behind an exception, or None: a full disk is not damage.

    ArrayRecord, TensorStore and safetensors raise RuntimeError or ValueError with the text of the
    error in it, such as "open() failed: Too many open files; opening /x".

    Args:
      error: raised while a file was read or written.
      path: the file or its folder.
    """
    text = " ".join(str(error).split())
    named = text.partition("failed: ")[2].partition(";")[0]
    code = next((code for code in errno.errorcode if os.strerror(code) == named), None)
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        code = error.errno
    elif code is None:
        code = next((code for code in _SYSTEM if os.strerror(code) in text), None)
    if code is None:
        return None
    return OSError(code, os.strerror(code), os.fspath(path))


def did_you_mean(name: str, known: Iterable[str], *, likeness: float = 0) -> str:
    """A hint for an error: the three known names that are nearest to `name`.

    >>> did_you_mean("livr", ["liver", "left lung", "spleen", "lumbar spine"])
    "did you mean 'liver', 'lumbar spine' or 'spleen'?"
    >>> did_you_mean("livr", ["liver", "left lung", "spleen", "lumbar spine"], likeness=0.6)
    "did you mean 'liver'?"

    Args:
      name: the unknown name.
      known: the names to choose from.
      likeness: leave out names that are less alike, from 0 (none) to 1; "" if none is left.
    """
    import difflib  # only errors need it

    by_lower_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=likeness)
    if likeness and not near:
        return ""
    if not near:
        return "there are no names to choose from."
    quoted = [repr(by_lower_case[each]) for each in near]
    *first, last = quoted
    return f"did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
