"""Shared by the experiments on real patients: data, training runs, scores and tables.

The 170 patients that OpenKBP publishes for training are split by a seeded hash into 140 training
and 30 tuning patients; its 33 validation patients are scored for the tables only (split "test").
"""

import argparse
import csv
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks import harness
from benchmarks.experiments import finished_runs
from benchmarks.experiments import patient_metrics as metrics
from benchmarks.real_data import DATA
from maknet_jax import console, evaluate, files, prepare, train
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.model_table import CONFIGS
from maknet_jax.prepare import Rules, SplitOptions
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir

TRAINING, TUNING, VALIDATION, UNLABELLED = "train", "val", "test", "unlabelled"
SHARES = {TRAINING: 0.82, TUNING: 0.18}
RULES = Rules(every=3, unknown_below=("spinal_cord", "esophagus"))
ORIGIN = {
    "source": "OpenKBP: head, neck, upper chest",
    "citation": "Babier et al., Medical Physics 48 (2021), doi:10.1002/mp.14845",
    "licence": "MIT (ababier/open-kbp); CT from TCIA",
}
PATIENTS = DATA / "openkbp"
CHECKPOINT_STEPS = 50
BATCH = 32  # labelled images per step, and as many pseudo-labelled ones
QUICK_SHARE = 0.002  # of the epochs
HEADER = ["network", "seeds", "AUC", "F1"]  # of `table_rows`


def parser(file: str, description: str | None, seeds: str) -> argparse.ArgumentParser:
    """Returns a parser with --patients, --folder, --seeds and --report.

    Args:
      file: the experiment's `__file__`.
      description: its docstring.
      seeds: the default of --seeds, for its help.
    """
    result = harness.parser(file, description, repeats=False)
    result.add_argument("--patients", default=str(PATIENTS), help="OpenKBP's folder")
    result.add_argument("--folder", help="folder of data and runs (default: temporary)")
    result.add_argument("--seeds", type=harness.seeds, help=f"default: {seeds}")
    result.add_argument("--report", action="store_true", help="train nothing, read finished runs")
    return result


def prepare_data(
    patients: str | pathlib.Path,
    out: str | pathlib.Path,
    size: int,
    *,
    splits: pathlib.Path | None = None,
    organs: Sequence[str] = (),
) -> pathlib.Path:
    """Prepares OpenKBP's training and validation patients; returns `out`. Skips a finished one.

    Args:
      patients: the folder with `train` and `validation`.
      out: the folder to write.
      size: edge of the images in pixels.
      splits: CSV with the columns case and split; None takes the fixed split.
      organs: the labels; all by default.

    Raises:
      InputError: `patients` lacks one of the folders, or `out` has another image size.
    """
    patients, out = pathlib.Path(patients), pathlib.Path(out)
    if (out / "dataset.json").is_file():
        if (existing := records.open_dataset(out).size) != size:
            raise InputError(f"{out} has --size {existing}, not {size}: choose another --folder")
        return out
    training, validation = folders = [patients / "train", patients / "validation"]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: data/README.md says how to get OpenKBP")
    label_table = out.with_name(f"{out.name}-labels.csv") if organs else None
    if label_table:
        console.write_table(label_table, ("mask", "label"), [(name, name) for name in organs])
    unknown_below = tuple(name for name in RULES.unknown_below if name in organs or not organs)
    prepare.prepare_segmentations(
        [str(training), str(validation) if splits else f"{VALIDATION}={validation}"],
        out,
        label_table=label_table,
        rules=dataclasses.replace(RULES, unknown_below=unknown_below),
        splits=SplitOptions(splits) if splits else SplitOptions(shares=SHARES),
        size=size,
        salt_file=out.parent / "salt",
        origin=ORIGIN,
    )
    return out


def case_splits(data: pathlib.Path) -> list[tuple[str, str]]:
    """(case, split) of all patients of a prepared data set."""
    with (data / "cases.csv").open(newline="", encoding="utf-8") as file:
        return [(row["case"], row["split"]) for row in csv.DictReader(file)]


