"""Local worker processes, forked from a process that has imported what they need."""

import atexit
import contextlib
import errno
import gc
import importlib
import multiprocessing.connection
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from maknet_jax.ct import children
from maknet_jax.data import worker_pool
from maknet_jax.errors import InputError

FORK = sys.platform == "linux"
_START = "import sys; from maknet_jax.data import processes; processes.{}(int(sys.argv[1]), {!r})"
_INTEGER = struct.Struct("q")
_CLOSED = (BrokenPipeError, ConnectionResetError)  # the other end of a pipe
_BLOCK = 31 << 20  # bytes; glibc adapts its thresholds to freed blocks of up to 32 MiB
_PATIENCE = 1.0  # seconds until a worker that has closed its pipe is killed

_early: dict[tuple[str, int, int], "_Server"] = {}  # servers that no `Processes` has taken yet


def start_early(module: str) -> None:
    """Starts the server of the next `Processes` with this module."""
    _close_early()
    if FORK:
        _early[_key(module)] = _Server(module)


def _key(module: str) -> tuple[str, int, int]:
    """The module and the current folder: a server of another one does not see relative paths."""
    here = os.stat(".")
    return module, here.st_dev, here.st_ino


@atexit.register
def _close_early() -> None:
    while _early:
        _early.popitem()[1].close()


class Processes(worker_pool.Pool):
    """Local processes.

    On Linux a server process imports the modules once and forks the workers. The command itself is
    not forked: its threads, locks and open files do not survive it. Elsewhere, where the libraries
    of the system may not survive a fork either, each worker is a new process. The server and the
    workers ignore `STOP_SIGNALS`, which reach the whole process group: the parent handles them.
    """

    advice = "run the command again with fewer --workers to resume"

    def __init__(self, count: int, module: str) -> None:
        """Starts the server; does not wait for it.

        Args:
          count: the number of workers.
          module: the module of the functions, which the server imports.
        """
        self.size = count
        self._module = module
        self._server = (_early.pop(_key(module), None) or _Server(module)) if FORK else None
        self._workers: dict[int, _Worker] = {}

    def is_ready(self) -> bool:
        """Whether a worker would start at once."""
        return self._server is None or self._server.is_ready()

    def send(self, place: int, function: Callable[[Any], Any], unit: Any) -> None:
        """Starts function(unit) in a process.

        Raises:
          InputError: the process cannot be started.
        """
        if place not in self._workers:
            self._workers[place] = self._start()
        self._workers[place].send(function, unit)

    def receive(self, places: Iterable[int]) -> Iterator[tuple[int, worker_pool.Answer]]:
        """Yields (place, answer) of the processes that are done.

        Raises:
          InputError: a process died before its first unit.
        """
        waiting = {self._workers[place].pipe: place for place in places}
        for ready in multiprocessing.connection.wait(list(waiting)):
            place = waiting[ready]  # type: ignore[index]  # it is one of the pipes
            try:
                answer = self._workers[place].receive()
            except EOFError:
                worker = self._workers.pop(place)
                how = worker.autopsy()
                if not worker.started:
                    raise _cannot_start(how) from None
                yield place, worker_pool.Died(how)
            else:
                if answer is not None:
                    yield place, answer

    def close(self) -> None:
        """Kills the processes."""
        for worker in self._workers.values():
            worker.kill()
        if self._server is not None:
            self._server.close()

    def _start(self) -> "_Worker":
        if self._server is None:
            process, ours = children.start(_START.format("serve", self._module))
            return _Worker(process, children.connection(ours))
        return self._server.fork()


