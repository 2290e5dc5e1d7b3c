"""Exceptions for bad input and for a run that a signal stops."""


class InputError(ValueError):
    """Bad arguments or input; the command prints the message and exits with code 2.

    The message is one line: the value, what is expected, and what to do.
    """


class Rejected(ValueError):
    """One input (a file, a series, a row) is rejected; the others are processed, exit code 3.

    The message is the reason in `failures.csv`.
    """


class Stopped(BaseException):
    """A signal ended the run after its state was saved; the same command resumes. Exit code 75.

    Derives from BaseException, like KeyboardInterrupt: readers turn any Exception into a rejected
    file, and a signal that arrives while they read must not be reported as a rejected file.
    """
