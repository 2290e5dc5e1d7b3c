"""The progress of a run, stored as the metadata of its checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from maknet_jax.runs import steps


@dataclasses.dataclass
class Progress:
    """Everything that a run tracks in addition to the arrays of its state.

    Attributes:
      best: the highest validation AUC so far.
      best_step: its step.
      thresholds: `[K]`, chosen at the last validation.
      metrics: of the last validation.
      validated_step: its step; None if a checkpoint of an earlier version lacks it.
      init: path, digest and placement of the initial weights; None if they were random.
      pending: metrics of the steps that are not yet written to `metrics.jsonl`.
      skipped: number of skipped steps, and of those in a row at the end, see `steps.Steps`.
      evaluation_due: a signal interrupted the validation; the next run repeats it.
    """

    best: float | None = None
    best_step: int | None = None
    thresholds: list[float] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    validated_step: int | None = None
    init: dict[str, Any] | None = None
    pending: list[Mapping[str, jax.Array | float]] = dataclasses.field(default_factory=list)
    skipped: tuple[int, int] = (0, 0)
    evaluation_due: bool = False

    def settle(self) -> None:
        """Drops skipped steps from `pending`; all of them are done."""
        self.pending = [steps.metrics(each) for each in self.pending if not steps.is_skipped(each)]

    def to_json(self) -> dict[str, Any]:
        """The metadata of a last checkpoint, from which a run resumes."""
        pending = [{name: float(v) for name, v in values.items()} for values in self.pending]
        due = {"evaluation_due": True} if self.evaluation_due else {}
        skipped = {"skipped": list(self.skipped)} if any(self.skipped) else {}
        return self.best_to_json() | due | skipped | {"pending": pending}

    def best_to_json(self) -> dict[str, Any]:
        """The metadata of a best checkpoint: without the fields that only resuming needs."""
        values = dataclasses.asdict(dataclasses.replace(self, pending=[]))
        for name in ("pending", "evaluation_due", "skipped"):
            del values[name]
        return values

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> "Progress":
        """The inverse of both; fields missing in older checkpoints take their defaults."""
        names = [field.name for field in dataclasses.fields(cls)]
        progress = cls(**{name: metadata[name] for name in names if name in metadata})
        first, second = progress.skipped
        return dataclasses.replace(progress, skipped=(first, second))
