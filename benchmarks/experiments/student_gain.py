"""Measures the gain of the noisy student with few labels, on phantoms, against two controls.

    python benchmarks/experiments/student_gain.py [--seeds 5,6,7,8,9] [--workdir DIR]
    python benchmarks/experiments/student_gain.py --quick  # two epochs, only to see it run

Each seed draws a phantom: ten labelled patients for training, forty unlabelled volumes. The
controls are the teacher, which trains with the student's noise too, and a network trained on labels
only, with the steps and the noise of the students of rounds 1 and 2. All are scored on the
hand-labelled slices. Gains have 95 % intervals of the mean over seeds (Student's t). The settings
were chosen on other seeds.

Expect round 1 about 0.03 AUC above the teacher, and a gain over the labels-only network whose
interval contains 0 (benchmarks/RESULTS.md). Each seed trains four networks at 32 x 32; the duration
was not recorded. Resumes in --workdir if interrupted.
"""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import harness
from maknet_jax import console, evaluate, files, noisy_student, phantom, prepare, train
from maknet_jax.phantom.volumes import PhantomPaths
from maknet_jax.runs import config as configs

METRICS = {"auc": "AUC", "f1": "F1"}
TITLES = ("teacher", "labels only, same noise", "round 1", "round 2")
FULL: dict[str, Any] = {
    "seeds": [5, 6, 7, 8, 9],
    "size": 32,
    "labelled": 10,
    "phantom": {"patients": 60, "unlabelled_volumes": 40, "size": 96, "lesions_per_patient": 6},
    "teacher": ("epochs=100",),
    "student": ("epochs=200",),
}
QUICK: dict[str, Any] = {
    "seeds": [0, 1],
    "size": 32,
    "labelled": 4,
    "phantom": {"patients": 12, "unlabelled_volumes": 2, "size": 64, "slices": 24},
    "teacher": ("epochs=2",),
    "student": ("epochs=2",),
}


def restrict_labels(paths: PhantomPaths, count: int, out: pathlib.Path) -> None:
    """Writes the phantom's labels with the training lesions of its first `count` patients only."""
    with paths["info"].open(newline="", encoding="utf-8") as file:
        patients = [row["Patient_index"] for row in csv.DictReader(file)]
    labels = files.read_json(paths["labels"])
    lesions = labels["train_lesion_idxs"]  # row numbers from 1
    lesion_patients = [patients[number - 1] for number in lesions]
    selected = list(dict.fromkeys(lesion_patients))[:count]
    for key in ("train_lesion_idxs", "train_relevant_labels", "train_uncertain_labels"):
        labels[key] = [
            value
            for value, patient in zip(labels[key], lesion_patients, strict=True)
            if patient in selected
        ]
    files.write_json(out, labels)


def measure(folder: pathlib.Path, seed: int, form: dict[str, Any]) -> list[list[float]]:
    """Trains and evaluates the networks of one seed; skips finished runs.

    Args:
      folder: folder of all runs of the seed.
      seed: of the phantom and of all runs.
      form: `FULL`, `QUICK` or a variant.

    Returns:
      Metrics on the hand-labelled set `[4, 2]`, in the order of `TITLES` and `METRICS`.
    """
    paths = phantom.open_phantom(folder / "phantom", seed=seed, **form["phantom"])
    labelled, unlabelled = folder / "labelled", folder / "unlabelled"
    if not (labelled / "dataset.json").exists():
        restrict_labels(paths, form["labelled"], folder / "labels.json")
        source: dict[str, Any] = {
            **phantom.deeplesion_files(paths),
            "label_file": folder / "labels.json",
        }
        prepare.prepare_deeplesion(out=labelled, size=form["size"], **source)
    if not (unlabelled / "dataset.json").exists():
        prepare.prepare_dicom(
            paths["dicom"],
            unlabelled,
            salt_file=folder / "salt",
            min_slices=10,
            size=form["size"],
        )
    size = f"data.size={form['size']}"
    changes = [
        "teacher=smoke_student",
        "student=smoke_student",
        "rounds=2",
        f"seed={seed}",
        f"labelled={labelled}",
        f"unlabelled={unlabelled}",
        f"teacher_changes={(size, 'evaluate_every=8', 'pseudo.path=', *form['teacher'])}",
        f"student_changes={(size, 'evaluate_every=8', *form['student'])}",
    ]
    config = configs.load("noisy_student", changes)
    rounds = noisy_student.noisy_student(config, folder / "rounds")["rounds"]
    labels_only = configs.load(
        "smoke_student",
        [
            f"data.path={labelled}",
            size,
            "evaluate_every=8",
            f"seed={seed}",
            *form["student"],
            "pseudo.path=",
        ],
    )
    train.train(labels_only, folder / "labels-only")
    control = evaluate.evaluate(folder / "labels-only", splits=["hand"])
    evaluations = [rounds[0], control, *rounds[1:]]
    return [[each["splits"]["hand"][metric] for metric in METRICS] for each in evaluations]


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float | None, float | None]:
    """(mean, low, high): Student's 95 % interval of the mean; (mean, None, None) of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def gains(metrics: np.ndarray) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Gains of the students over the controls.

    Args:
      metrics: `[seeds, 4, 2]`, in the order of `TITLES` and `METRICS`.

    Returns:
      Round -> control -> metric -> `gain`, its interval, and `above`, the number of seeds with a
      gain.
    """
    return {
        TITLES[student]: {
            TITLES[control]: {
                name: {
                    "gain": interval(metrics[:, student, k] - metrics[:, control, k]),
                    "above": int((metrics[:, student, k] > metrics[:, control, k]).sum()),
                }
                for k, name in enumerate(METRICS.values())
            }
            for control in (0, 1)
        }
        for student in (2, 3)
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__, repeats=False)
    parser.add_argument("--seeds", type=harness.seeds, help="comma-separated (default: 5 to 9)")
    parser.add_argument("--workdir", help="keep the runs and resume there (default: temporary)")
    full, quick = ({name: form[name] for name in ("seeds", "size")} for form in (FULL, QUICK))
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    form = (QUICK if chosen.quick else FULL) | {"size": chosen.size}
    by_seed = []
    with harness.run_folder(chosen.workdir) as folder:
        for seed in chosen.seeds:
            console.Log().say(f"seed {seed}")
            by_seed.append(measure(folder / f"seed-{seed}", seed, form))
    values = np.array(by_seed)
    rows = [
        [
            title,
            *(
                f"{column.mean():.4f} ({column.min():.4f} to {column.max():.4f})"
                for column in values[:, number].T
            ),
        ]
        for number, title in enumerate(TITLES)
    ]
    gained, notes = gains(values), []
    for student, controls in gained.items():
        for control, metrics in controls.items():
            for name, result in metrics.items():
                mean, low, high = result["gain"]
                ends = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
                notes.append(
                    f"{student} over {control}, {name}: {mean:+.4f}{ends}, above in "
                    f"{result['above']} of {len(values)} seeds"
                )
    if chosen.quick:
        notes.append("QUICK FORM: two epochs: the numbers are meaningless")
    harness.report(
        __file__,
        argv,
        chosen,
        ["hand-labelled phantom slices", "AUC", "F1"],
        rows,
        notes,
        {
            "rows": values.tolist(),
            "networks": TITLES,
            "metrics": list(METRICS),
            "gains": gained,
            "form": form,
        },
    )


if __name__ == "__main__":
    harness.run(main)
