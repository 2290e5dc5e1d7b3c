"""Ranking and counting metrics of multi-label predictions, per label and over all."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maknet_jax.errors import InputError

Values = np.ndarray | Sequence


class Counts(NamedTuple):
    """True positives, false positives and false negatives; scalars, or arrays `[K]`."""

    tp: np.ndarray | np.integer
    fp: np.ndarray | np.integer
    fn: np.ndarray | np.integer

    def total(self) -> "Counts":
        """The sums over all labels."""
        return Counts(*(np.sum(values) for values in self))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Confidences of logits in float32, computed in float64 without overflow."""
    return (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)


def auc(scores: Values, labels: Values) -> float:
    """Area under the ROC curve: the probability that a positive outscores a negative.

    Ties count half.

    Args:
      scores: [N], finite.
      labels: [N], 0/1 or bool.

    Returns:
      A float; nan where one class is absent.

    Raises:
      InputError: scores are not finite, labels are not 0 or 1, or shapes differ.
    """
    checked_scores, checked_labels, _ = checked(scores, labels)
    return _auc(checked_scores, checked_labels)


def auc_per_label(scores: Values, labels: Values, mask: Values | None = None) -> np.ndarray:
    """AUC of every label, [K]; see `auc`. `mask` [N, K] is 0 where the label is unknown."""
    scores, labels, mask = checked(scores, labels, mask)
    return np.array(
        [_auc(scores[mask[:, k], k], labels[mask[:, k], k]) for k in range(scores.shape[1])]
    )


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    positives = np.count_nonzero(labels)
    negatives = labels.size - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    # Mann-Whitney by counting, exact in integers: per distinct score, the number of negatives below
    # it plus half of those at it.
    _, place = np.unique(scores, return_inverse=True)
    positives_at = np.bincount(place, weights=labels)
    negatives_at = np.bincount(place, weights=~labels)
    below = np.cumsum(negatives_at) - negatives_at
    return float(positives_at @ (below + negatives_at / 2) / (positives * negatives))


def count(predicted: Values, labels: Values, mask: Values | None = None) -> Counts:
    """Counts of every label, each [K], from `predicted`, `labels` and `mask`, all [N, K]."""
    # Outside the mask `checked` sets both to False, and true negatives are not counted.
    predicted, labels, _ = checked(predicted, labels, mask)
    predicted = predicted.astype(bool)
    return Counts(
        tp=np.count_nonzero(predicted & labels, axis=0),
        fp=np.count_nonzero(predicted & ~labels, axis=0),
        fn=np.count_nonzero(~predicted & labels, axis=0),
    )


def rates(counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of `Counts`, three floats or arrays.

    Precision is 1 when nothing is predicted (LesaNet). Recall is nan without positives, and so is
    F1. F1 is 0 when no positive is predicted; a label that is never predicted thus has precision 1,
    recall 0 and F1 0, which pulls the mean F1 below both means.
    """
    tp, fp, fn = (np.asarray(values, np.float64) for values in counts)
    precision = np.where(tp + fp > 0, tp / np.maximum(tp + fp, 1), 1.0)
    positives = tp + fn > 0
    recall = np.where(positives, tp / np.maximum(tp + fn, 1), np.nan)
    f1 = np.where(positives, 2 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan)
    return precision, recall, f1


def checked(
    scores: Values, labels: Values, mask: Values | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (scores, labels as bool, mask as bool), all of one shape.

    Elements outside the mask may have any value; their scores are set to 0.

    Raises:
      InputError: see `auc`.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    mask = np.ones(scores.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if not scores.shape == labels.shape == mask.shape:
        raise InputError(
            f"scores {scores.shape}, labels {labels.shape}, mask {mask.shape}: shapes should be "
            "equal, one element per example and label"
        )
    known = scores[mask]
    broken = np.count_nonzero(~np.isfinite(known))
    if broken:
        raise InputError(
            f"{broken} of {known.size} scores are not finite: check the loss of the run and "
            "predict from an earlier checkpoint"
        )
    if labels.dtype != bool:
        known = labels[mask]
        odd = known[(known != 0) & (known != 1)]
        if odd.size:
            raise InputError(
                f"label value {odd[0]} should be 0 or 1: mask unknown labels and threshold soft "
                "ones"
            )
    return np.where(mask, scores, 0), mask & (labels == 1), mask
