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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.experiments import patient_metrics as metrics
from benchmarks.experiments import patients
from maknet_jax import console
from maknet_jax.data import records
from maknet_jax.errors import InputError

OURS = "maknet"
NETWORKS = ("linear", OURS, "resnet18", "vgg16")  # by cost
TUNED_AT = 64  # pixels
RATES = (0.001, 0.003, 0.01)
EPOCHS = (6.0, 12.0)
FULL: dict[str, Any] = {
    "size": TUNED_AT,
    "seeds": [0, 1, 2],
    "networks": list(NETWORKS),
}
QUICK = {"seeds": [0], "networks": ["linear", OURS]}
FORMS = {"best": "each at its best", "common": "one recipe for all"}


GRID = [patients.Recipe(rate, epochs) for rate, epochs in itertools.product(RATES, EPOCHS)]


def grid(runs: patients.Runs, network: str) -> dict[patients.Recipe, float] | None:
    """Recipe -> macro AUC on the tuning patients; None if runs are missing."""
    aucs = {}
    for recipe in GRID:
        scores = runs.scores(network, recipe, size=TUNED_AT, seed=0, split=patients.TUNING)
        if scores is not None:
            ones = np.ones((1, len(scores.patients)))
            aucs[recipe] = float(metrics.macro(metrics.metric_draws(scores, ones)["auc"])[0])
    return aucs if len(aucs) == len(GRID) else None


def choose(grids: dict[str, dict[patients.Recipe, float]]) -> patients.Recipe:
    """The recipe with the best mean AUC over the networks; ties go to the first of `GRID`."""
    return max(GRID, key=lambda recipe: np.mean([grid[recipe] for grid in grids.values()]))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table and writes the JSON."""
    parser = patients.parser(__file__, __doc__, seeds="0,1,2")
    parser.add_argument("--networks", type=harness.words, help=f"default: {','.join(NETWORKS)}")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    for network in chosen.networks:
        if network not in NETWORKS:
            raise InputError(f"network {network!r} is unknown: choose from {', '.join(NETWORKS)}")
    with harness.run_folder(chosen.folder, "--folder") as folder:
        runs = patients.Runs(folder, chosen.patients, train=not chosen.report, quick=chosen.quick)
        results = measure(runs, chosen.networks, chosen.seeds, chosen.size)
    names = results["labels"]
    apart = [name for name, number in results["patients"].items() if number < metrics.ENOUGH]
    notes = [
        f"{chosen.size} x {chosen.size} pixels, seeds {', '.join(map(str, chosen.seeds))}; "
        "validation patients: " + ", ".join(f"{k} {v}" for k, v in results["patients"].items()),
        f"averages over {len(names) - len(apart)} organs; apart, with fewer than "
        f"{metrics.ENOUGH} patients: {', '.join(apart) or 'none'}",
        *(
            f"{FORMS[row['form']]}: {row['metric']} ({row['organs']}), MAKNet minus "
            f"{row['network']}: {console.format_interval(row['difference'], signed=True)}"
            for row in results["comparisons"]
        ),
        *([f"missing runs: {', '.join(runs.missing)}"] * bool(runs.missing)),
        *(["QUICK FORM: a few steps: the numbers are meaningless"] * chosen.quick),
    ]
    header = ["recipe", "network", "learning rate, epochs", "seeds", "AUC", "F1", "all: AUC", "F1"]
    rows = [
        [
            FORMS[row["form"]],
            row["network"],
            f"{row['recipe'][0]:g}, {row['recipe'][1]:g}",
            len(row["seeds"]),
            *(console.format_interval(row[key]) for key in ("auc", "f1", "auc_all", "f1_all")),
        ]
        for row in results["networks"]
    ]
    harness.report(__file__, argv, chosen, header, rows, notes, results)


def measure(
    runs: patients.Runs, networks: Sequence[str], seeds: Sequence[int], size: int
) -> dict[str, Any]:
    """Tunes, trains and scores the networks.

    Returns:
      The entries of the JSON: labels, patients (by label), grid, networks, by_seed, by_organ,
      comparisons and missing.
    """
    labels = records.open_dataset(runs.data(size)).vocabulary.names
    grids = {network: aucs for network in networks if (aucs := grid(runs, network)) is not None}
    recipes = {"best": {network: choose({network: aucs}) for network, aucs in grids.items()}}
    if len(grids) == len(networks):
        recipes["common"] = dict.fromkeys(networks, choose(grids))
    results: dict[str, Any] = {"labels": labels, "patients": {}}
    results["grid"] = [
        {"network": network, "rate": recipe.rate, "epochs": recipe.epochs, "tuning_auc": auc}
        for network, aucs in grids.items()
        for recipe, auc in aucs.items()
    ]
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("networks", "by_seed", "by_organ", "comparisons")
    }
    for form, by_network in recipes.items():
        scores = {
            network: runs.by_seed(network, recipe, size=size, seeds=seeds)
            for network, recipe in by_network.items()
        }
        scores = {network: by_seed for network, by_seed in scores.items() if by_seed}
        if scores:
            _add_rows(tables, results, form, by_network, scores)
    return results | tables | {"missing": runs.missing}


def _add_rows(
    tables: dict[str, list[dict[str, Any]]],
    results: dict[str, Any],
    form: str,
    recipes: Mapping[str, patients.Recipe],
    scores: Mapping[str, Mapping[int, metrics.SplitScores]],
) -> None:
    """Adds the rows of one form to the tables, and the patients by label to the results."""
    first = next(iter(next(iter(scores.values())).values()))
    weights, enough = metrics.draw_weights(first.patients), first.enough()
    counts = first.patients_by_label().tolist()
    results["patients"] = dict(zip(results["labels"], counts, strict=True))
    draws = {
        network: {seed: metrics.metric_draws(scored, weights) for seed, scored in by_seed.items()}
        for network, by_seed in scores.items()
    }
    for network, by_seed in draws.items():
        row = {"form": form, "network": network, "recipe": recipes[network]}
        averages = metrics.averages(list(by_seed.values()), enough)
        tables["networks"].append(row | {"seeds": list(by_seed)} | averages)
        for seed, each in by_seed.items():
            tables["by_seed"].append(row | {"seed": seed} | metrics.averages([each], enough))
        mean = metrics.mean_over_seeds(list(by_seed.values()))
        for k, label in enumerate(results["labels"]):
            values = {m: metrics.interval(v[:, k]) for m, v in mean.items()}
            tables["by_organ"].append(row | {"label": label} | values)
        if network != OURS and OURS in draws:
            rows = metrics.differences(draws[OURS], by_seed, enough)
            tables["comparisons"] += [{"form": form, "network": network} | row for row in rows]


if __name__ == "__main__":
    harness.run(main)
