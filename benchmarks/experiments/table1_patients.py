"""Table 1 on real patients: MAKNet, ResNet18, VGG16 and a linear model on OpenKBP.

    python benchmarks/experiments/table1_patients.py --folder runs/patients  # many hours
    python benchmarks/experiments/table1_patients.py --folder runs/patients --report
    python benchmarks/experiments/table1_patients.py --quick  # few steps, only to see it run

140 training, 30 tuning and 33 validation patients, seven organs, every third slice. Every network
is tuned alike at 64 x 64: three learning rates and two numbers of epochs with seed 0, scored on the
tuning patients; the rest is configs/openkbp.py. The table shows each network at its best, and all
with the one recipe whose mean over the networks is best; other sizes use the recipes of 64 x 64.
Differences are paired, MAKNet minus each: means over the seeds, with 95 % intervals of a bootstrap
over the validation patients. Averages are over the organs with enough patients, and over all seven.

Resumes in --folder; --report trains nothing and names the runs that are missing. For results see
benchmarks/RESULTS.md. Needs OpenKBP (data/README.md).
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from benchmarks import harness
from benchmarks.experiments import patients
from maknet_jax import console
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.model_table import CONFIGS
from maknet_jax.runs import config as configs

OURS = "maknet"
NETWORKS = ("linear", OURS, "resnet18", "vgg16")  # by cost
TUNED_AT = 64  # pixels
RATES = (0.001, 0.003, 0.01)
EPOCHS = (6.0, 12.0)
FULL: dict[str, Any] = {
    "size": TUNED_AT,
    "seeds": [0, 1, 2],
    "networks": list(NETWORKS),
    "changes": [],
}
QUICK = {"seeds": [0], "networks": ["linear", OURS], "changes": ["data.batch_size=8"]}
QUICK_SHARE = 0.002  # of the epochs
CHECKPOINT_STEPS = 50
FORMS = {"best": "each at its best", "common": "one recipe for all"}


class Recipe(NamedTuple):
    """What is tuned: learning rate and number of epochs."""

    rate: float
    epochs: float


class Trial(NamedTuple):
    """One training run."""

    network: str
    size: int
    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        """The name of its workdir."""
        rate, epochs = self.recipe
        return f"{self.network}-{self.size}-lr{rate:g}-epochs{epochs:g}-seed{self.seed}"


GRID = [Recipe(rate, epochs) for rate, epochs in itertools.product(RATES, EPOCHS)]


class Experiment:
    """The runs in a folder."""

    def __init__(
        self,
        folder: pathlib.Path,
        source: str | pathlib.Path,
        *,
        train: bool,
        share: float = 1.0,
        changes: Sequence[str] = (),
    ) -> None:
        """Sets up the experiment.

        Args:
          folder: of the prepared data and the runs.
          source: OpenKBP's folder.
          train: False only reads finished runs.
          share: factor of the numbers of epochs.
          changes: of all configs.
        """
        self.folder, self.source, self.train, self.share = folder, source, train, share
        self.changes = list(changes)
        self.missing: list[str] = []

    def data(self, size: int) -> pathlib.Path:
        """The prepared data set of an image size."""
        return patients.prepare_data(self.source, self.folder / f"shards-{size}", size)

    def scores(self, trial: Trial, split: str) -> patients.SplitScores | None:
        """The scores of a trial, which is trained first; None if it is missing."""
        run = self.folder / "runs" / trial.name
        if not self.train and not patients.is_finished(run):
            if trial.name not in self.missing:
                self.missing.append(trial.name)
            return None
        if not patients.is_finished(run):
            console.Log().say(trial.name)
        return patients.train_and_score(self.config(trial), run, [split])[split]

    def config(self, trial: Trial) -> ml_collections.ConfigDict:
        """The config openkbp with the network, the recipe and the seed of a trial."""
        rate, epochs = trial.recipe
        config = configs.load(
            "openkbp",
            [
                f"data.path={self.data(trial.size)}",
                f"data.size={trial.size}",
                f"seed={trial.seed}",
                f"optimizer.learning_rate={rate}",
                f"epochs={epochs * self.share}",
                f"checkpoint_every={CHECKPOINT_STEPS}",
                *self.changes,
            ],
        )
        if trial.network != OURS:
            with config.unlocked():
                config.model = configs.load(CONFIGS.get(trial.network, trial.network)).model
        return config

    def grid(self, network: str) -> dict[Recipe, float] | None:
        """Recipe -> macro AUC on the tuning patients; None if runs are missing."""
        aucs = {}
        for recipe in GRID:
            scores = self.scores(Trial(network, TUNED_AT, recipe, 0), patients.TUNING)
            if scores is not None:
                ones = np.ones((1, len(scores.patients)))
                aucs[recipe] = float(patients.macro(patients.metric_draws(scores, ones)["auc"])[0])
        return aucs if len(aucs) == len(GRID) else None


def choose(grids: dict[str, dict[Recipe, float]]) -> Recipe:
    """The recipe with the best mean AUC over the networks; ties go to the first of `GRID`."""
    return max(GRID, key=lambda recipe: np.mean([grid[recipe] for grid in grids.values()]))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--patients", default=str(patients.PATIENTS), help="OpenKBP's folder")
    parser.add_argument("--folder", help="folder of data and runs (default: temporary)")
    parser.add_argument("--networks", type=harness.words, help=f"default: {','.join(NETWORKS)}")
    parser.add_argument("--seeds", type=harness.seeds, help="default: 0,1,2")
    parser.add_argument("--report", action="store_true", help="train nothing, read finished runs")
    parser.add_argument(
        "--changes", type=harness.words, help="changes of all configs, FIELD=VALUE,..."
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    for network in chosen.networks:
        if network not in NETWORKS:
            raise InputError(f"network {network!r} is unknown: choose from {', '.join(NETWORKS)}")
    with harness.run_folder(chosen.folder, "--folder") as folder:
        experiment = Experiment(
            folder,
            chosen.patients,
            train=not chosen.report,
            share=QUICK_SHARE if chosen.quick else 1.0,
            changes=chosen.changes,
        )
        results = measure(experiment, chosen.networks, chosen.seeds, chosen.size)
    names = results["labels"]
    apart = [name for name, number in results["patients"].items() if number < patients.ENOUGH]
    notes = [
        f"{chosen.size} x {chosen.size} pixels, seeds {', '.join(map(str, chosen.seeds))}; "
        "validation patients: " + ", ".join(f"{k} {v}" for k, v in results["patients"].items()),
        f"averages over {len(names) - len(apart)} organs; apart, with fewer than "
        f"{patients.ENOUGH} patients: {', '.join(apart) or 'none'}",
        *(
            f"{FORMS[row['form']]}: {row['metric']} ({row['organs']}), MAKNet minus "
            f"{row['network']}: {patients.format_interval(row['difference'], signed=True)}"
            for row in results["comparisons"]
        ),
        *([f"missing runs: {', '.join(experiment.missing)}"] * bool(experiment.missing)),
        *(["QUICK FORM: a few steps: the numbers are meaningless"] * chosen.quick),
    ]
    header = ["recipe", "network", "learning rate, epochs", "seeds", "AUC", "F1", "all: AUC", "F1"]
    rows = [
        [
            FORMS[row["form"]],
            row["network"],
            f"{row['recipe'][0]:g}, {row['recipe'][1]:g}",
            len(row["seeds"]),
            *(patients.format_interval(row[key]) for key in ("auc", "f1", "auc_all", "f1_all")),
        ]
        for row in results["networks"]
    ]
    harness.report(__file__, argv, chosen, header, rows, notes, results)


def measure(
    experiment: Experiment, networks: Sequence[str], seeds: Sequence[int], size: int
) -> dict[str, Any]:
    """Tunes, trains and scores the networks.

    Returns:
      The entries of the JSON: labels, patients (by label), grid, networks, by_seed, by_organ,
      comparisons and missing.
    """
    labels = records.open_dataset(experiment.data(size)).vocabulary.names
    grids = {
        network: grid for network in networks if (grid := experiment.grid(network)) is not None
    }
    recipes = {"best": {network: choose({network: grid}) for network, grid in grids.items()}}
    if len(grids) == len(networks):
        recipes["common"] = dict.fromkeys(networks, choose(grids))
    results: dict[str, Any] = {"labels": labels, "patients": {}}
    results["grid"] = [
        {"network": network, "rate": recipe.rate, "epochs": recipe.epochs, "tuning_auc": auc}
        for network, grid in grids.items()
        for recipe, auc in grid.items()
    ]
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("networks", "by_seed", "by_organ", "comparisons")
    }
    for form, by_network in recipes.items():
        scores = {
            network: {
                seed: scored
                for seed in seeds
                if (
                    scored := experiment.scores(
                        Trial(network, size, recipe, seed), patients.VALIDATION
                    )
                )
            }
            for network, recipe in by_network.items()
        }
        scores = {network: by_seed for network, by_seed in scores.items() if by_seed}
        if scores:
            _add_rows(tables, results, form, by_network, scores)
    return results | tables | {"missing": experiment.missing}


def _add_rows(
    tables: dict[str, list[dict[str, Any]]],
    results: dict[str, Any],
    form: str,
    recipes: Mapping[str, Recipe],
    scores: Mapping[str, Mapping[int, patients.SplitScores]],
) -> None:
    """Adds the rows of one form to the tables, and the patients by label to the results."""
    first = next(iter(next(iter(scores.values())).values()))
    weights, counts = patients.draw_weights(first.patients), first.patients_by_label()
    enough = counts >= patients.ENOUGH
    results["patients"] = dict(zip(results["labels"], counts.tolist(), strict=True))
    draws = {
        network: {seed: patients.metric_draws(scored, weights) for seed, scored in by_seed.items()}
        for network, by_seed in scores.items()
    }
    for network, by_seed in draws.items():
        mean = patients.mean_over_seeds(list(by_seed.values()))
        row = {"form": form, "network": network, "recipe": recipes[network]}
        averages = {m: patients.interval(patients.macro(v, enough)) for m, v in mean.items()}
        averages |= {f"{m}_all": patients.interval(patients.macro(v)) for m, v in mean.items()}
        tables["networks"].append(row | {"seeds": list(by_seed)} | averages)
        for seed, each in by_seed.items():
            values = {m: patients.interval(patients.macro(v, enough)) for m, v in each.items()}
            tables["by_seed"].append(row | {"seed": seed} | values)
        for k, label in enumerate(results["labels"]):
            values = {m: patients.interval(v[:, k]) for m, v in mean.items()}
            tables["by_organ"].append(row | {"label": label} | values)
        shared = [seed for seed in by_seed if seed in draws.get(OURS, {})]
        if network == OURS or not shared:
            continue
        ours, theirs = (
            patients.mean_over_seeds([draws[name][seed] for seed in shared])
            for name in (OURS, network)
        )
        for metric in ours:
            for title, chosen in (("enough patients", enough), ("all", np.ones_like(enough))):
                gain = patients.macro(ours[metric], chosen) - patients.macro(theirs[metric], chosen)
                tables["comparisons"].append(
                    {"form": form, "network": network, "organs": title, "metric": metric}
                    | {"difference": patients.interval(gain), "seeds": shared}
                )


if __name__ == "__main__":
    harness.run(main)
