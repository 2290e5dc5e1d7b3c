"""Child processes that run a statement and talk to their parent through a socket."""

import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
from typing import Any

from maknet_jax.errors import STOP_SIGNALS

Connection = multiprocessing.connection.Connection


def start(statement: str, **streams: Any) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts Python on `statement`, which does not import the main module of this process.

    Args:
      statement: its `sys.argv[1]` is the file descriptor of its end of the socket.
      **streams: stdin, stdout and stderr of `subprocess.Popen`; inherited by default.

    Returns:
      (the process, our end). The process starts with `STOP_SIGNALS` blocked: they reach the whole
      process group, and its parent handles them.
    """
    ours, theirs = socket.socketpair()
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", statement, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": paths},
                **streams,
            )
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return process, ours


def connection(end: socket.socket) -> Connection:
    """A connection that takes over one end of a socket."""
    return Connection(end.detach())


def ignore_stop_signals() -> None:
    """Ignores `STOP_SIGNALS` in this process and in those that it starts."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