def split_patients(
    names: Sequence[tuple[str, str]], labelled: int, seed: int
) -> list[tuple[str, str]]:
    """Draws the labelled patients; the other training patients become unlabelled.

    Args:
      names: (case, split) of all patients.
      labelled: number of training patients that keep their labels.
      seed: of the draw.

    Returns:
      (case, split) of all patients.

    Raises:
      InputError: there are fewer training patients.
    """
    training = sorted(case for case, split in names if split == TRAINING)
    if labelled > len(training):
        raise InputError(f"--labelled {labelled}: there are only {len(training)} training patients")
    drawn = set(np.random.default_rng(seed).permutation(training)[:labelled].tolist())
    return [
        (case, UNLABELLED if split == TRAINING and case not in drawn else split)
        for case, split in names
    ]


def step_changes(data: pathlib.Path, steps: int, rate: float) -> tuple[str, ...]:
    """Changes of the config openkbp that train for a number of steps.

    Args:
      data: the data set.
      steps: updates; the network is scored ten times.
      rate: learning rate.
    """
    dataset = records.open_dataset(data)
    epochs = steps * BATCH / dataset.split(TRAINING)["count"]
    return (
        f"optimizer.learning_rate={rate}",
        f"data.size={dataset.size}",
        f"data.batch_size={BATCH}",
        f"pseudo.batch_size={BATCH}",
        f"epochs={epochs}",
        f"evaluate_every={epochs / 10}",
        f"checkpoint_every={CHECKPOINT_STEPS}",
    )


class Recipe(NamedTuple):
    """What is tuned: the learning rate and the number of epochs."""

    rate: float
    epochs: float


class Runs:
    """The prepared data and the training runs in a folder.

    Attributes:
      missing: names of the runs that were asked for and are not finished.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        patients: str | pathlib.Path = PATIENTS,
        *,
        train: bool = True,
        quick: bool = False,
    ) -> None:
        """Sets up a folder.

        Args:
          folder: of the data and the runs.
          patients: OpenKBP's folder.
          train: False only reads finished runs.
          quick: train a few steps only.
        """
        self.folder, self._patients = folder, patients
        self._train, self._quick = train, quick
        self.missing: list[str] = []

    def data(self, size: int) -> pathlib.Path:
        """The prepared data set of an image size."""
        return prepare_data(self._patients, self.folder / f"shards-{size}", size)

    def few_labels(
        self,
        out: pathlib.Path,
        labelled: int,
        *,
        size: int,
        seed: int,
        organs: Sequence[str] = (),
    ) -> pathlib.Path:
        """Prepares the patients with the labels of a few; returns `out`.

        Args:
          out: the folder to write; a finished one is kept.
          labelled: number of training patients that keep their labels.
          size: edge of the images in pixels.
          seed: of the draw of these patients.
          organs: the labels; all by default.
        """
        splits = out.with_name(f"{out.name}-splits.csv")
        if not (out / "dataset.json").is_file():
            rows = split_patients(case_splits(self.data(size)), labelled, seed)
            console.write_table(splits, ("case", "split"), rows)
        return prepare_data(self._patients, out, size, splits=splits, organs=organs)

    def config(
        self, network: str, recipe: Recipe, *, size: int, seed: int, **options: Any
    ) -> ml_collections.ConfigDict:
        """The config openkbp with another network, recipe and seed.

        Args:
          network: name of the network.
          recipe: learning rate and epochs.
          size: edge of the images in pixels.
          seed: of the run.
          **options: of the model.
        """
        changes = {
            "data.path": self.data(size),
            "data.size": size,
            "seed": seed,
            "optimizer.learning_rate": recipe.rate,
            "epochs": recipe.epochs * (QUICK_SHARE if self._quick else 1),
            "checkpoint_every": CHECKPOINT_STEPS,
        }
        config = configs.load("openkbp", [f"{name}={value}" for name, value in changes.items()])
        with config.unlocked():
            if network != config.model.name:
                config.model = configs.load(CONFIGS.get(network, network)).model
            config.model.options.update(options)
        return config

    def scores(
        self,
        network: str,
        recipe: Recipe,
        *,
        size: int,
        seed: int,
        split: str,
        title: str = "",
        **options: Any,
    ) -> metrics.SplitScores | None:
        """The scores of a run, which is trained first; None if it is missing.

        Args:
          network: name of the network.
          recipe: learning rate and epochs.
          size: edge of the images in pixels.
          seed: of the run.
          split: to score.
          title: names the run if it has other options than the network's defaults.
          **options: of the model.
        """
        name = "quick-" * self._quick
        name += f"{title or network}-{size}-lr{recipe.rate:g}-epochs{recipe.epochs:g}-seed{seed}"
        run = self.folder / "runs" / name
        if not finished_runs.is_finished(run):
            if not self._train:
                self.missing += [name] * (name not in self.missing)
                return None
            console.Log().say(name)
            train.train(self.config(network, recipe, size=size, seed=seed, **options), run)
        return split_scores(run, split)

    def by_seed(
        self,
        network: str,
        recipe: Recipe,
        *,
        size: int,
        seeds: Sequence[int],
        split: str = VALIDATION,
        **options: Any,
    ) -> dict[int, metrics.SplitScores]:
        """Seed -> scores of a split, of the runs that are not missing.

        Args:
          network: name of the network.
          recipe: learning rate and epochs.
          size: edge of the images in pixels.
          seeds: of the runs.
          split: to score; the validation patients by default.
          **options: see `scores`.
        """
        scored = {
            seed: self.scores(network, recipe, size=size, seed=seed, split=split, **options)
            for seed in seeds
        }
        return {seed: scores for seed, scores in scored.items() if scores is not None}


def split_scores(folder: pathlib.Path, split: str) -> metrics.SplitScores:
    """Scores a split with the best weights of a workdir, or reads the scores of an earlier call."""
    path = folder / f"scores-{split}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return metrics.SplitScores(**arrays)
    run = workdir.open_run(folder)
    dataset = records.open_dataset(run.data_path)
    scored = evaluate.score_splits(run, dataset, [split], run.batch_size)[split]
    source = dataset.source(split)
    names = [source[index].meta["patient"] for index in range(len(source))]
    result = metrics.SplitScores(
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


def table_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of the table, in the order of `HEADER`."""
    return [
        [row["network"], len(row["seeds"]), *map(console.format_interval, (row["auc"], row["f1"]))]
        for row in results["networks"]
    ]


