"""Workers whose death is noticed and attributed to the unit of work that they had."""

import abc
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from maknet_jax.errors import STOP_SIGNALS, InputError

Unit = TypeVar("Unit")
Result = TypeVar("Result")

_AHEAD = 2  # results per worker that may wait for an earlier one


@dataclasses.dataclass(frozen=True)
class Died:
    """A worker died with a unit.

    Attributes:
      how: "signal 9", "exit code 1", or how often.
    """

    how: str


# (result, None) or (None, exception) of a call, or the death of its worker.
Answer = tuple[Any, Exception | None] | Died


class Pool(abc.ABC):
    """Workers, each with a place and at most one unit at a time."""

    size: int  # the number of workers
    advice: str  # for the user, about a unit whose worker died

    @abc.abstractmethod
    def send(self, place: int, function: Callable[[Any], Any], unit: Any) -> None:
        """Starts function(unit) at a place."""

    @abc.abstractmethod
    def receive(self, places: Iterable[int]) -> Iterator[tuple[int, Answer]]:
        """Waits for one of some places; yields (place, answer) of those that are done."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the work."""

    def map(
        self,
        function: Callable[[Unit], Result],
        units: Sequence[Unit],
        *,
        alone: Callable[[Unit], bool],
        died: Callable[[Unit, str], Result],
    ) -> Iterator[Result]:
        """Yields function(unit) for each unit, in order.

        Args:
          function: importable by name.
          units: what it is called with.
          alone: whether no other unit may be in work at the same time as this one.
          died: died(unit, how) is called if the worker of a unit died: it returns the result of the
            unit, or raises. `how` is as in `Died`.

        Raises:
          InputError: a worker died before its first unit. An exception of `function` is raised in
            place of its result.
        """
        results: dict[int, tuple[Result, Exception | None]] = {}
        busy: dict[int, int] = {}  # place of a worker -> number of its unit
        sent = yielded = 0
        while yielded < len(units):
            while yielded in results:
                result, error = results.pop(yielded)
                if error is not None:
                    raise error
                yield result
                yielded += 1
            for place in range(self.size):
                ahead = sent - yielded < _AHEAD * self.size
                if place in busy or sent == len(units) or not ahead:
                    continue
                others = [units[number] for number in busy.values()]
                if others and (alone(units[sent]) or any(map(alone, others))):
                    break
                self.send(place, function, units[sent])
                busy[place] = sent
                sent += 1
            for place, answer in self.receive(busy) if busy else ():
                number = busy.pop(place)
                if isinstance(answer, Died):
                    answer = died(units[number], answer.how), None
                results[number] = answer


def death(pool: Pool, source: str, how: str) -> InputError:
    """The error that a worker died while it read a file."""
    return InputError(
        f"one of {pool.size} worker processes was killed ({how}) while it read {source}, most "
        f"likely for lack of memory: {pool.advice}"
    )


class Processes(Pool):
    """Local processes.

    They are spawned, not forked: the threads of the parent (grain, JAX) do not survive a fork. They
    ignore `STOP_SIGNALS`, which reach the whole process group: the parent handles them.
    """

    advice = "run the command again with fewer --workers to resume"

    def __init__(self, count: int) -> None:
        self.size = count
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(_Worker(self._context))
        except BaseException:
            self.close()
            raise

    def send(self, place: int, function: Callable[[Any], Any], unit: Any) -> None:
        """Starts function(unit) in a process."""
        self._workers[place].send(function, unit)

    def receive(self, places: Iterable[int]) -> Iterator[tuple[int, Answer]]:
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
                how = self._workers[place].autopsy()
                if not self._workers[place].started:
                    raise InputError(
                        f"a worker process could not start ({how}): a script must guard its "
                        "calls with `if __name__ == '__main__':`, because each worker imports "
                        "it, or use one worker"
                    ) from None
                yield place, Died(how)
                self._workers[place] = _Worker(self._context)
            else:
                yield place, answer

    def close(self) -> None:
        """Kills the processes."""
        for worker in self._workers:
            worker.kill()


class _Worker:
    """One process; it has one unit at a time."""

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self.pipe, theirs = context.Pipe()
        self.started = False
        self._process = context.Process(target=_serve, args=(theirs,))
        # It starts with the signals blocked: otherwise a signal that arrives before it ignores
        # them would kill it. The parent receives pending signals after unblocking.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process.start()
        finally:
            theirs.close()  # so that the death of the process ends our receive()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def send(self, *call: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: receive() notices
            self.pipe.send(call)

    def receive(self) -> Any:
        """(result, None) or (None, exception) of the call.

        Raises:
          EOFError: the process has died.
        """
        try:
            if not self.started:
                self.pipe.recv()
                self.started = True
            return self.pipe.recv()
        except ConnectionResetError:
            raise EOFError from None

    def kill(self) -> None:
        """Ends the process at once."""
        self.pipe.close()
        self._process.kill()
        self._process.join()

    def autopsy(self) -> str:
        """How the process died."""
        self._process.join(1)  # its pipe closes shortly before it ends
        self.kill()
        code = self._process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    pipe.send("started")
    while True:
        try:
            function, unit = pipe.recv()
        except EOFError:  # the parent has closed the pipe, or has died
            return
        with contextlib.suppress(BrokenPipeError):
            pipe.send(call(function, unit))


def call(function: Callable[[Any], Any], unit: Any) -> tuple[Any, Exception | None]:
    """(function(unit), None), or (None, the exception that it raised); both can be pickled."""
    try:
        return function(unit), None
    except Exception as error:
        return None, _picklable(error)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
