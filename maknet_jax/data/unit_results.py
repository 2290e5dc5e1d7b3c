"""Units of work of `maknet prepare`, and their results: workers return compressed records."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from maknet_jax.data import chunks

Encoded = tuple[bytes, np.ndarray, np.ndarray]  # a record, its labels and its label mask


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """The records of one unit of work, and what was rejected.

    Attributes:
      examples: encoded records with their labels and label masks, uint8 `[K]` each.
      failures: (input, reason) pairs.
      counters: summed over the run, for example {"neighbours repeated": 1}.
      evidence: of a piece of a unit, for `Division.join`.
    """

    examples: Collection[Encoded] = ()
    failures: tuple[tuple[str, str], ...] = ()
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    evidence: Any = None


class Unit(Protocol):
    """A unit of work: a picklable dataclass whose `repr` determines its records and the plan."""

    @property
    def count(self) -> int:
        """The expected number of records."""

    @property
    def source(self) -> str:
        """The path of its input, for messages."""


AnyUnit = TypeVar("AnyUnit", bound=Unit)


@dataclasses.dataclass(frozen=True)
class Division:
    """How large units are divided among workers.

    Attributes:
      pieces: unit -> its pieces in order, which are units, too; [unit] for a small one.
      join: (unit, results of its pieces in order without their records, the number of these) ->
        result of the unit, likewise without records: it keeps all of them, or none if it has
        failures. Not called for [unit].
    """

    pieces: Callable[[Any], Sequence[Any]]
    join: Callable[[Any, Sequence[UnitResult], int], UnitResult]


@dataclasses.dataclass(frozen=True)
class Divided:
    """A unit and its pieces.

    Attributes:
      unit: the whole.
      pieces: one or more units; the only one is the unit itself.
      division: how they are joined.
    """

    unit: Unit
    pieces: Sequence[Unit]
    division: Division | None

    @classmethod
    def of(cls, unit: Unit, division: Division | None) -> "Divided":
        """Divides a unit; None leaves it whole."""
        return cls(unit, division.pieces(unit) if division else [unit], division)

    def join(self, results: Sequence[UnitResult], count: int) -> tuple[UnitResult, bool]:
        """(the result of the unit, whether its records are kept), see `Division.join`."""
        if self.division is None or len(self.pieces) == 1:
            return results[0], True
        result = self.division.join(self.unit, results, count)
        return result, not result.failures


@dataclasses.dataclass(frozen=True)
class Packed:
    """The result of a piece as its worker returns it.

    Attributes:
      result: without records.
      chunks: the records.
      counts: the records with each label, and those in which it is known; int64 `[2, K]`.
    """

    result: UnitResult
    chunks: chunks.Chunks
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pack(Generic[AnyUnit]):
    """Makes the records of a piece and compresses them; the call of a worker.

    Attributes:
      make: make(piece) -> UnitResult, importable by name.
      labels: the number of labels K.
    """

    make: Callable[[AnyUnit], UnitResult]
    labels: int

    def __call__(self, piece: AnyUnit) -> Packed:
        """The result of a piece."""
        return self.pack(self.make(piece))

    def pack(self, result: UnitResult) -> Packed:
        """Compresses the records of a result."""
        examples = result.examples
        counts = np.zeros((2, self.labels), np.int64)
        for _, labels, label_mask in examples:
            counts += labels & label_mask, label_mask
        compressed = chunks.Chunks()
        if examples:
            compressed = chunks.compress(payload for payload, _, _ in examples)
        return Packed(dataclasses.replace(result, examples=()), compressed, counts)
