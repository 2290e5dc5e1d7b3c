"""Table 2 on real patients: the noisy student with ten labelled patients of OpenKBP.

    python benchmarks/experiments/table2_patients.py --folder runs/patients  # hours on two cores
    python benchmarks/experiments/table2_patients.py --folder runs/patients --report
    python benchmarks/experiments/table2_patients.py --quick  # a few steps, only to see it run

Each seed draws the labelled patients from the 140 training patients; the slices of the others are
unlabelled. Rounds 0 to 2 of `maknet noisy-student` are compared with a network trained on the
labels only, with the student's steps and noise, and with one trained on all 140 labelled patients.
The primary comparison, fixed in advance, is the last round minus labels only: the mean of the seeds
in macro AUC and F1 on the validation patients, with 95 % intervals of a bootstrap over seeds and
patients. With seven labels that do not exclude each other, the rules of the top 15 labels and of
exclusive labels have no effect: only the threshold of 0.5 is tested.

Resumes in --folder; --report trains nothing and names what is missing. For results see
benchmarks/RESULTS.md. Needs OpenKBP (data/README.md).
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.experiments import finished_runs, patients
from benchmarks.experiments import patient_metrics as metrics
from maknet_jax import console, noisy_student, train
from maknet_jax.cli import options
from maknet_jax.runs import config as configs

ROUNDS = 2
LAST, LABELS_ONLY, TEACHER, ALL = f"round {ROUNDS}", "labels only", "teacher", "all labelled"
COMPARISONS = ((LAST, LABELS_ONLY), (LAST, TEACHER), ("round 1", LABELS_ONLY), (ALL, LAST))
FULL: dict[str, Any] = {
    "size": 64,
    "seeds": [0, 1, 2, 3, 4],
    "labelled": 10,
    "teacher_steps": 1000,
    "student_steps": 1500,
    "rate": 0.003,
}
QUICK: dict[str, Any] = {"seeds": [0], "teacher_steps": 4, "student_steps": 4}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table and writes the JSON."""
    parser = patients.parser(__file__, __doc__, seeds="0,1,2,3,4")
    parser.add_argument("--labelled", type=options.count, help="labelled patients (default: 10)")
    parser.add_argument("--teacher-steps", type=options.count, help="default: 1000")
    parser.add_argument("--student-steps", type=options.count, help="default: 1500")
    parser.add_argument("--rate", type=harness.positive, help="learning rate (default: 0.003)")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    with harness.run_folder(chosen.folder, "--folder") as folder:
        runs = patients.Runs(folder, chosen.patients, train=not chosen.report, quick=chosen.quick)
        workdirs = {seed: train_seed(chosen, runs, seed) for seed in chosen.seeds}
        results = patients.collect(workdirs, folder, COMPARISONS)
    descriptions = [
        f"{chosen.labelled} labelled patients, {chosen.size} x {chosen.size} pixels, seeds "
        f"{', '.join(map(str, chosen.seeds))}; averages over the organs that at least "
        f"{metrics.ENOUGH} validation patients have",
        *patients.notes(results, quick=chosen.quick),
    ]
    harness.report(
        __file__, argv, chosen, patients.HEADER, patients.table_rows(results), descriptions, results
    )


def train_seed(
    chosen: argparse.Namespace, runs: patients.Runs, seed: int
) -> dict[str, pathlib.Path]:
    """Trains all networks of a seed, unless only finished runs are read; returns the workdirs."""
    folder = runs.folder / "table2" / f"{chosen.labelled}-labelled" / f"seed-{seed}"
    rounds = folder / "rounds"
    workdirs = {TEACHER: rounds / "round-0"}
    workdirs |= {f"round {number}": rounds / f"round-{number}" for number in (1, ROUNDS)}
    workdirs |= {LABELS_ONLY: folder / "labels-only", ALL: folder.parent.parent / f"all-{seed}"}
    for name, run in workdirs.items():
        steps = chosen.teacher_steps if name == TEACHER else chosen.student_steps
        finished_runs.check_options(run, size=chosen.size, rate=chosen.rate, steps=steps)
    if chosen.report or all(map(finished_runs.is_finished, workdirs.values())):
        return workdirs
    console.Log().say(f"{chosen.labelled} labelled patients, seed {seed}")
    data = runs.few_labels(folder / "shards", chosen.labelled, size=chosen.size, seed=seed)
    rate, noise = chosen.rate, ("model.options.dropout_rate=0.5",)
    teacher = patients.step_changes(data, chosen.teacher_steps, rate)
    student = (*patients.step_changes(data, chosen.student_steps, rate), *noise)
    config = configs.load(
        "noisy_student",
        [
            "teacher=openkbp",
            "student=openkbp",
            f"rounds={ROUNDS}",
            f"seed={seed}",
            f"labelled={data}",
            f"unlabelled={data}",
            f"split={patients.UNLABELLED}",
            f"teacher_changes={teacher}",
            f"student_changes={student}",
            f"evaluate={(patients.TUNING,)}",
        ],
    )
    noisy_student.noisy_student(config, rounds)
    everything = runs.data(chosen.size)
    for network, source in ((LABELS_ONLY, data), (ALL, everything)):
        changes = (*patients.step_changes(source, chosen.student_steps, rate), *noise)
        changes = (*changes, f"data.path={source}", f"seed={seed}")
        train.train(configs.load("openkbp", changes), workdirs[network])
    return workdirs


if __name__ == "__main__":
    harness.run(main)
