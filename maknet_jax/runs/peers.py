"""The processes of one `--distributed` command watch each other and end together.

Each process writes a heartbeat into JAX's key-value store, and how it ended. If one ends early or
falls silent, the others end with its exit code, or with 75 if it was lost: a collective operation
that waits for it would never return.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from maknet_jax import files
from maknet_jax.errors import STOP_SIGNALS, InputError
from maknet_jax.runs import coordinator, stopping

GRACE = 8.0  # seconds in which the main thread may end by itself before the process is ended
SHORT_GRACE = 3.0  # the same where it has no state to save
_FINE = (0, 3)  # exit codes of a process that did its work
_FAILED, _STOPPED = 2, 75
_PREFIX = "maknet/processes/"
_LEAVING = 30.0  # seconds in which processes that have done their work leave together

_current: "Peers | None" = None


@dataclasses.dataclass
class _Peer:
    """The last news of another process.

    Attributes:
      heard: when its entry changed, by the clock of this process.
      entry: host, process id, beat and, at its end, exit code and message.
    """

    heard: float
    entry: dict[str, Any]

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.entry.get("code")


class Peers:
    """The other processes, as seen by threads of this one.

    Attributes:
      verdict: exit code and message, once another process has ended early or is lost.
    """

    def __init__(self, heartbeat: float) -> None:
        """Args: heartbeat: a process that is silent for this many seconds is lost."""
        self.verdict: tuple[int, str] | None = None
        self._heartbeat = heartbeat
        self._entry: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
        self._others: dict[int, _Peer] = {}
        self._answered = time.monotonic()  # when process 0 last answered
        self._first_is_gone = threading.Event()
        self._writing = threading.Lock()
        self._waiting = threading.Event()  # the main thread waits for the others
        self._ending = threading.Event()  # the main thread ends the process
        self._left = threading.Event()  # all processes have done their work
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        # Python runs signal handlers between bytecodes, so they wait for a long call of C++ to
        # return. This socket tells a thread of the signal at once.
        self._wake, self._wakened = socket.socketpair()
        self._wakened.setblocking(False)
        signal.set_wakeup_fd(self._wakened.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._await_signal, daemon=True).start()

    def report_first_gone(self) -> None:
        """The connection to process 0 is broken."""
        self._first_is_gone.set()

    @contextlib.contextmanager
    def starting(self, seconds: float) -> Iterator[None]:
        """Ends this process if the block takes longer than `seconds`: JAX would abort it."""
        message = (
            f"--distributed: some processes did not start within {seconds:g} s: start all of them, "
            "or raise --start-timeout"
        )
        end = functools.partial(self._end_after_grace, _FAILED, message, 0.0)
        with stopping.timer(seconds, end):
            yield

    def watch(self, client: Any, index: int, count: int) -> None:
        """Starts to watch.

        Args:
          client: of JAX's key-value store.
          index: of this process.
          count: of all processes.
        """
        now = time.monotonic()
        self._client, self._index, self._answered = client, index, now
        unknown = {"host": "another host", "pid": "unknown"}
        self._others = {n: _Peer(now, unknown) for n in range(count) if n != index}
        self._exchanging.start()
        threading.Thread(target=self._judge, daemon=True).start()

    def leave(self, code: int) -> None:
        """Waits until all processes have done their work, then leaves JAX's cluster.

        `_judge` raises `Stopped` in the main thread, which waits here, if one of them fails.

        Args:
          code: the exit code of this process.
        """
        self._entry |= {"code": code, "message": ""}
        self._waiting.set()
        self._publish()
        while not all(peer.code in _FINE for peer in self._others.values()):
            time.sleep(0.05)
        self._ending.set()
        # A thread that returns from C++ while Python ends would abort the process.
        self._left.set()
        self._exchanging.join(_LEAVING)
        jax.distributed.shutdown()

    def conclude(self, code: int, message: str, *, unexpected: bool) -> tuple[int, str]:
        """Tells the other processes how this one ends; returns its exit code and message.

        Args:
          code: the exit code.
          message: the line that is printed.
          unexpected: an error that may be a consequence of the end of another process, such as a
            broken connection.
        """
        self._ending.set()
        if unexpected:
            self._wait(lambda: self.verdict is not None, self._heartbeat + 2)
        if self.verdict and (unexpected or code == _STOPPED != self.verdict[0]):
            code, message = self.verdict
        self._entry |= {"code": code, "message": message}
        publishing = threading.Thread(target=self._publish_quietly, daemon=True)
        publishing.start()  # it blocks if process 0 is lost
        publishing.join(1.0)
        if self._others and self._index == 0:  # it serves the store: it ends last
            self._wait(lambda: not any(map(self._is_running, self._others.values())), GRACE + 1)
        return code, message

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not condition() and time.monotonic() < ends:
            time.sleep(0.05)

    def _is_running(self, peer: _Peer) -> bool:
        return peer.code is None and time.monotonic() - peer.heard <= self._heartbeat

    def _exchange(self) -> None:
        """Writes the own entry and reads those of the others; blocks if process 0 is lost."""
        while not self._left.is_set():
            # Errors are those of a store that is gone; `_judge` sees the silence.
            with contextlib.suppress(Exception):
                self._publish()
                for key, value in self._client.key_value_dir_get(_PREFIX):
                    peer = self._others.get(int(key.rpartition("/")[2]))
                    entry = json.loads(value)
                    if peer is not None and peer.entry != entry:
                        peer.heard, peer.entry = time.monotonic(), entry
                self._answered = time.monotonic()
            hurried = self._waiting.is_set() or self._ending.is_set()
            self._left.wait(0.1 if hurried else min(1.0, self._heartbeat / 8))

    def _publish(self) -> None:
        with self._writing:
            self._entry["beat"] += 1
            text = json.dumps(self._entry)
            self._client.key_value_set(f"{_PREFIX}{self._index}", text, allow_overwrite=True)

    def _publish_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self._publish()

    def _judge(self) -> None:
        """Ends this process when another has ended early or is lost."""
        while (verdict := self._find_verdict()) is None:
            time.sleep(0.1)
        self.verdict = verdict
        saving = stopping.is_noting()  # it may be about to end after the same step
        if not saving:
            stopping.request(verdict[1])
        self._end_after_grace(*verdict, GRACE if saving else SHORT_GRACE)

    def _find_verdict(self) -> tuple[int, str] | None:
        now = time.monotonic()
        for number, peer in self._others.items():
            name = f"process {number} (pid {peer.entry['pid']} on {peer.entry['host']})"
            if peer.code == _STOPPED:
                return _STOPPED, f"{name} was stopped: {peer.entry['message']}"
            if peer.code not in (None, *_FINE):
                return _FAILED, f"{name} failed: {peer.entry['message']}"
            silent = now - peer.heard > self._heartbeat
            if number == 0:
                silent = self._first_is_gone.is_set() or now - self._answered > self._heartbeat
            if silent and peer.code is None:
                return _STOPPED, f"{name} died or does not answer; {stopping.AGAIN}"
        return None

    def _await_signal(self) -> None:
        """Ends this process if the handler of a signal does not run: C++ has the main thread."""
        while True:
            number = self._wake.recv(1)[0]
            if number in STOP_SIGNALS and not stopping.is_noting():
                name = signal.Signals(number).name
                self._end_after_grace(_STOPPED, f"{name}; {stopping.AGAIN}", GRACE)

    def _end_after_grace(self, code: int, message: str, seconds: float) -> None:
        if self._ending.wait(seconds):
            return
        code, message = self.conclude(*(self.verdict or (code, message)), unexpected=False)
        line = f"maknet: {'stopped: ' if code == _STOPPED else ''}{message}"
        os.write(2, f"{files.printable(line)}\n".encode())
        os._exit(code)


def start(heartbeat: float, start_timeout: float) -> None:
    """Joins the other processes of the command and watches them.

    Args:
      heartbeat: a process that is silent for this many seconds is lost, and all others end.
      start_timeout: seconds to wait for all processes to start.

    Raises:
      InputError: the environment does not say which process this is, or some do not start.
    """
    global _current
    _current = Peers(heartbeat)
    try:
        with _current.starting(start_timeout):
            client, index, count = coordinator.join(_LEAVING, _current.report_first_gone)
    except InputError:  # nothing has started
        signal.set_wakeup_fd(-1)
        _current = None
        raise
    _current.watch(client, index, count)


def current() -> Peers | None:
    """The other processes of this command; None without `--distributed`."""
    return _current
