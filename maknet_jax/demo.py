"""`maknet demo`: the whole pipeline on a generated CT phantom, with the code for real data."""

import pathlib
import time
from typing import Any

from maknet_jax import (
    console,
    evaluate,
    files,
    noisy_student,
    phantom,
    predict,
    prepare,
    report,
    train,
)
from maknet_jax.runs import config as configs
from maknet_jax.training import checkpoint

# About 430 training images: minutes on two cores.
PHANTOM = {"patients": 100, "unlabelled_volumes": 12, "size": 128, "lesions_per_patient": 6}
# One round. Starting the student from its teacher halves the training time with few images.
ROUNDS = ("teacher=smoke", "student=smoke_student", "rounds=1", "from_last=True")
STUDENT = ("epochs=15.0",)
MIN_SLICES = 51  # per unlabelled volume; the last one of the phantom is shorter


def demo(out: str | pathlib.Path, *, seed: int = 0, workers: int = 1) -> dict[str, Any]:
    """Generates and prepares a phantom, trains three networks on it, predicts and explains.

    Resumes if interrupted: finished stages are not repeated.

    Args:
      out: the folder to write.
      seed: of the phantom and the training.
      workers: processes that prepare the data.

    Returns:
      The evaluations of `teacher`, `student` and `linear`, the summary of `predict` and the path of
      the `report`.
    """
    out = pathlib.Path(out)
    checkpoint.check_path(out)
    started = time.perf_counter()
    log = console.Log(out / "log.jsonl")
    size = configs.load("smoke").data.size
    log.say(f"1/6 phantom: {PHANTOM['patients']} patients, CT with couch, noise and mined labels")
    paths = phantom.open_phantom(out / "phantom", seed=seed, **PHANTOM)
    log.say(f"2/6 prepare: crop, {size} x {size}, three slices as channels")
    shards, unlabelled = out / "shards", out / "unlabelled"
    if not (shards / "dataset.json").exists():
        prepare.prepare_deeplesion(
            out=shards, size=size, workers=workers, **phantom.deeplesion_files(paths)
        )
    if not (unlabelled / "dataset.json").exists():
        prepare.prepare_dicom(
            paths["dicom"],
            unlabelled,
            salt_file=out / "salt",
            min_slices=MIN_SLICES,
            size=size,
            workers=workers,
        )
    log.say(
        "3/6 train the teacher, pseudo-label, train the student: configs smoke and smoke_student"
    )
    changes = [*ROUNDS, f"labelled={shards}", f"unlabelled={unlabelled}", f"seed={seed}"]
    changes.append(f"student_changes={STUDENT}")
    rounds = noisy_student.noisy_student(configs.load("noisy_student", changes), out / "rounds")[
        "rounds"
    ]
    log.say("4/6 train and evaluate a linear model for comparison: config linear")
    config = configs.load("linear", [f"data.path={shards}", f"seed={seed}"])
    train.train(config, out / "linear")
    student = out / "rounds" / "round-1"
    summaries = {
        "teacher": rounds[0],
        "student": rounds[1],
        "linear": evaluate.evaluate(out / "linear"),
    }
    log.say("5/6 predict: the unlabelled DICOM series")
    predicted = predict.predict(
        student, paths["dicom"], out / "labels.csv", charts=True, overwrite=True
    )
    log.say("6/6 report: curves, scores, and attributions of the best and worst cases")
    page = report.report(student, ct=paths["images"])
    minutes = (time.perf_counter() - started) / 60
    network = configs.load("smoke").model.options
    parameters = files.read_json(student / "summary.json")["parameters"]
    titles = [
        f"MAKNet, narrow ({parameters:,} parameters): teacher",
        "the same: student, round 1",
        "linear on pixels",
    ]
    print(evaluate.table(list(summaries.values()), titles))
    images = files.read_json(out / "rounds" / "pseudo-1" / "pseudo.json")["images"]
    before, after = (summary["splits"]["hand"]["auc"] for summary in rounds)
    print(
        f"\nWith {images:,} unlabelled images the student gained {after - before:+.4f} AUC (hand) "
        "over its teacher.\nOn the phantom, longer training with noise but without pseudo-labels "
        "also gains: see benchmarks/RESULTS.md."
    )
    print(
        "test: labels mined from reports, some missing or wrong; hand: labelled by hand.\n"
        "F1, precision and recall use thresholds chosen on the validation split."
    )
    print(
        f"A generated phantom at {size} x {size}, blocks {network.blocks}, widths "
        f"{network.widths}:\nthis shows that the code works, not how good the paper's network is."
    )
    print(f"{minutes:.1f} minutes. Results:")
    for path, description in (
        (page, "the report: one offline page"),
        (shards / "contact_sheet.png", "sample images as the network sees them, with labels"),
        (out / "rounds" / "pseudo-1" / "histogram.png", "the teacher's pseudo-labels"),
        (student / "evaluation" / "hand_labels.csv", "the student's scores per label"),
        (out / "labels.000.png", "body parts along a DICOM series, from head to feet"),
        (out / "labels.csv", "labels of every slice of the DICOM series"),
        (out / "labels.series.csv", "the range of slices of each body part in each series"),
    ):
        print(f"  {path}  {description}")
    log.event(event="done", minutes=minutes)
    log.close()
    results = {**summaries, "predict": predicted, "report": str(page)}
    files.write_json(out / "summary.json", results | {"minutes": minutes})
    return results
