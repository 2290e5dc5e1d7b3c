"""Does the noisy student help where labels are few? On phantoms, beside two controls.

    python benchmarks/experiments/student_gain.py [--seeds 5,6,7,8,9] [--workdir DIR] [--quick]

For each seed a new phantom: ten patients with labels for training, forty volumes without. The
teacher learns with the student's noise too; a student of labels only has the same steps and the
same noise as the students of rounds 1 and 2. All are scored on the hand-labelled slices. Gains
stand over the teacher and over the labels-only student with 95 % intervals of the mean over seeds
(Student's t). Seeds 0 and 1 chose the settings below.
"""

import csv

import numpy as np
from scipy import stats

from benchmarks import harness
from maknet_jax import console, evaluate, files, noisy_student, phantom, prepare, train
from maknet_jax.runs import config as configs

METRICS = {"auc": "AUC", "f1": "F1"}
TITLES = ("teacher", "labels only, same noise", "round 1", "round 2")
FULL = {
    "seeds": [5, 6, 7, 8, 9],
    "size": 32,
    "labelled": 10,
    "phantom": {"patients": 60, "unlabelled_volumes": 40, "size": 96, "lesions_per_patient": 6},
    "teacher": ("epochs=100",),
    "student": ("epochs=200",),
}
QUICK = {
    "seeds": [0, 1],
    "size": 32,
    "labelled": 4,
    "phantom": {"patients": 12, "unlabelled_volumes": 2, "size": 64, "slices": 24},
    "teacher": ("epochs=2",),
    "student": ("epochs=2",),
}


def keep_few(paths, count, out):
    """Writes the phantom's labels with the training lesions of its first `count` patients only."""
    with paths["info"].open(newline="", encoding="utf-8") as file:
        patients = [row["Patient_index"] for row in csv.DictReader(file)]
    labels = files.read_json(paths["labels"])
    lesions = labels["train_lesion_idxs"]  # row numbers from 1
    owners = [patients[number - 1] for number in lesions]
    few = list(dict.fromkeys(owners))[:count]
    for key in ("train_lesion_idxs", "train_relevant_labels", "train_uncertain_labels"):
        labels[key] = [v for v, owner in zip(labels[key], owners, strict=True) if owner in few]
    files.write_json(out, labels)


def measure(folder, seed, form):
    """The metrics of one seed on the hand-labelled set: `[4, 2]`, as `TITLES` and `METRICS`.

    Args:
      folder: of all runs of the seed; what is finished there is not repeated.
      seed: of the phantom and of all trainings.
      form: `FULL`, or one like it.
    """
    paths = phantom.open_phantom(folder / "phantom", seed=seed, **form["phantom"])
    labelled, unlabelled = folder / "labelled", folder / "unlabelled"
    if not (labelled / "dataset.json").exists():
        keep_few(paths, form["labelled"], folder / "labels.json")
        given = phantom.deeplesion_files(paths) | {"label_file": folder / "labels.json"}
        prepare.prepare_deeplesion(out=labelled, size=form["size"], **given)
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
    made = noisy_student.noisy_student(configs.load("noisy_student", changes), folder / "rounds")[
        "rounds"
    ]
    alone = configs.load(
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
    train.train(alone, folder / "labels-only")
    control = evaluate.evaluate(folder / "labels-only", splits=["hand"])
    found = [made[0], control, *made[1:]]
    return [[done["splits"]["hand"][metric] for metric in METRICS] for done in found]


def interval(values):
    """(mean, low, high): Student's 95 % interval of the mean; None for the ends of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def gains(found):
    """Round -> control -> metric -> interval and how often it was above.

    Args:
      found: `[seeds, 4, 2]`, as `TITLES` and `METRICS`.
    """
    return {
        TITLES[student]: {
            TITLES[control]: {
                name: {
                    "gain": interval(found[:, student, k] - found[:, control, k]),
                    "above": int((found[:, student, k] > found[:, control, k]).sum()),
                }
                for k, name in enumerate(METRICS.values())
            }
            for control in (0, 1)
        }
        for student in (2, 3)
    }


def main(argv=None):
    """Trains, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--seeds", type=harness.seeds, help="with commas (default: 5 to 9)")
    parser.add_argument("--workdir", help="keep the runs there and go on from it (default: no)")
    shown = ({name: form[name] for name in ("seeds", "size")} for form in (FULL, QUICK))
    chosen = harness.parse(parser, argv, **dict(zip(("full", "quick"), shown, strict=True)))
    form = (QUICK if chosen.quick else FULL) | {"size": chosen.size}
    with harness.kept(chosen.workdir) as folder:
        found = []
        for seed in chosen.seeds:
            console.Log().say(f"seed {seed}")
            found.append(measure(folder / f"seed-{seed}", seed, form))
    found = np.array(found)
    rows = [
        [
            title,
            *(
                f"{column.mean():.4f} ({column.min():.4f} to {column.max():.4f})"
                for column in found[:, number].T
            ),
        ]
        for number, title in enumerate(TITLES)
    ]
    made, notes = gains(found), []
    for student, controls in made.items():
        for control, metrics in controls.items():
            for name, value in metrics.items():
                mean, low, high = value["gain"]
                ends = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
                notes.append(
                    f"{student} over {control}, {name}: {mean:+.4f}{ends}, above in "
                    f"{value['above']} of {len(found)} seeds"
                )
    if chosen.quick:
        notes.append("QUICK FORM: two epochs: the numbers mean nothing")
    harness.report(
        __file__,
        argv,
        chosen,
        ["hand-labelled phantom slices", "AUC", "F1"],
        rows,
        notes,
        {
            "rows": found.tolist(),
            "networks": TITLES,
            "metrics": list(METRICS),
            "gains": made,
            "form": form,
        },
    )


if __name__ == "__main__":
    harness.run(main)
