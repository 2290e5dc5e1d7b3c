"""Measures the cost of calling an organ absent if it has no contour (OpenKBP, real patients).

    python benchmarks/experiments/missing_is_absent.py --folder runs/missing  # minutes
    python benchmarks/experiments/missing_is_absent.py --quick  # few patients, only to see it run

The same patients are prepared twice: with unknown labels (no mask, an empty mask, below the lowest
contour of cord and oesophagus), and with `--missing-is-absent` and no rule below contours. The same
network trains on both. Both are scored on the known labels of the tuning patients; the validation
patients of the challenge are not used.

Expect a mean AUC of 0.97 with unknown labels and 0.95 with absent ones (benchmarks/RESULTS.md).
Needs OpenKBP (data/README.md). Resumes in --folder if interrupted.
"""

import argparse
import csv
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.experiments import patients
from maknet_jax import console, evaluate, prepare, train
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.prepare import Rules, SplitOptions
from maknet_jax.runs import config as configs

FULL: dict[str, Any] = {"size": 64, "seeds": [0, 1, 2], "networks": ["linear"], "epochs": 40}
QUICK = {"size": 32, "seeds": [0], "epochs": 2}
FORMS = {
    "unknown": patients.RULES,
    "absent": Rules(every=patients.RULES.every, missing_is_absent=True),
}
QUICK_CASES = 16
METRICS = ("auc", "f1_at_0.5", "precision_at_0.5", "recall_at_0.5")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares, trains and scores, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__, repeats=False)
    parser.add_argument(
        "--patients", default=str(patients.PATIENTS / "train"), help="patients of OpenKBP"
    )
    parser.add_argument("--folder", help="folder for data and runs (default: temporary)")
    parser.add_argument("--networks", type=harness.words, help="configs (default: linear)")
    parser.add_argument("--seeds", type=harness.seeds, help="default: 0,1,2")
    parser.add_argument("--epochs", type=options.count, help="training epochs (default: 40)")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    if not pathlib.Path(chosen.patients).is_dir():
        raise InputError(f"{chosen.patients} is not a folder: data/README.md says how to get it")
    with harness.run_folder(chosen.folder, "--folder") as folder:
        shards = _prepare(chosen, folder)
        results = {
            network: {form: _score(chosen, folder, shards, network, form) for form in FORMS}
            for network in chosen.networks
        }
    harness.report(
        __file__,
        argv,
        chosen,
        ["network, missing organs", "label", "AUC", "F1 at 0.5", "precision", "recall"],
        _rows(results),
        [
            f"means of {len(chosen.seeds)} seeds, {chosen.size} x {chosen.size}, every "
            f"{patients.RULES.every}rd slice, {chosen.epochs} epochs; tuning patients, known "
            "labels only",
            *(["QUICK FORM: few patients and epochs: the numbers are meaningless"] * chosen.quick),
        ],
        {"results": results},
    )


def _prepare(chosen: argparse.Namespace, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Prepares the patients in both forms; returns the data sets by form."""
    splits = SplitOptions(shares=patients.SHARES)
    if chosen.quick:
        cases = sorted(path.name for path in pathlib.Path(chosen.patients).iterdir())[:QUICK_CASES]
        rows = [(name, "train" if number % 4 else "val") for number, name in enumerate(cases)]
        console.write_table(folder / "splits.csv", ("case", "split"), rows)
        splits = SplitOptions(folder / "splits.csv")
    shards = {form: folder / "shards" / form for form in FORMS}
    for form, rules in FORMS.items():
        if not (shards[form] / "dataset.json").is_file():
            prepare.prepare_segmentations(
                [chosen.patients],
                shards[form],
                rules=rules,
                splits=splits,
                size=chosen.size,
            )
    return shards


def _score(
    chosen: argparse.Namespace,
    folder: pathlib.Path,
    shards: dict[str, pathlib.Path],
    network: str,
    form: str,
) -> list[dict[str, Any]]:
    """Metrics by label on the tuning patients, one dict per seed; "" is the macro average."""
    scores = []
    for seed in chosen.seeds:
        workdir = folder / "runs" / f"{network}-{form}-{seed}"
        changes = [f"data.path={shards[form]}", f"data.size={chosen.size}", f"seed={seed}"]
        changes += [f"epochs={chosen.epochs}", f"evaluate_every={max(1, chosen.epochs // 10)}"]
        train.train(configs.load(network, changes), workdir)
        # The last checkpoint: the best one depends on labels, which are wrong in one form.
        summary = evaluate.evaluate(
            workdir, splits=["val"], data=shards["unknown"], checkpoint="last"
        )
        with (pathlib.Path(summary["out"]) / "val_labels.csv").open(newline="") as file:
            by_label = {row["name"]: row for row in csv.DictReader(file)}
        values = {
            name: {metric: float(row[metric]) if row[metric] else None for metric in METRICS}
            for name, row in by_label.items()
        }
        macro = {metric: summary["splits"]["val"][metric] for metric in METRICS}
        scores.append(values | {"": macro})
    return scores


def _rows(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[list[str]]:
    """Table rows with means over seeds."""
    rows = []
    for network, forms in results.items():
        for form, scores in forms.items():
            for label in scores[0]:
                cells = []
                for metric in METRICS:
                    values = [v for score in scores if (v := score[label][metric]) is not None]
                    cells.append(f"{statistics.mean(values):.3f}" if values else "-")
                rows.append([f"{network}, {form}", label or "mean", *cells])
    return rows


if __name__ == "__main__":
    harness.run(main)