def notes(results: Mapping[str, Any], *, quick: bool) -> list[str]:
    """A line for each comparison, the missing runs and a warning."""
    lines = [
        f"{row['network']} minus {row['control']}, {row['metric']}: "
        f"{console.format_interval(row['difference'], signed=True)}, "
        f"above in {row['above']} of {len(row['seeds'])} seeds"
        for row in results["comparisons"]
    ]
    lines += [f"missing: {', '.join(results['missing'])}"] * bool(results["missing"])
    return lines + ["QUICK FORM: a few steps: the numbers are meaningless"] * quick


def collect(
    workdirs: Mapping[int, Mapping[str, pathlib.Path]],
    folder: pathlib.Path,
    comparisons: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Scores the finished runs on the validation patients and compares them.

    Args:
      workdirs: seed -> network -> workdir.
      folder: the folder of all runs.
      comparisons: (network, control) by name.

    Returns:
      The entries of the JSON: networks, comparisons and missing.
    """
    draws: dict[str, dict[int, metrics.Draws]] = {}
    missing, weights, enough = [], None, None
    for seed, by_network in workdirs.items():
        for network, run in by_network.items():
            if not finished_runs.is_finished(run):
                missing.append(run.relative_to(folder).as_posix())
                continue
            scores = split_scores(run, VALIDATION)
            if weights is None:
                weights, enough = metrics.draw_weights(scores.patients), scores.enough()
            draws.setdefault(network, {})[seed] = metrics.metric_draws(scores, weights)
    if enough is None:
        return {"networks": [], "comparisons": [], "missing": missing}
    return {
        "networks": [
            {"network": network, "seeds": list(by_seed)}
            | metrics.averages(list(by_seed.values()), enough)
            for network, by_seed in draws.items()
        ],
        "comparisons": [
            row
            for network, control in comparisons
            if network in draws and control in draws
            for row in metrics.compare(draws, network, control, enough)
        ],
        "missing": missing,
    }
