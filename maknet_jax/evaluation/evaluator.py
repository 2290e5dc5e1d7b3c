"""Scores of a whole split, each example counted once, and the numbers made from them."""

import dataclasses

import numpy as np

from maknet_jax.data import pipeline
from maknet_jax.evaluation import protocol


@dataclasses.dataclass(frozen=True)
class Scores:
    """Predictions and truth of a split in its own order.

    Attributes:
      scores: float32 `[N, K]`, sigmoids of the logits.
      labels: float32 `[N, K]`, 0 or 1.
      label_mask: bool `[N, K]`, False where the truth is unknown.
    """

    scores: np.ndarray
    labels: np.ndarray
    label_mask: np.ndarray

    def thresholds(self):
        """Thresholds a label by LesaNet's protocol, from these (validation) scores.

        A label that they cannot judge is never predicted. (LesaNet would predict it always, but
        its own validation set judges all labels; a smaller one does not.)
        """
        return protocol.choose_thresholds(
            self.scores, self.labels, mask=self.label_mask, unjudged=protocol.NEVER
        )

    def report(self, thresholds, parents):
        """`protocol.Report` of these scores."""
        return protocol.evaluate(
            self.scores, self.labels, thresholds, parents, mask=self.label_mask
        )


class Evaluator:
    """Scores a split with any predictor, on any number of processes."""

    def __init__(self, source, predict, *, batch_size, process_index=0, process_count=1, threads=4):
        """Sets up a split.

        Args:
          source: a random-access source of examples.
          predict: predict(variables, batch) -> dict of NumPy arrays over the rows of all
            processes: `logits` [B, K] and the batch's labels, label_mask, weight and index.
          batch_size: over all processes; the last batch is padded.
          process_index: of this process.
          process_count: of processes.
          threads: that read.
        """
        self._source = source
        self._predict = predict
        self._reading = {
            "batch_size": batch_size,
            "process_index": process_index,
            "process_count": process_count,
            "threads": threads,
        }

    def scores(self, variables, advance=lambda count: None):
        """All scores of the split as `Scores`; `advance(count)` after each batch."""
        rows = {"logits": [], "labels": [], "label_mask": [], "index": []}
        for batch in pipeline.ordered_batches(self._source, **self._reading):
            outputs = self._predict(variables, batch)
            real = outputs["weight"] > 0
            for name, column in rows.items():
                column.append(outputs[name][real])
            advance(int(real.sum()))
        rows = {name: np.concatenate(column) for name, column in rows.items()}
        order = np.argsort(rows["index"])
        if not np.array_equal(rows["index"][order], np.arange(len(self._source))):
            raise RuntimeError("an example was counted twice or not at all")
        logits = rows["logits"][order].astype(np.float64)
        scores = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
        return Scores(scores, rows["labels"][order], rows["label_mask"][order] > 0)

    def run(self, variables, parents, thresholds=None, prefix=""):
        """Yields (name, value); without thresholds they are chosen on these very scores."""
        scores = self.scores(variables)
        thresholds = scores.thresholds() if thresholds is None else thresholds
        yield from protocol.named(scores.report(thresholds, parents), prefix)
