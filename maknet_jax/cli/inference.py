"""`maknet demo`, `predict`, `export` and `models`."""

import argparse

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `demo`, `predict`, `export` and `models`."""
    _demo(verbs)
    _predict(verbs)
    _export(verbs)
    _models(verbs)


def _demo(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "demo", _run_demo)
    verb.add_argument(
        "--out", type=options.folder, default="demo", help="folder to write (default: demo)"
    )
    verb.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the phantom and the training (default: 0)",
    )
    verb.add_argument(
        "--workers",
        type=options.count,
        default=options.cores(),
        help="number of processes (default: cores)",
    )


def _run_demo(chosen: argparse.Namespace) -> None:
    """Run all steps on a generated CT phantom: prepare, train, evaluate, predict, report.

    maknet demo --out demo
    """
    from maknet_jax.demo import demo

    options.start_jax()
    demo(chosen.out, seed=chosen.seed, workers=chosen.workers)


def _predict(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "predict", _run_predict)
    verb.add_argument(
        "path",
        nargs="+",
        help="files and folders of DICOM, NIfTI or PNG, zips or tars of them, or a DICOMDIR; one "
        "slice is read with its neighbours in the folder",
    )
    options.model(verb)
    verb.add_argument(
        "--out",
        required=True,
        help="CSV file to write: one row per slice and predicted label (z_mm: mm below the first "
        "slice of the series; position_mm: the scanner's z); STEM.series.csv, with one row per "
        "series and label, and others are written beside it",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    verb.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="also write STEM.json: the tables and all confidences",
    )
    verb.add_argument(
        "--wide",
        action="store_true",
        help="also write STEM.wide.csv: one row per slice, one column per label",
    )
    verb.add_argument(
        "--audit",
        action="store_true",
        help="also write STEM.audit.csv: series whose tag BodyPartExamined agrees with what is "
        "seen, contradicts it, or cannot be compared",
    )
    verb.add_argument(
        "--charts", action="store_true", help="also draw the labels of each series, head to feet"
    )
    verb.add_argument(
        "--sr",
        action="store_true",
        help="also write STEM.NNN.sr.dcm: the coded labels of each DICOM series as a DICOM "
        'structured report (TID 1500), which names the patient; needs pip install "maknet-jax[sr]"',
    )
    verb.add_argument(
        "--features",
        metavar="FILE.npz",
        help="also write the pooled features of all slices: features [N, F] and ids SERIES:SLICE",
    )
    options.checkpoint(verb)
    verb.add_argument(
        "--batch-size", type=options.count, default=16, help="slices per step (default: 16)"
    )
    options.png_window(verb)
    options.pseudonyms(verb)
    options.override_options(verb)
    options.scheduler(verb)


def _run_predict(chosen: argparse.Namespace) -> int:
    """Label the body parts in any CT, per slice and per series. The outputs name series and files,
    which identify patients, unless --pseudonyms is set.

    maknet predict scans/ --model runs/teacher --out labels.csv
    maknet predict archive/ --model runs/teacher --out labels.csv --audit --overwrite
    """
    from maknet_jax import predict

    options.start_jax()
    scoring = options.selected(chosen, "png_window", "checkpoint", "batch_size", *options.OVERRIDES)
    names = ("as_json", "wide", "audit", "charts", "sr", "features", "overwrite")
    outputs = options.selected(chosen, *names, "pseudonyms", "salt_file", "scheduler")
    path = chosen.path if len(chosen.path) > 1 else chosen.path[0]
    summary = predict.predict(chosen.model, path, chosen.out, **scoring, **outputs)
    options.show(predict.text(summary))
    return options.SOME_REJECTED if summary["failures"] else options.DONE


def _export(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "export", _run_export)
    verb.add_argument("workdir", help="workdir of `maknet train`, or a bundle to export again")
    verb.add_argument("--out", type=options.folder, required=True, help="folder to write")
    options.checkpoint(verb)
    verb.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the stored kernels, converted to float32 on loading (default: float32)",
    )
    verb.add_argument("--zip", dest="zipped", action="store_true", help="also write OUT.zip")
    verb.add_argument(
        "--name",
        help="title of the model card (default: that of the bundle, or the workdir's name)",
    )
    verb.add_argument(
        "--license",
        dest="license_name",
        metavar="LICENSE",
        help="licence of the weights as named by the Hugging Face Hub, such as cc-by-4.0 "
        "(default: that of the bundle; other for a workdir)",
    )
    verb.add_argument(
        "--note",
        help="a known limit of the network, for the model card (default: that of the bundle)",
    )
    verb.add_argument("--data", help="training data set, if it has moved")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing bundle at OUT")


def _run_export(chosen: argparse.Namespace) -> None:
    """Write a trained network as a bundle: weights, labels, thresholds, preprocessing, model
    card, and StableHLO for other programs.

        maknet export runs/teacher --out teacher-bundle --zip
        maknet predict scans/ --model teacher-bundle --out labels.csv
    """
    from maknet_jax import export

    options.start_jax()
    names = ("checkpoint", "dtype", "name", "license_name", "note", "data", "zipped", "overwrite")
    summary = export.export(chosen.workdir, chosen.out, **options.selected(chosen, *names))
    splits = ", ".join(summary["splits"]) or "none: run `maknet evaluate` before the export"
    options.show(
        f"{summary['labels']} labels, {summary['checkpoint']} checkpoint, step {summary['step']}; "
        f"scores of: {splits}"
    )
    for name, size in summary["bytes"].items():
        options.show(f"  {name}  {size:,} bytes")
    for file in summary["files"]:
        options.show(f"  {file}")


def _models(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "models", _run_models)
    verb.add_argument("names", nargs="*", help="any of maknet, vgg16, resnet18 (default: all)")
    verb.add_argument(
        "--labels", type=options.count, default=115, help="number of labels (default: 115)"
    )
    verb.add_argument(
        "--size",
        type=options.count,
        default=256,
        help="edge of the images in pixels (default: 256)",
    )
    verb.add_argument("--out", help="also write the numbers to this JSON file")


def _run_models(chosen: argparse.Namespace) -> None:
    """List the released models with their labels; print parameters, FLOPs and bytes of the
    networks beside the paper's numbers, and name the benchmarks of speed.

        maknet models maknet vgg16 --size 256
    """
    from maknet_jax import model_table

    names = chosen.names or list(model_table.CONFIGS)
    sizes = {"num_classes": chosen.labels, "size": chosen.size}
    print(model_table.model_table(names, out=chosen.out, **sizes)[0])
