"""`maknet demo`: the whole chain on a generated phantom, by the code that real data runs."""

import pathlib
import time

from maknet_jax import config as configs
from maknet_jax import console, evaluate, files, predict, prepare, train
from maknet_jax.data import phantom

# The phantom as the demo uses it: about 430 training images, minutes on two cores.
PHANTOM = {"patients": 100, "unlabelled_volumes": 3, "size": 128, "lesions_per_patient": 6}


def demo(out, *, seed=0, workers=1):
    """Generates a phantom, prepares it, trains MAKNet and a linear model, evaluates and predicts.

    Run again in the same folder it goes on where it was; what is finished is not repeated.

    Args:
      out: the folder to write.
      seed: of the phantom and the training.
      workers: processes that prepare.

    Returns:
      A dict with the two evaluations and the summary of the prediction.
    """
    out = pathlib.Path(out)
    started = time.perf_counter()
    log = console.Log(out / "log.jsonl")
    size = configs.load("smoke").data.size
    log.say(f"1/5 phantom: {PHANTOM['patients']} patients, CT with couch, noise and mined labels")
    folder = out / "phantom"
    if (folder / "phantom.json").exists():
        paths = phantom.read_phantom(folder)
    else:
        paths = phantom.write_phantom(folder, seed=seed, **PHANTOM)
    log.say(f"2/5 prepare: crop, {size} x {size}, three slices as channels")
    shards = out / "shards"
    if not (shards / "dataset.json").exists():
        prepare.prepare_deeplesion(
            paths["images"],
            paths["info"],
            shards,
            label_file=paths["labels"],
            hand_labels=paths["hand_labels"],
            ontology=paths["ontology"],
            size=size,
            workers=workers,
        )
    summaries = {}
    for step, name in ((3, "smoke"), (4, "linear")):
        log.say(f"{step}/5 train and evaluate: config {name}")
        config = configs.load(name, [f"data.path={shards}", f"seed={seed}"])
        trained = train.train(config, out / name)
        summaries[name] = evaluate.evaluate(out / name)
        summaries[name]["parameters"] = trained["parameters"]
    log.say("5/5 predict: DICOM series that no label was ever given for")
    predicted = predict.predict(out / "smoke", paths["dicom"], out / "labels.csv", charts=True)
    minutes = (time.perf_counter() - started) / 60
    network = configs.load("smoke").model.options
    titles = [
        f"MAKNet, narrow ({summaries['smoke']['parameters']:,} parameters)",
        f"linear on pixels ({summaries['linear']['parameters']:,})",
    ]
    print(evaluate.table([summaries["smoke"], summaries["linear"]], titles))
    print(
        "\ntest: labels mined from reports (some missing or wrong); hand: labelled by hand. F1,\n"
        "precision and recall with thresholds chosen on the validation split, F1 at 0.5 beside."
    )
    print(
        f"A generated phantom at {size} x {size}, blocks {network.blocks}, widths "
        f"{network.widths}: it shows that the chain works, not how good the paper's network is."
    )
    print(f"{minutes:.1f} minutes. Look at:")
    for path, what in (
        (shards / "contact_sheet.png", "what the network sees, with its labels"),
        (out / "smoke" / "evaluation" / "hand_labels.csv", "scores per label"),
        (out / "labels.000.png", "body parts along a DICOM series, from head to feet"),
        (out / "labels.csv", "labels of every slice of the DICOM series"),
        (out / "labels.series.csv", "which body parts each series covers, from where to where"),
    ):
        print(f"  {path}  {what}")
    log.event(event="done", minutes=minutes)
    log.close()
    results = {**summaries, "predict": predicted}
    files.write_json(out / "summary.json", results | {"minutes": minutes})
    return results
