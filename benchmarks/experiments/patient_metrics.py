"""Shared by the experiments on real patients: metrics with a bootstrap over patients.

Networks that score the same records are compared on the same draws, see evaluation/bootstrap.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax.evaluation import bootstrap, protocol
from maknet_jax.evaluation.bootstrap import Draws as Draws
from maknet_jax.evaluation.bootstrap import draw_weights as draw_weights
from maknet_jax.evaluation.bootstrap import interval as interval
from maknet_jax.evaluation.bootstrap import macro as macro

ENOUGH = 20  # patients with a positive record; labels with fewer are listed apart
ENOUGH_TITLE = "enough patients"


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
        return bootstrap.patients_by_label(self.labels, self.known, self.patients)


def metric_draws(scores: SplitScores, weights: np.ndarray) -> Draws:
    """`bootstrap.metric_draws` at the thresholds of the tuning patients."""
    predicted = protocol.predict(scores.scores, scores.thresholds)
    return bootstrap.metric_draws(scores.scores, scores.labels, scores.known, predicted, weights)


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
