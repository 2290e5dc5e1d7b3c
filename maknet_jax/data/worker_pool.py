"""Workers whose death is noticed and attributed to the unit of work that they had."""

import abc
import dataclasses
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from maknet_jax.errors import InputError

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
            if yielded in results:  # workers get units first: the caller may take long with it
                result, error = results.pop(yielded)
                if error is not None:
                    raise error
                yield result
                yielded += 1
                continue
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
