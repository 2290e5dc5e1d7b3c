"""`maknet demo`: the whole chain on a generated phantom, by the code that real data runs."""

import pathlib
import time

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

# The phantom as the demo uses it: about 430 training images, minutes on two cores.
PHANTOM = {"patients": 100, "unlabelled_volumes": 12, "size": 128, "lesions_per_patient": 6}
# One round: the student goes on from its teacher, which is half the way on so few images.
ROUNDS = ("teacher=smoke", "student=smoke_student", "rounds=1", "from_last=True")
STUDENT = ("epochs=15.0",)
MIN_SLICES = 51  # of an unlabelled volume; the phantom's last one is shorter


def demo(out, *, seed=0, workers=1):
    """Makes a phantom, prepares it, trains teacher, student and linear model, predicts, explains.

    Run again in the same folder it goes on where it was; what is finished is not repeated.

    Args:
      out: the folder to write.
      seed: of the phantom and the training.
      workers: processes that prepare.

    Returns:
      A dict with the evaluations of teacher, student and linear model, the summary of the
      prediction and the path of the report.
    """
    out = pathlib.Path(out)
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
    log.say("3/6 teacher, pseudo-labels, student: configs smoke and smoke_student")
    changes = [*ROUNDS, f"labelled={shards}", f"unlabelled={unlabelled}", f"seed={seed}"]
    changes.append(f"student_changes={STUDENT}")
    rounds = noisy_student.noisy_student(configs.load("noisy_student", changes), out / "rounds")[
        "rounds"
    ]
    log.say("4/6 train and evaluate: config linear, for comparison")
    config = configs.load("linear", [f"data.path={shards}", f"seed={seed}"])
    train.train(config, out / "linear")
    student = out / "rounds" / "round-1"
    summaries = {
        "teacher": rounds[0],
        "student": rounds[1],
        "linear": evaluate.evaluate(out / "linear"),
    }
    log.say("5/6 predict: DICOM series that no label was ever given for")
    predicted = predict.predict(student, paths["dicom"], out / "labels.csv", charts=True)
    log.say("6/6 report: curves, scores, and why the best and the worst cases got their labels")
    page = report.report(student)
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
    before, after = (done["splits"]["hand"]["auc"] for done in rounds)
    print(
        f"\nFrom {images:,} images that nobody labelled the student gained "
        f"{after - before:+.4f} AUC (hand) over its\nteacher; a longer training with noise alone "
        "gains on the phantom too, see the README."
    )
    print(
        "test: labels mined from reports (some missing or wrong); hand: labelled by hand. F1,\n"
        "precision and recall with thresholds chosen on the validation split, F1 at 0.5 beside."
    )
    print(
        f"A generated phantom at {size} x {size}, blocks {network.blocks}, widths "
        f"{network.widths}:\nit shows that the chain works, not how good the paper's network is."
    )
    print(f"{minutes:.1f} minutes. Look at:")
    for path, what in (
        (page, "the report: one page that works offline"),
        (shards / "contact_sheet.png", "what the network sees, with its labels"),
        (out / "rounds" / "pseudo-1" / "histogram.png", "what the teacher labelled"),
        (student / "evaluation" / "hand_labels.csv", "the student's scores per label"),
        (out / "labels.000.png", "body parts along a DICOM series, from head to feet"),
        (out / "labels.csv", "labels of every slice of the DICOM series"),
        (out / "labels.series.csv", "which body parts each series covers, from where to where"),
    ):
        print(f"  {path}  {what}")
    log.event(event="done", minutes=minutes)
    log.close()
    results = {**summaries, "predict": predicted, "report": str(page)}
    files.write_json(out / "summary.json", results | {"minutes": minutes})
    return results
