"""What a run tracks beside its arrays: the metadata of its checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass
class Progress:
    """The metadata of a run; what it tracks beside the arrays of its state.

    Attributes:
      best: the highest validation AUC so far.
      best_step: its step.
      thresholds: `[K]`, chosen at the last validation.
      metrics: of the last validation.
      validated_step: its step; None where a checkpoint of an earlier version does not say.
      init: path, digest and placement of the weights that the run started from; None: random.
      pending: metrics of the steps that no line of `metrics.jsonl` holds yet.
      evaluation_due: a signal interrupted the validation; the next run repeats it.
    """

    best: float | None = None
    best_step: int | None = None
    thresholds: list[float] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    validated_step: int | None = None
    init: dict[str, Any] | None = None
    pending: list[Mapping[str, jax.Array | float]] = dataclasses.field(default_factory=list)
    evaluation_due: bool = False

    def to_json(self) -> dict[str, Any]:
        """The metadata of a last checkpoint, from which a run resumes."""
        pending = [{name: float(v) for name, v in values.items()} for values in self.pending]
        due = {"evaluation_due": True} if self.evaluation_due else {}
        return self.best_to_json() | due | {"pending": pending}

    def best_to_json(self) -> dict[str, Any]:
        """The metadata of a best checkpoint: without what only resuming needs."""
        values = dataclasses.asdict(dataclasses.replace(self, pending=[]))
        del values["pending"], values["evaluation_due"]
        return values

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> "Progress":
        """The inverse of both; fields that older checkpoints lack take their default."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: metadata[name] for name in names if name in metadata})
