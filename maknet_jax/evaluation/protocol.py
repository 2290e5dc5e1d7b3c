"""LesaNet's evaluation (Yan et al. 2019), which the paper's tables follow.

Thresholds per label are chosen on the validation split, the parents of a predicted label are also
predicted, and means are over the labels that have positives and negatives. There are two sets of
rules, which differ in details:

- "lesanet" agrees with LesaNet's published evaluate.py to rounding (1e-12).
- "ours", the default, differs from it in three places:
  1. Threshold 1 means never: a score of exactly 1 is not predicted at it. In LesaNet it is.
  2. All ancestors of a predicted label are predicted. LesaNet adds direct parents in one pass in
     column order: an ancestor is missed if the column of the intermediate label is lower than the
     label's own (13 pairs of LesaNet's 115 body parts, 15 of its 171 labels).
  3. F1 is 2tp / (2tp + fp + fn), so equal counts tie exactly and the lowest threshold wins.
     LesaNet computes 2pr / (p + r), and rounding breaks such ties.

Together they change LesaNet's macro F1 by up to 0.004.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from maknet_jax.errors import InputError
from maknet_jax.evaluation import metrics

CANDIDATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ALWAYS, NEVER = 0.0, 1.0
FIXED = 0.5
OURS, LESANET = "ours", "lesanet"
RATES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Report:
    """The metrics of a split. Undefined numbers are None, because JSON has no nan.

    Attributes:
      summary: the means. auc, precision, recall, f1 (macro averages over the labels with positives
        and negatives, the same labels for all four); precision_at_0.5, recall_at_0.5, f1_at_0.5
        (the same at a fixed threshold); micro_precision, micro_recall, micro_f1 and their _at_0.5
        (over all known elements); examples, labels_evaluated, labels_total.
      per_label: one row per label, in the vocabulary's order: label (index), evaluated, examples,
        positives, auc, threshold, tp, fp, fn, precision, recall, f1, precision_at_0.5,
        recall_at_0.5, f1_at_0.5. The rates of a label that is not evaluated are None.
    """

    summary: dict[str, float | int | None]
    per_label: list[dict]


def choose_thresholds(
    val_scores: metrics.Values,
    val_labels: metrics.Values,
    *,
    mask: metrics.Values | None = None,
    candidates: Sequence[float] | None = None,
    unjudged: float = ALWAYS,
    rules: str = OURS,
) -> np.ndarray:
    """Returns the candidate with the best validation F1 for each label, float64 `[K]`.

    Ties go to the lowest candidate. A label whose F1 is 0 at every candidate gets 1.0 and is never
    predicted. A label without positives or without negatives in the validation split cannot be
    scored and gets `unjudged`. In LesaNet that is 0, the initial value of its array: such a label
    is predicted for every example, with all its parents. (LesaNet's validation split has positives
    of all 171 labels.) Use `unjudged=NEVER` for predictions that are shown to users.

    Args:
      val_scores: [N, K] probabilities.
      val_labels: [N, K], 0/1.
      mask: [N, K], 0 where the label is unknown.
      candidates: ascending, in (0, 1); None takes 0.3, 0.4 .. 0.9.
      unjudged: threshold of labels that cannot be scored: ALWAYS (0, as in LesaNet), NEVER (1) or
        a value in between.
      rules: "ours" or "lesanet", see the module.

    Raises:
      InputError: candidates are out of order or range; see also `metrics.checked`.
    """
    chosen = find_rules(rules)
    candidates = chosen.candidates if candidates is None else candidates
    bounds = [0, *candidates, 1]
    if len(bounds) == 2 or not np.all(np.diff(bounds) > 0):
        raise InputError(
            f"candidates {list(candidates)} should be ascending and within (0, 1), for example "
            f"{list(CANDIDATES)}"
        )
    scores, labels, mask = metrics.checked(val_scores, val_labels, mask)
    f1 = np.stack([chosen.rates(metrics.count(scores >= c, labels, mask))[2] for c in candidates])
    judged = _has_both(labels, mask)
    f1 = np.where(judged, f1, 0.0)
    best = np.where(f1.max(axis=0) > 0, np.take(candidates, f1.argmax(axis=0)), NEVER)
    return np.where(judged, best, unjudged)


def predict(scores: metrics.Values, thresholds: metrics.Values) -> np.ndarray:
    """Returns scores >= thresholds, bool `[N, K]`; always False where the threshold is 1.

    LesaNet's plain comparison would predict a score that rounds to exactly 1.
    """
    thresholds = np.asarray(thresholds, np.float64)
    return (np.asarray(scores) >= thresholds) & (thresholds < NEVER)


def add_parents(predicted: metrics.Values, parents: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns a copy of `predicted` with all ancestors of every predicted label.

    Args:
      predicted: bool `[N, K]`.
      parents: for each label, the indices of its parents. Direct parents and all ancestors give
        the same result; cycles are allowed.

    Raises:
      InputError: the lists do not match the labels.
    """
    predicted = np.array(predicted, bool)
    _check_parents(predicted, parents)
    direct = predicted.copy()
    for label in range(len(parents)):
        predicted[:, _ancestors(label, parents)] |= direct[:, [label]]
    return predicted