class _Process(Protocol):
    """The part of `subprocess.Popen` that a worker needs."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class _Worker:
    """One process; it has one unit at a time."""

    def __init__(self, process: _Process, pipe: children.Connection) -> None:
        self.pipe = pipe
        self.started = False
        self._process = process

    def send(self, *call: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: receive() notices
            self.pipe.send(call)

    def receive(self) -> Any:
        """(result, None) or (None, exception) of the call; None when the process has started.

        Raises:
          EOFError: the process has died.
        """
        try:
            message = self.pipe.recv()
        except ConnectionResetError:
            raise EOFError from None
        if self.started:
            return message
        self.started = True
        return None

    def kill(self) -> None:
        """Ends the process at once."""
        self.pipe.close()
        self._process.kill()
        self._process.wait()

    def autopsy(self) -> str:
        """How the process died."""
        self.pipe.close()
        try:
            code = self._process.wait(1)  # its pipe closes shortly before it ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return _how(code)


class _Server:
    """A process that forks workers, because only their parent can wait for them.

    Requests and answers are integers: 0, with the descriptor of a socket, forks a worker and
    returns its process id, or -errno; a process id waits for it and returns its exit code.
    """

    def __init__(self, module: str) -> None:
        self._process, self._end = children.start(_START.format("serve_forks", module))
        self._started = False

    def is_ready(self) -> bool:
        """Whether it has imported its modules."""
        return self._started or bool(multiprocessing.connection.wait([self._end], 0))

    def fork(self) -> _Worker:
        """Forks a worker.

        Raises:
          InputError: the server is not running.
          OSError: there are too many processes.
        """
        ours, theirs = socket.socketpair()
        pipe = children.connection(ours)
        try:
            with theirs:
                if not self._started:
                    self._answer()
                    self._started = True
                number = self.ask(0, [theirs.fileno()])
            if number < 0:
                raise OSError(-number, os.strerror(-number), "starting a worker process")
        except EOFError:
            pipe.close()
            self._process.kill()
            raise _cannot_start(_how(self._process.wait())) from None
        except BaseException:
            pipe.close()
            raise
        return _Worker(_Forked(self, number), pipe)

    def ask(self, request: int, descriptors: Sequence[int] = ()) -> int:
        """The answer to a request.

        Raises:
          EOFError: the server is not running.
        """
        try:
            socket.send_fds(self._end, [_INTEGER.pack(request)], descriptors)
        except _CLOSED:
            raise EOFError from None
        return self._answer()

    def close(self) -> None:
        """Ends it at once, even while it starts."""
        self._end.close()
        self._process.kill()
        self._process.wait()

    def _answer(self) -> int:
        try:
            content = self._end.recv(_INTEGER.size, socket.MSG_WAITALL)
        except ConnectionResetError:
            content = b""
        if len(content) < _INTEGER.size:
            raise EOFError
        return _INTEGER.unpack(content)[0]


class _Forked:
    """A child of the server, like a `subprocess.Popen`."""

    def __init__(self, server: _Server, number: int) -> None:
        self._server, self._number = server, number
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal; the server kills the process after `_PATIENCE`."""
        if self._code is None:
            try:
                self._code = self._server.ask(self._number)
            except EOFError:
                self._code = 255  # unknown: the server has died, too
        return self._code

    def kill(self) -> None:
        """Kills it; its process id is not used again before `wait`."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._number, signal.SIGKILL)


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _cannot_start(how: str) -> InputError:
    return InputError(f"a worker process could not start ({how}): run with --workers 1")


def serve_forks(descriptor: int, module: str) -> None:
    """Forks workers until the parent closes its end: the main function of the server."""
    children.ignore_stop_signals()
    gc.disable()  # searching for garbage takes a tenth of the time of the imports
    importlib.import_module(module)
    gc.freeze()  # so that workers do not touch, and copy, these pages
    gc.enable()
    with socket.socket(fileno=descriptor) as end, contextlib.suppress(*_CLOSED):
        end.sendall(_INTEGER.pack(1))
        while True:
            content, descriptors, _, _ = socket.recv_fds(end, _INTEGER.size, 1)
            if not content:
                return
            (number,) = _INTEGER.unpack(content)
            end.sendall(_INTEGER.pack(_reap(number) if number else _fork(end, *descriptors)))


def _fork(end: socket.socket, descriptor: int) -> int:
    """The process id of a new worker, or -errno."""
    try:
        number = os.fork()
    except OSError as error:
        os.close(descriptor)
        return -(error.errno or errno.EAGAIN)
    if number:
        os.close(descriptor)
        return number
    code = 1
    try:
        end.close()
        serve(descriptor)
        code = 0
    finally:
        os._exit(code)  # nothing of the server may run here


def _reap(number: int) -> int:
    """The exit code of a child, which is killed if it does not end."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def serve(descriptor: int, module: str | None = None) -> None:
    """Calls functions until the parent closes its end: the main function of a worker."""
    children.ignore_stop_signals()
    if module is not None:
        importlib.import_module(module)
    # glibc maps large blocks anew and unmaps them when they are freed, so that the kernel clears
    # every page of every slice. Freeing a block raises its thresholds, and smaller ones are reused.
    bytearray(_BLOCK)
    pipe = children.Connection(descriptor)
    with contextlib.suppress(EOFError, *_CLOSED):
        pipe.send("started")
        while True:
            function, unit = pipe.recv()
            pipe.send(worker_pool.call(function, unit))
