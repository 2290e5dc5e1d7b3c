"""Pseudo-labels of whole shards and their counts: kept images, labels, other thresholds, truth."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from maknet_jax.data import pseudo_labels
from maknet_jax.data.labels import Vocabulary

# Thresholds for which labels are also counted, for comparison.
SWEEP = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Selects the labels of a shard and counts them.

    Attributes:
      vocabulary: the labels of the teacher.
      top: maximum number of labels per image.
      threshold: a label's confidence must exceed it; one for all, or `[K]`.
      close: a difference of confidences, see `pseudo_labels.select`.
      truth: also compare with the labels of the images.
    """

    vocabulary: Vocabulary
    top: int
    threshold: float | np.ndarray
    close: float
    truth: bool

    def apply(
        self, first: int, confidences: np.ndarray, labels: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, dict]:
        """Labels one shard.

        Args:
          first: the number of the shard's first record.
          confidences: float32 `[N, K]`.
          labels: `[N, K]`, used with `truth` only.
          mask: `[N, K]`, 0 where the label is unknown; used with `truth` only.

        Returns:
          (rows, counts): the rows of the label shard, and its entry in `made/`.
        """
        columns, close = self._select(confidences, self.threshold)
        numbers = np.arange(first, first + len(confidences))
        rows = pseudo_labels.rows_of(numbers, columns, confidences, top=self.top)
        selected = rows["labels"] >= 0
        bins, _ = np.histogram(rows["confidences"][selected], bins=20, range=(0, 1))
        label_counts = np.bincount(rows["labels"][selected], minlength=len(self.vocabulary))
        counts = {
            "images": len(confidences),
            "kept": len(rows),
            "close": int(close.sum()),
            "label_counts": label_counts.tolist(),
            "confidences": bins.tolist(),
            "sweep": [],
        }
        for threshold in SWEEP:
            swept, _ = self._select(confidences, threshold)
            entry = {
                "threshold": threshold,
                "images": int((swept >= 0).any(axis=1).sum()),
                "labels": int((swept >= 0).sum()),
            }
            counts["sweep"].append(entry | (_agreement(swept, labels, mask) if self.truth else {}))
        if self.truth:
            counts["judged"] = _agreement(columns, labels, mask)
        return rows, counts

    def _select(
        self, confidences: np.ndarray, threshold: float | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return pseudo_labels.select(
            confidences,
            self.vocabulary.exclusive,
            top=self.top,
            threshold=threshold,
            close=self.close,
        )


def _agreement(columns: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> dict[str, int]:
    """Counts of the known labels that are selected, selected and true, and true."""
    selected = np.zeros(labels.shape, bool)
    row, place = np.nonzero(columns >= 0)
    selected[row, columns[row, place]] = True
    known = mask > 0
    return {
        "given": int((selected & known).sum()),
        "right": int((selected & known & (labels > 0)).sum()),
        "true": int((known & (labels > 0)).sum()),
    }


def add_up(parts: Sequence[dict]) -> dict:
    """Adds up the counts of shards, see `Rule.apply`."""
    total = {name: sum(part[name] for part in parts) for name in ("images", "kept", "close")}
    total["dropped"] = total["images"] - total["kept"]
    for name in ("label_counts", "confidences"):
        total[name] = np.sum([part[name] for part in parts], axis=0).tolist()
    total["labels_given"] = sum(total["label_counts"])
    total["sweep"] = [
        entries[0] | {key: sum(e[key] for e in entries) for key in entries[0] if key != "threshold"}
        for entries in zip(*(part["sweep"] for part in parts), strict=True)
    ]
    if "judged" in parts[0]:
        judged = {key: sum(part["judged"][key] for part in parts) for key in parts[0]["judged"]}
        total["judged"] = judged | {
            "precision": judged["right"] / judged["given"] if judged["given"] else None,
            "recall": judged["right"] / judged["true"] if judged["true"] else None,
        }
    return total
