"""Transfer on real patients: a MAKNet trunk pre-trained on pseudo-labelled slices of OpenKBP.

    python benchmarks/experiments/transfer_patients.py --folder runs/patients  # hours on two cores
    python benchmarks/experiments/transfer_patients.py --folder runs/patients --report
    python benchmarks/experiments/transfer_patients.py --quick  # a few steps, only to see it run

The idea of section 4.5, without DeepLesion: two organs are left out of the pre-training. For each
seed a teacher learns the other five organs from ten patients and labels the slices of the other
training patients, and a student learns from both. Its trunk, a trunk pre-trained on the body parts
of a generated phantom, and random weights are then trained on the two organs of the ten patients
with one recipe. Means of the seeds in AUC and F1 of the two organs on the validation patients, with
95 % intervals of a bootstrap over seeds and patients.

Table 3 itself cannot be measured this way: it needs DeepLesion's images with mined labels and
ImageNet weights.

Resumes in --folder; --report trains nothing and names what is missing. For results see
benchmarks/RESULTS.md. Needs OpenKBP (data/README.md).
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.experiments import finished_runs, patients
from maknet_jax import console, phantom, prepare, pseudo_label, train
from maknet_jax.cli import options
from maknet_jax.runs import config as configs

LEFT_OUT = ("brainstem", "mandible")
OTHERS = ("esophagus", "larynx", "parotid_gland_left", "parotid_gland_right", "spinal_cord")
STUDENT, PHANTOM, RANDOM = "pseudo-labelled patients", "phantom", "random weights"
COMPARISONS = ((STUDENT, RANDOM), (STUDENT, PHANTOM), (PHANTOM, RANDOM))
PATIENTS_OF_PHANTOM = 100
FULL: dict[str, Any] = {
    "size": 64,
    "seeds": [0, 1, 2, 3, 4],
    "labelled": 10,
    "pretraining_steps": 1000,
    "steps": 500,
    "rate": 0.003,
}
QUICK: dict[str, Any] = {"seeds": [0], "pretraining_steps": 4, "steps": 4}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table and writes the JSON."""
    parser = patients.parser(__file__, __doc__, seeds="0,1,2,3,4")
    parser.add_argument("--labelled", type=options.count, help="labelled patients (default: 10)")
    parser.add_argument("--pretraining-steps", type=options.count, help="default: 1000")
    parser.add_argument(
        "--steps", type=options.count, help="of the training on two organs (default: 500)"
    )
    parser.add_argument("--rate", type=harness.positive, help="learning rate (default: 0.003)")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    with harness.run_folder(chosen.folder, "--folder") as folder:
        runs = patients.Runs(folder, chosen.patients, train=not chosen.report, quick=chosen.quick)
        workdirs = {seed: train_seed(chosen, runs, seed) for seed in chosen.seeds}
        results = patients.collect(workdirs, folder, COMPARISONS)
    rows = patients.table_rows(results)
    notes = [
        f"trunk pre-trained on; then trained on {', '.join(LEFT_OUT)} of {chosen.labelled} "
        f"patients, {chosen.size} x {chosen.size} pixels, seeds "
        f"{', '.join(map(str, chosen.seeds))}",
        *patients.notes(results, quick=chosen.quick),
    ]
    harness.report(__file__, argv, chosen, patients.HEADER, rows, notes, results)


def train_seed(
    chosen: argparse.Namespace, runs: patients.Runs, seed: int
) -> dict[str, pathlib.Path]:
    """Trains all networks of a seed, unless only finished runs are read; returns the workdirs."""
    folder = runs.folder / "transfer" / f"{chosen.labelled}-labelled" / f"seed-{seed}"
    workdirs = {name: folder / name.replace(" ", "-") for name in (STUDENT, PHANTOM, RANDOM)}
    pretrained = (
        folder / "teacher",
        folder / "student",
        runs.folder / f"transfer/phantom-{seed}/run",
    )
    steps = dict.fromkeys(workdirs.values(), chosen.steps)
    for run, number in (steps | dict.fromkeys(pretrained, chosen.pretraining_steps)).items():
        finished_runs.check_options(run, size=chosen.size, rate=chosen.rate, steps=number)
    if chosen.report or all(map(finished_runs.is_finished, workdirs.values())):
        return workdirs
    console.Log().say(f"transfer, {chosen.labelled} labelled patients, seed {seed}")
    few = {"labelled": chosen.labelled, "size": chosen.size, "seed": seed}
    two = runs.few_labels(folder / "two-organs", organs=LEFT_OUT, **few)
    trunks = {
        STUDENT: _pretrain_on_pseudo_labels(chosen, runs, folder, seed),
        PHANTOM: _pretrain_on_phantom(chosen, runs, seed),
        RANDOM: None,
    }
    for name, trunk in trunks.items():
        changes = [*patients.step_changes(two, chosen.steps, chosen.rate), f"data.path={two}"]
        changes += [f"seed={seed}", *([f"init.path={trunk}"] if trunk else [])]
        train.train(configs.load("openkbp", changes), workdirs[name])
    return workdirs


def _pretrain_on_pseudo_labels(
    chosen: argparse.Namespace, runs: patients.Runs, folder: pathlib.Path, seed: int
) -> pathlib.Path:
    """Trains a teacher on five organs and a student on its pseudo-labels; returns the student."""
    few = {"labelled": chosen.labelled, "size": chosen.size, "seed": seed}
    five = runs.few_labels(folder / "five-organs", organs=OTHERS, **few)
    changes = (
        *patients.step_changes(five, chosen.pretraining_steps, chosen.rate),
        f"data.path={five}",
        f"seed={seed}",
    )
    train.train(configs.load("openkbp", changes), folder / "teacher")
    pseudo_label.pseudo_label(
        folder / "teacher", five, folder / "pseudo", split=patients.UNLABELLED
    )
    student = (*changes, f"pseudo.path={folder / 'pseudo'}", "model.options.dropout_rate=0.5")
    train.train(configs.load("openkbp", student), folder / "student")
    return folder / "student"


def _pretrain_on_phantom(
    chosen: argparse.Namespace, runs: patients.Runs, seed: int
) -> pathlib.Path:
    """Trains on the body parts of a phantom, drawn with the seed; returns the workdir."""
    folder = runs.folder / "transfer" / f"phantom-{seed}"
    paths = phantom.open_phantom(
        folder / "phantom", seed=seed, patients=PATIENTS_OF_PHANTOM, unlabelled_volumes=0, size=128
    )
    if not (folder / "shards" / "dataset.json").is_file():
        prepare.prepare_deeplesion(
            out=folder / "shards", size=chosen.size, **phantom.deeplesion_files(paths)
        )
    changes = (
        *patients.step_changes(folder / "shards", chosen.pretraining_steps, chosen.rate),
        f"data.path={folder / 'shards'}",
        f"seed={seed}",
    )
    train.train(configs.load("openkbp", changes), folder / "run")
    return folder / "run"


if __name__ == "__main__":
    harness.run(main)
