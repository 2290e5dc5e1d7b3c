"""Scores a whole split, each example once, and computes metrics from the scores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from maknet_jax.data import pipeline
from maknet_jax.data.records import ExampleSource
from maknet_jax.errors import Stopped
from maknet_jax.evaluation import metrics, protocol


@dataclasses.dataclass(frozen=True)
class Scores:
    """Predictions and labels of a split, in the order of the split.

    Attributes:
      scores: float32 `[N, K]`, sigmoids of the logits.
      labels: float32 `[N, K]`, 0 or 1.
      label_mask: bool `[N, K]`, False where the label is unknown.
    """

    scores: np.ndarray
    labels: np.ndarray
    label_mask: np.ndarray

    def thresholds(self, rules: str = protocol.OURS) -> np.ndarray:
        """Thresholds per label by LesaNet's protocol, `[K]`, chosen on these scores.

        By our rules a label that cannot be scored on this split is never predicted. LesaNet always
        predicts it; on LesaNet's own validation set every label can be scored.
        """
        return protocol.choose_thresholds(
            self.scores,
            self.labels,
            mask=self.label_mask,
            unjudged=protocol.ALWAYS if rules == protocol.LESANET else protocol.NEVER,
            rules=rules,
        )

    def predicted(
        self,
        thresholds: np.ndarray | Sequence[float],
        parents: Sequence[Sequence[int]],
        rules: str = protocol.OURS,
    ) -> np.ndarray:
        """The predicted labels with their parents, bool `[N, K]`, see `protocol.evaluate`."""
        return protocol.predict_with_parents(
            self.scores, self.labels, thresholds, parents, mask=self.label_mask, rules=rules
        )

    def report(
        self,
        thresholds: np.ndarray | Sequence[float],
        parents: Sequence[Sequence[int]],
        rules: str = protocol.OURS,
    ) -> protocol.Report:
        """Evaluates these scores, see `protocol.evaluate`."""
        return protocol.evaluate(
            self.scores, self.labels, thresholds, parents, mask=self.label_mask, rules=rules
        )


class Evaluator:
    """Scores a split with any prediction function, on any number of processes."""

    def __init__(
        self,
        source: ExampleSource,
        predict: Callable[..., Mapping[str, np.ndarray]],
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 4,
        stop: Callable[[], bool] = lambda: False,
    ):
        """Sets up a split.

        Args:
          source: the examples.
          predict: predict(variables, batch) -> dict of NumPy arrays over the rows of all
            processes: `logits` [B, K] and the batch's labels, label_mask, weight and index, and its
            `stop` with several processes.
          batch_size: examples per step over all processes; the last batch is padded.
          process_index: of this process.
          process_count: number of processes.
          threads: number of reader threads.
          stop: whether this process should stop. All processes then stop after the same batch.
        """
        self._source = source
        self._predict, self._stop = predict, stop
        self._shared = process_count > 1
        self._reading = {
            "batch_size": batch_size,
            "process_index": process_index,
            "process_count": process_count,
            "threads": threads,
        }

    def scores(
        self, variables: object, advance: Callable[[int], object] = lambda count: None
    ) -> Scores:
        """Scores the whole split.

        Args:
          variables: the first argument of `predict`.
          advance: called with the number of examples after each batch.

        Raises:
          RuntimeError: an example was scored twice or not at all.
        """
        rows = self.outputs(variables, ("logits", "labels", "label_mask"), advance)
        return Scores(metrics.sigmoid(rows["logits"]), rows["labels"], rows["label_mask"] > 0)

    def outputs(
        self,
        variables: object,
        names: Sequence[str],
        advance: Callable[[int], object] = lambda count: None,
    ) -> dict[str, np.ndarray]:
        """Some outputs of `predict` for the whole split, in the order of the split.

        Args:
          variables: the first argument of `predict`.
          names: of the outputs.
          advance: called with the number of examples after each batch.

        Raises:
          Stopped: `stop` of a process returned True.
          RuntimeError: an example was scored twice or not at all.
        """
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "index")}
        for batch in pipeline.ordered_batches(self._source, **self._reading):
            if self._shared:  # `predict` returns the rows of all processes
                batch["stop"] = np.full(len(batch["weight"]), self._stop())
            outputs = self._predict(variables, batch)
            if np.any(outputs.get("stop", False)) if self._shared else self._stop():
                raise Stopped("the scoring was interrupted")
            real = outputs["weight"] > 0
            for name, column in columns.items():
                column.append(outputs[name][real])
            advance(int(real.sum()))
        rows = {name: np.concatenate(column) for name, column in columns.items()}
        order = np.argsort(rows["index"])
        if not np.array_equal(rows["index"][order], np.arange(len(self._source))):
            raise RuntimeError("an example was scored twice or not at all")
        return {name: rows[name][order] for name in names}
