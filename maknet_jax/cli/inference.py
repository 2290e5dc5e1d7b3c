"""The verbs that use networks, and those that show them."""

from maknet_jax.cli import options


def add_verbs(verbs):
    """Adds `demo`, `predict` and `models`."""
    _demo(verbs)
    _predict(verbs)
    _models(verbs)


def _demo(verbs):
    verb = options.verb(
        verbs,
        "demo",
        "everything on a generated CT phantom: prepare, train, evaluate, predict",
        "maknet demo --out demo",
        _run_demo,
    )
    verb.add_argument("--out", default="demo", help="folder to write (default: demo)")
    verb.add_argument("--seed", type=int, default=0, help="of the phantom and the training")
    verb.add_argument(
        "--workers", type=options.count, default=options.cores(), help="processes (default: cores)"
    )


def _run_demo(chosen):
    from maknet_jax.demo import demo

    options.start_jax()
    demo(chosen.out, seed=chosen.seed, workers=chosen.workers)


def _predict(verbs):
    verb = options.verb(
        verbs,
        "predict",
        "body parts of any CT, per slice and per series",
        "maknet predict --workdir runs/teacher scans/ --out labels.csv",
        _run_predict,
    )
    verb.add_argument("path", help="a file or folder of DICOM, NIfTI or PNG")
    verb.add_argument("--workdir", required=True, help="folder of the trained run")
    verb.add_argument("--out", required=True, help="the CSV to write")
    verb.add_argument("--json", action="store_true", help="all confidences as JSON too")
    verb.add_argument("--charts", action="store_true", help="a picture a series: labels along z")
    verb.add_argument("--checkpoint", default="best", choices=("best", "last"))
    verb.add_argument(
        "--batch-size", type=options.count, default=16, help="slices a step (default: 16)"
    )
    options.png_window(verb)


def _run_predict(chosen):
    from maknet_jax import predict

    options.start_jax()
    summary = predict.predict(
        chosen.workdir,
        chosen.path,
        chosen.out,
        png_window=chosen.png_window,
        checkpoint=chosen.checkpoint,
        batch_size=chosen.batch_size,
        as_json=chosen.json,
        charts=chosen.charts,
    )
    print(
        f"{summary['slices']} slices of {summary['series']} series, by the {summary['checkpoint']} "
        f"checkpoint (step {summary['step']}):"
    )
    for file in summary["files"]:
        print(f"  {file}")
    if summary["failures"]:
        print(f"rejected: {summary['failures']}, see {summary['failures_file']}")
    return options.SOME_REJECTED if summary["failures"] else options.DONE


def _models(verbs):
    verb = options.verb(
        verbs,
        "models",
        "parameters, FLOPs and bytes of the networks beside the paper's column",
        "maknet models maknet vgg16 --size 256",
        _run_models,
    )
    verb.add_argument("names", nargs="*", help="maknet, vgg16, resnet18 (default: all)")
    verb.add_argument("--labels", type=options.count, default=115, help="how many (default: 115)")
    verb.add_argument(
        "--size", type=options.count, default=256, help="edge of images (default: 256)"
    )
    verb.add_argument("--out", help="write the numbers as JSON too")


def _run_models(chosen):
    from maknet_jax import model_table

    names = chosen.names or list(model_table.CONFIGS)
    sizes = {"num_classes": chosen.labels, "size": chosen.size}
    print(model_table.model_table(names, out=chosen.out, **sizes)[0])
