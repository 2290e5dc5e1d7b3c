"""Intervals of metrics by a bootstrap over patients.

Records of one patient are alike, so patients are drawn, not records (Efron and Tibshirani, 1993).
A draw is a weight for each record, so that networks which score the same records can be compared on
the same draws.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95

Draws = dict[str, np.ndarray]  # metric -> `[1 + draws, K]`, see `metric_draws`


def draw_weights(patients: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap samples of patients as weights of their records.

    Args:
      patients: int `[N]`, the patient of each record, from 0.
      draws: number of samples.
      seed: of the samples.

    Returns:
      float `[1 + draws, N]`: how often each record is drawn; the first row is 1, the sample itself.
    """
    count = int(patients.max()) + 1
    samples = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    return np.concatenate([np.ones((1, count)), samples])[:, patients]


def weighted_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of one label for several weightings of the records; ties count half.

    Args:
      scores: float `[N]`.
      labels: bool `[N]`.
      weights: float `[D, N]`.

    Returns:
      float `[D]`; nan where the positives or the negatives have no weight.
    """
    distinct, place = np.unique(scores, return_inverse=True)
    by_score = np.zeros((2, len(weights), len(distinct)))
    for kind, chosen in enumerate((labels, ~labels)):
        np.add.at(by_score[kind].T, place[chosen], weights[:, chosen].T)
    positives, negatives = by_score
    below = np.cumsum(negatives, axis=1) - negatives / 2
    total = positives.sum(axis=1) * negatives.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, (positives * below).sum(axis=1) / total, np.nan)


def metric_draws(
    scores: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray,
    predicted: np.ndarray,
    weights: np.ndarray,
) -> Draws:
    """AUC and F1 of every label for several weightings of the records.

    Args:
      scores: float `[N, K]`.
      labels: bool `[N, K]`.
      known: bool `[N, K]`, False where the label is unknown.
      predicted: bool `[N, K]`.
      weights: float `[D, N]`, see `draw_weights`.

    Returns:
      {"auc": float `[D, K]`, "f1": float `[D, K]`}, nan without positives or negatives.
    """
    auc, f1 = [], []
    for label in range(scores.shape[1]):
        rows = known[:, label]
        present, weighted = labels[rows, label], weights[:, rows]
        auc.append(weighted_auc(scores[rows, label], present, weighted))
        hits = predicted[rows, label]
        tp, wrong = weighted @ (present & hits), weighted @ (present ^ hits)
        with np.errstate(invalid="ignore"):
            f1.append(np.where(np.isnan(auc[-1]), np.nan, 2 * tp / (2 * tp + wrong)))
    return {"auc": np.stack(auc, axis=1), "f1": np.stack(f1, axis=1)}


def interval(draws: np.ndarray) -> list[float]:
    """[value, low, high] from `[1 + draws]`: the sample's own value and the percentile interval.

    nan draws (a label without positives or negatives in a resample) are left out.
    """
    low, high = np.nanpercentile(draws[1:], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return [round(float(value), 5) for value in (draws[0], low, high)]


def macro(by_label: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
    """Means over the chosen labels (default: all) that have a value, `[D, K]` -> `[D]`."""
    return np.nanmean(by_label if chosen is None else by_label[:, chosen], axis=1)


def patients_by_label(labels: np.ndarray, known: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """int `[K]`: the number of patients with a positive record of each label."""
    return np.array(
        [
            len(np.unique(patients[column & rows]))
            for column, rows in zip(labels.T, known.T, strict=True)
        ]
    )


def summarize(
    draws: Draws, names: Sequence[str], counts: Sequence[int] | np.ndarray, patients: int
) -> dict[str, Any]:
    """The intervals of a split as JSON values.

    Args:
      draws: see `metric_draws`.
      names: of the K labels.
      counts: patients with a positive record, by label.
      patients: in total.

    Returns:
      patients, auc and f1 (macro averages, see `interval`), and labels: name -> patients, auc, f1;
      a label without positives or negatives has no auc and f1.
    """
    labels = {}
    for column, (name, count) in enumerate(zip(names, counts, strict=True)):
        labels[name] = {"patients": int(count)} | {
            metric: interval(values[:, column])
            for metric, values in draws.items()
            if not np.isnan(values[0, column])
        }
    averages = {metric: interval(macro(values)) for metric, values in draws.items()}
    return {"patients": patients} | averages | {"labels": labels}
