"""Shared by the experiments on real patients: metrics with a bootstrap over patients.

The bootstrap draws patients with replacement and weights their records, so that networks which are
scored on the same records are compared on the same draws.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax.evaluation import protocol

ENOUGH = 20  # patients with a positive record; labels with fewer are listed apart
ENOUGH_TITLE = "enough patients"
DRAWS = 2000
LEVEL = 0.95

Draws = dict[str, np.ndarray]  # metric -> `[1 + draws, K]`, see `metric_draws`


@dataclasses.dataclass(frozen=True)
class SplitScores:
    """The scores of a network for the records of a split.

    Attributes:
      scores: float32 `[N, K]`, sigmoids of the logits.
      labels: bool `[N, K]`.
      known: bool `[N, K]`, False where the label is unknown.
      patients: int `[N]`, numbers of the patients from 0.
      thresholds: float `[K]`, chosen on the tuning patients.
    """

    scores: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    patients: np.ndarray
    thresholds: np.ndarray

    def enough(self) -> np.ndarray:
        """bool `[K]`: the labels that enough patients have; all of them if none has enough."""
        enough = self.patients_by_label() >= ENOUGH
        return enough if enough.any() else np.ones_like(enough)

    def patients_by_label(self) -> np.ndarray:
        """int `[K]`: the number of patients with a positive record of each label."""
        return np.array(
            [
                len(np.unique(self.patients[column & known]))
                for column, known in zip(self.labels.T, self.known.T, strict=True)
            ]
        )


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


def metric_draws(scores: SplitScores, weights: np.ndarray) -> Draws:
    """AUC and F1 of every label for several weightings of the records.

    Args:
      scores: of the split.
      weights: float `[D, N]`, see `draw_weights`.

    Returns:
      {"auc": float `[D, K]`, "f1": float `[D, K]`}; F1 at the thresholds of the tuning patients,
      nan without positives or negatives.
    """
    predicted = protocol.predict(scores.scores, scores.thresholds)
    auc, f1 = [], []
    for label in range(scores.scores.shape[1]):
        known = scores.known[:, label]
        labels, weighted = scores.labels[known, label], weights[:, known]
        auc.append(weighted_auc(scores.scores[known, label], labels, weighted))
        hits = predicted[known, label]
        tp, wrong = weighted @ (labels & hits), weighted @ (labels ^ hits)
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


def averages(draws: Sequence[Draws], enough: np.ndarray) -> dict[str, list[float]]:
    """Macro averages of the mean over the seeds, with their intervals.

    Args:
      draws: `metric_draws` of each seed.
      enough: bool `[K]`, the labels that enough patients have.

    Returns:
      auc and f1 over these labels, auc_all and f1_all over all.
    """
    mean = mean_over_seeds(draws)
    some = {metric: interval(macro(values, enough)) for metric, values in mean.items()}
    return some | {f"{metric}_all": interval(macro(values)) for metric, values in mean.items()}


def mean_over_seeds(draws: Sequence[Draws]) -> Draws:
    """The mean of `metric_draws` over runs that differ in their seed."""
    return {name: np.mean([each[name] for each in draws], axis=0) for name in draws[0]}


def differences(
    ours: Mapping[int, Draws],
    theirs: Mapping[int, Draws],
    enough: np.ndarray,
) -> list[dict[str, Any]]:
    """Paired differences of the means over the seeds that two networks share, ours minus theirs.

    Args:
      ours: seed -> `metric_draws`.
      theirs: the same with the same weights.
      enough: bool `[K]`, the labels that enough patients have.

    Returns:
      Rows with `organs`, `metric`, `difference` (see `interval`) and `seeds`; none without a
      shared seed.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return []
    means = [mean_over_seeds([runs[seed] for seed in shared]) for runs in (ours, theirs)]
    rows = []
    for metric in means[0]:
        for title, chosen in ((ENOUGH_TITLE, enough), ("all", np.ones_like(enough))):
            gain = macro(means[0][metric], chosen) - macro(means[1][metric], chosen)
            row = {"organs": title, "metric": metric, "difference": interval(gain)}
            rows.append(row | {"seeds": shared})
    return rows


def format_interval(values: Sequence[float], signed: bool = False) -> str:
    """`0.981 (0.975 to 0.986)`."""
    sign = "+" if signed else ""
    value, low, high = (f"{number:{sign}.3f}" for number in values)
    return f"{value} ({low} to {high})"


def compare(
    draws: Mapping[str, Mapping[int, Draws]],
    network: str,
    control: str,
    enough: np.ndarray,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Differences of two networks with intervals over seeds and patients.

    Args:
      draws: network -> seed -> `metric_draws`, drawn with the same weights.
      network: name of the first.
      control: name of the second.
      enough: bool `[K]`, the labels to average.
      seed: of the bootstrap over seeds.

    Returns:
      A row per metric; none without a shared seed.
    """
    shared = sorted(draws[network].keys() & draws[control].keys())
    rows = []
    for metric in ("auc", "f1") if shared else ():
        gains = np.stack(
            [
                macro(draws[network][number][metric], enough)
                - macro(draws[control][number][metric], enough)
                for number in shared
            ]
        )
        picked = np.random.default_rng(seed).integers(len(shared), size=gains.shape)
        picked[:, 0] = np.arange(len(shared))  # the sample itself
        resampled = np.take_along_axis(gains, picked, axis=0).mean(axis=0)
        row = {"network": network, "control": control, "metric": metric, "seeds": shared}
        above = int((gains[:, 0] > 0).sum())
        rows.append(row | {"difference": interval(resampled), "above": above})
    return rows
