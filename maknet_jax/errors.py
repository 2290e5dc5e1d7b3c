"""The two ways in which input can be wrong, and the one way in which a run can be stopped."""


class InputError(ValueError):
    """Bad arguments or input: nothing can go on. The command prints the message and exits 2.

    The message is one line that names the value, the rule it breaks and the mend.
    """


class Rejected(ValueError):
    """One input (a file, a series, a row) cannot be used; the others go on and the exit code is 3.

    The message is the reason that `failures.csv` shows.
    """


class Stopped(BaseException):
    """A signal ended the run after its state was saved; the same command goes on. Exit code 75.

    No Exception, as KeyboardInterrupt is none: the readers turn any Exception into a rejected file,
    and a signal that comes while they read should not look like one.
    """
