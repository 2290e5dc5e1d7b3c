"""Exceptions for bad input and for a run that a signal stops; hints for misspelt names."""

import collections
import errno
import os
from collections.abc import Iterable, Sequence

NO_HANDLES: tuple[int, ...] = (errno.EMFILE, errno.ENFILE)
_NO_SPACE: tuple[int, ...] = (errno.ENOSPC, errno.EDQUOT)
# Errors that say nothing about the content of a file.
_SYSTEM = NO_HANDLES + _NO_SPACE
_SYSTEM += (errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT)


class InputError(ValueError):
    """Bad arguments or input; the command prints the message and exits with code 2.

    The message is one line: the value, what is expected, and what to do.
    """


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

    The message is the reason in `failures.csv`.
    """


class Stopped(BaseException):
    """A signal ended the run after its state was saved; the same command resumes. Exit code 75.

    Derives from BaseException, like KeyboardInterrupt: readers turn any Exception into a rejected
    file, and a signal that arrives while they read must not be reported as a rejected file.
    """


def system_error(error: BaseException, path: str | os.PathLike[str]) -> OSError | None:
    """The error of the operating system behind an exception, or None: a full disk is no damage.

    ArrayRecord, TensorStore and safetensors raise RuntimeError or ValueError with the text of the
    error in it, such as "open() failed: Too many open files; opening /x".

    Args:
      error: raised while a file was read or written.
      path: the file or its folder, for the message.

    Returns:
      An OSError with the number of the error and a text that says what to do.
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
    advice = ""
    if code in NO_HANDLES:
        advice = ": raise the limit (ulimit -n) or run fewer processes"
    if code in _NO_SPACE:
        advice = ": free some space and run the same command to resume"
    return OSError(code, f"{os.strerror(code)}{advice}", os.fspath(path))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an error: the three known names that are nearest to `name`.

    >>> did_you_mean("livr", ["liver", "left lung", "spleen", "lumbar spine"])
    "did you mean 'liver', 'lumbar spine' or 'spleen'?"
    """
    import difflib  # only errors need it

    by_lower_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0)
    if not near:
        return "there are no names to choose from."
    quoted = [repr(by_lower_case[each]) for each in near]
    *first, last = quoted
    return f"did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