def _check_parents(predicted: np.ndarray, parents: Sequence[Sequence[int]]) -> None:
    labels = predicted.shape[1]
    beyond = [p for above in parents for p in above if not 0 <= p < labels]
    if len(parents) != labels or beyond:
        raise InputError(
            f"parents of {len(parents)} labels (invalid indices {beyond[:3]}) do not match the "
            f"predictions of {labels} labels: build both from the same label file"
        )


def add_direct_parents(predicted: metrics.Values, parents: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns a copy of `predicted` with the parents that LesaNet adds: one pass in column order.

    Args:
      predicted: bool `[N, K]`.
      parents: for each label, the indices of its direct parents.

    Raises:
      InputError: the lists do not match the labels.
    """
    predicted = np.array(predicted, bool)
    _check_parents(predicted, parents)
    for label, above in enumerate(parents):
        predicted[:, list(above)] |= predicted[:, [label]]
    return predicted


def _ancestors(label: int, parents: Sequence[Sequence[int]]) -> list[int]:
    """Returns the sorted indices of all labels above `label`."""
    ancestors: set[int] = set()
    queue = list(parents[label])
    while queue:
        parent = queue.pop()
        if parent not in ancestors:
            ancestors.add(parent)
            queue.extend(parents[parent])
    return sorted(ancestors)


def evaluate(
    scores: metrics.Values,
    labels: metrics.Values,
    thresholds: metrics.Values,
    parents: Sequence[Sequence[int]],
    *,
    mask: metrics.Values | None = None,
    rules: str = OURS,
) -> Report:
    """Evaluates probabilities by LesaNet's protocol.

    A label that is not evaluated (its known elements have no positives or no negatives) is not
    predicted by its own score either, as in LesaNet: it adds nothing to its parents or to the micro
    averages, unless one of its children is predicted.

    Args:
      scores: [N, K] probabilities, one row per example (padding removed or masked).
      labels: [N, K], 0/1.
      thresholds: [K], from `choose_thresholds` on val.
      parents: of each label; direct ones for the rules "lesanet", direct ones or all ancestors for
        "ours". `[[]] * K` for a vocabulary without an ontology.
      mask: [N, K], 0 where the label is unknown.
      rules: "ours" or "lesanet", see the module.

    Returns:
      A `Report`.

    Raises:
      InputError: there is not one threshold per label; see also `metrics.checked` and
        `add_parents`.
    """
    by = find_rules(rules)
    scores, labels, mask = metrics.checked(scores, labels, mask)
    thresholds = np.asarray(thresholds, np.float64)
    if thresholds.shape != scores.shape[1:]:
        raise InputError(
            f"thresholds {thresholds.shape} do not match scores {scores.shape}: pass one threshold "
            "per label of the same vocabulary"
        )
    evaluated = _has_both(labels, mask)
    aucs = metrics.auc_per_label(scores, labels, mask)
    columns = {
        "label": np.arange(labels.shape[1]),
        "evaluated": evaluated,
        "examples": mask.sum(axis=0),
        "positives": labels.sum(axis=0),
        "auc": aucs,
        "threshold": thresholds,
    }
    summary: dict[str, float] = {"auc": _mean(aucs, evaluated)}
    micro: dict[str, float] = {}
    for suffix, chosen in (("", thresholds), (f"_at_{FIXED}", np.full_like(thresholds, FIXED))):
        predicted = predict_with_parents(scores, labels, chosen, parents, mask=mask, rules=rules)
        counts = metrics.count(predicted, labels, mask)
        if not suffix:
            columns |= counts._asdict()
        for name, rate in zip(RATES, by.rates(counts), strict=True):
            columns[name + suffix] = np.where(evaluated, rate, np.nan)
            summary[name + suffix] = _mean(rate, evaluated)
        for name, rate in zip(RATES, by.rates(counts.total()), strict=True):
            micro[f"micro_{name}{suffix}"] = float(rate)
    summary |= micro
    summary["examples"] = int(mask.any(axis=1).sum())
    summary["labels_evaluated"] = int(evaluated.sum())
    summary["labels_total"] = labels.shape[1]
    values = {name: column.tolist() for name, column in columns.items()}
    return Report(
        summary={name: _plain(value) for name, value in summary.items()},
        per_label=[
            {name: _plain(column[k]) for name, column in values.items()}
            for k in range(labels.shape[1])
        ],
    )


def predict_with_parents(
    scores: metrics.Values,
    labels: metrics.Values,
    thresholds: metrics.Values,
    parents: Sequence[Sequence[int]],
    *,
    mask: metrics.Values | None = None,
    rules: str = OURS,
) -> np.ndarray:
    """The predictions that `evaluate` counts, bool `[N, K]`; for the arguments see there."""
    by = find_rules(rules)
    scores, labels, mask = metrics.checked(scores, labels, mask)
    thresholds = np.asarray(thresholds, np.float64)
    return by.add_parents(by.predict(scores, thresholds) & mask & _has_both(labels, mask), parents)


@dataclass(frozen=True)
class _Rules:
    """A set of rules: the details in which they differ."""

    candidates: tuple[float, ...]
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    add_parents: Callable[[np.ndarray, Sequence[Sequence[int]]], np.ndarray]
    rates: Callable[[metrics.Counts], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _lesanet_rates(counts: metrics.Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 as LesaNet computes them; recall is 1 without positives."""
    precision, recall, _ = metrics.rates(counts)
    recall = np.where(np.isnan(recall), 1.0, recall)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1.0)
    return precision, recall, f1


RULES = {
    OURS: _Rules(CANDIDATES, predict, add_parents, metrics.rates),
    # Rounded by np.arange as in LesaNet: the fourth is 0.6000000000000001.
    LESANET: _Rules(
        tuple(np.arange(0.3, 1, 0.1).tolist()), np.greater_equal, add_direct_parents, _lesanet_rates
    ),
}


def find_rules(name: str) -> _Rules:
    """Returns the rules with a name.

    Raises:
      InputError: the name is unknown.
    """
    if name not in RULES:
        raise InputError(f"rules {name!r} are unknown: choose one of {', '.join(RULES)}")
    return RULES[name]


def _has_both(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns bool `[K]`: whether the known elements of a label have positives and negatives."""
    return labels.any(axis=0) & (mask & ~labels).any(axis=0)


def _mean(values: np.ndarray, evaluated: np.ndarray) -> float:
    """Returns the mean over the evaluated labels, nan if there are none."""
    return float(values[evaluated].mean()) if evaluated.any() else math.nan


def _plain(value: float | int | bool) -> float | int | bool | None:
    """Returns a number as a JSON value: None for nan."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if isinstance(value, bool | float) else int(value)
