"""Shared by the experiments on real patients: data, scores per record, bootstrap over patients.

The 170 patients that OpenKBP publishes for training are split by a seeded hash into 140 training
and 30 tuning patients; its 33 validation patients are scored for the tables only (split "test").
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.real_data import DATA
from maknet_jax import evaluate, files, prepare, train
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation import protocol
from maknet_jax.prepare import Rules, SplitOptions
from maknet_jax.runs import workdir

TRAINING, TUNING, VALIDATION = "train", "val", "test"
SHARES = {TRAINING: 0.82, TUNING: 0.18}
RULES = Rules(every=3, unknown_below=("spinal_cord", "esophagus"))
ORIGIN = {
    "source": "OpenKBP: head, neck, upper chest",
    "citation": "Babier et al., Medical Physics 48 (2021), doi:10.1002/mp.14845",
    "licence": "MIT (ababier/open-kbp); CT from TCIA",
}
PATIENTS = DATA / "openkbp"
ENOUGH = 20  # patients with a usable mask; labels with fewer are listed apart
DRAWS = 2000  # of the bootstrap
LEVEL = 0.95


def prepare_data(patients: str | pathlib.Path, out: str | pathlib.Path, size: int) -> pathlib.Path:
    """Prepares OpenKBP's training and validation patients; returns `out`. Skips a finished one.

    Args:
      patients: the folder with `train` and `validation`.
      out: the folder to write.
      size: edge of the images in pixels.

    Raises:
      InputError: `patients` lacks one of the folders.
    """
    patients, out = pathlib.Path(patients), pathlib.Path(out)
    if (out / "dataset.json").is_file():
        return out
    folders = [patients / "train", patients / "validation"]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: data/README.md says how to get OpenKBP")
    prepare.prepare_segmentations(
        [str(folders[0]), f"{VALIDATION}={folders[1]}"],
        out,
        rules=RULES,
        splits=SplitOptions(shares=SHARES),
        size=size,
        salt_file=out.parent / "salt",
        **ORIGIN,
    )
    return out


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

    def patients_by_label(self) -> np.ndarray:
        """int `[K]`: the number of patients with a positive record of each label."""
        return np.array(
            [
                len(np.unique(self.patients[column & known]))
                for column, known in zip(self.labels.T, self.known.T, strict=True)
            ]
        )


def train_and_score(
    config: ml_collections.ConfigDict, folder: pathlib.Path, splits: Sequence[str]
) -> dict[str, SplitScores]:
    """Trains in `folder` (resumes, skips a finished run) and scores splits with the best weights.

    The scores are kept in `folder`, so that a table can be made again without scoring.
    """
    if not is_finished(folder):
        train.train(config, folder)
    return {split: split_scores(folder, split) for split in splits}


def is_finished(folder: pathlib.Path) -> bool:
    """Whether the training in `folder` is finished."""
    return (folder / "summary.json").is_file()


def split_scores(folder: pathlib.Path, split: str) -> SplitScores:
    """Scores a split with the best weights of a workdir, or reads the scores of an earlier call."""
    path = folder / f"scores-{split}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return SplitScores(**arrays)
    run = workdir.open_run(folder)
    dataset = records.open_dataset(run.data_path)
    scored = evaluate.score_splits(run, dataset, [split], run.batch_size)[split]
    source = dataset.source(split)
    names = [source[index].meta["patient"] for index in range(len(source))]
    result = SplitScores(
        scored.scores,
        scored.labels > 0,
        scored.label_mask,
        np.unique(names, return_inverse=True)[1],
        np.asarray(run.thresholds),
    )
    if jax.process_index() == 0:
        with files.write_whole(path, "wb") as file:
            np.savez(file, **dataclasses.asdict(result))
    return result


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


def metric_draws(scores: SplitScores, weights: np.ndarray) -> dict[str, np.ndarray]:
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


def mean_over_seeds(draws: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean of `metric_draws` over runs that differ in their seed."""
    return {name: np.mean([each[name] for each in draws], axis=0) for name in draws[0]}


def format_interval(values: Sequence[float], signed: bool = False) -> str:
    """`0.981 (0.975 to 0.986)`."""
    sign = "+" if signed else ""
    value, low, high = (f"{number:{sign}.3f}" for number in values)
    return f"{value} ({low} to {high})"


def summary_of(folder: pathlib.Path) -> dict[str, Any]:
    """Parameters, step and data fingerprint of a finished run, for the stored results."""
    summary = files.read_json(folder / "summary.json")
    return {name: summary[name] for name in ("parameters", "steps") if name in summary}
