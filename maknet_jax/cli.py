"""The command line: `maknet VERB`. Each verb is a Python function; this file only reads options.

Exit codes: 0 done; 2 bad arguments or input (one line says which); 3 done, but some inputs were
rejected (`failures.csv`); 75 stopped by a signal, the same command goes on.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import sys

import maknet_jax
from maknet_jax.errors import InputError, Stopped

DONE, BAD_INPUT, SOME_REJECTED, STOPPED = 0, 2, 3, 75


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv=None):
    """Runs one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    changes = [text for text in rest if text.startswith("--config.") and "=" in text]
    strange = [text for text in rest if options.verb != "train" or text not in changes]
    if strange:
        hint = ": write --config.FIELD=VALUE" if strange[0].startswith("--config.") else ""
        parser.error(f"unknown argument {strange[0]!r}{hint}")
    options.overrides = [text.removeprefix("--config.") for text in changes]
    # XLA and grain log through absl and C++: a user's lines should not drown in theirs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        with _signals_stop():
            return options.run(options) or DONE
    except InputError as error:
        print(f"maknet: {error}", file=sys.stderr)
        return BAD_INPUT
    except Stopped as error:
        print(f"maknet: stopped: {error}", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.filename is None:
            raise
        print(f"maknet: {error.filename}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT


@contextlib.contextmanager
def _signals_stop():
    # `train` catches the signals itself, to save between two steps.
    def stop(number, _):
        caught.append(number)  # the first one is the user's, others only repeat it
        raise Stopped(f"{signal.Signals(caught[0]).name}; run the same command again")

    def again(unraisable):
        # Raised within a __del__ it was lost there: it comes again as soon as that is over.
        if unraisable.exc_type is Stopped:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(unraisable)

    caught, before, hook = [], {}, sys.unraisablehook
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            before[number] = signal.signal(number, stop)
        sys.unraisablehook = again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # its handler goes: what is due would kill
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser():
    parser = _Parser(
        prog="maknet",
        description="Train networks that label body parts on CT. Research software, not a medical "
        "device.",
        epilog="example: maknet demo --out /tmp/maknet-demo",
    )
    parser.add_argument("--version", action="version", version=maknet_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _demo(verbs)
    _prepare(verbs)
    _train(verbs)
    _evaluate(verbs)
    _predict(verbs)
    _models(verbs)
    return parser


def _verb(verbs, name, text, example, run):
    verb = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run)
    return verb


def _demo(verbs):
    verb = _verb(
        verbs,
        "demo",
        "everything on a generated CT phantom: prepare, train, evaluate, predict",
        "maknet demo --out demo",
        _run_demo,
    )
    verb.add_argument("--out", default="demo", help="folder to write (default: demo)")
    verb.add_argument("--seed", type=int, default=0, help="of the phantom and the training")
    verb.add_argument("--workers", type=_count, default=_cores(), help="processes (default: cores)")


def _run_demo(options):
    from maknet_jax.demo import demo

    _compile_cache()
    demo(options.out, seed=options.seed, workers=options.workers)


def _prepare(verbs):
    prepare = verbs.add_parser(
        "prepare",
        help="CT and labels into records: see its three forms",
        epilog="example: maknet prepare dicom TCIA --out shards/tcia",
    )
    forms = prepare.add_subparsers(dest="form", required=True, metavar="FORM")

    verb = _verb(
        forms,
        "deeplesion",
        "DeepLesion's PNGs with LesaNet's labels",
        "maknet prepare deeplesion --images Images_png --info DL_info.csv \\\n"
        "    --labels text_mined_labels_171_and_split.json \\\n"
        "    --hand-labels hand_labeled_test_set.json \\\n"
        "    --ontology lesion_ontology_181022.xlsx --out shards/deeplesion",
        _run_deeplesion,
    )
    verb.add_argument("--images", required=True, help="folder of 16-bit PNGs, nested or flat")
    verb.add_argument("--info", required=True, help="DL_info.csv in its original order")
    verb.add_argument("--labels", help="LesaNet's text-mined labels (JSON); none: unlabelled")
    verb.add_argument("--hand-labels", help="LesaNet's hand-labelled test set (JSON)")
    verb.add_argument("--ontology", help="LesaNet's ontology (xlsx)")
    _writing(verb)

    verb = _verb(
        forms,
        "dicom",
        "folders of DICOM or NIfTI, unlabelled",
        "maknet prepare dicom TCIA --out shards/tcia",
        _run_dicom,
    )
    verb.add_argument("folder", help="a file or a folder tree of CT")
    verb.add_argument(
        "--salt-file",
        help="secret that makes ids of UIDs, made if absent (default: ~/.config/maknet/salt)",
    )
    verb.add_argument(
        "--min-slices", type=_count, default=51, help="leave smaller volumes out (default: 51)"
    )
    _writing(verb)

    verb = _verb(
        forms,
        "table",
        "your own labelled slices from a CSV of path,labels,split[,slice,patient]",
        "maknet prepare table labels.csv --out shards/mine --png-window=-175,275",
        _run_table,
    )
    verb.add_argument("table", help="the CSV; labels are separated by |")
    _png_window(verb)
    _writing(verb)


def _writing(verb):
    verb.add_argument("--out", required=True, help="folder to write")
    verb.add_argument("--size", type=_count, default=256, help="edge of images (default: 256)")
    verb.add_argument("--workers", type=_count, default=_cores(), help="processes (default: cores)")


def _run_deeplesion(options):
    from maknet_jax import prepare

    return _prepared(
        prepare.prepare_deeplesion(
            options.images,
            options.info,
            label_file=options.labels,
            hand_labels=options.hand_labels,
            ontology=options.ontology,
            **_written(options),
        )
    )


def _run_dicom(options):
    from maknet_jax import prepare

    chosen = {"salt_file": options.salt_file, "min_slices": options.min_slices}
    return _prepared(prepare.prepare_dicom(options.folder, **chosen, **_written(options)))


def _run_table(options):
    from maknet_jax import prepare

    window = options.png_window
    return _prepared(prepare.prepare_table(options.table, png_window=window, **_written(options)))


def _written(options):
    return {"out": options.out, "size": options.size, "workers": options.workers}


def _prepared(summary):
    from maknet_jax import prepare

    print(prepare.describe(summary))
    return SOME_REJECTED if summary["failures"] else DONE


def _train(verbs):
    verb = _verb(
        verbs,
        "train",
        "a network, or go on with one: run the same command again",
        "maknet train --config teacher --workdir runs/teacher \\\n"
        "    --config.data.path=shards/deeplesion --config.optimizer.learning_rate=0.003",
        _run_train,
    )
    verb.add_argument(
        "--config",
        required=True,
        help="teacher (the paper's), smoke (small) or linear (a baseline), or a .py file; each "
        "field that it shows can be changed",
    )
    verb.add_argument("--workdir", required=True, help="folder of the run")
    verb.usage = "maknet train --config NAME --workdir DIR [--config.FIELD=VALUE ...]"


def _run_train(options):
    from maknet_jax import config, train

    _compile_cache()
    page = config.load(options.config, options.overrides)
    summary = train.train(page, options.workdir)
    val = summary["best_val_auc"]
    shown = "no validation AUC" if val is None else f"best validation AUC {val:.4f}"
    print(f"{summary['steps']} steps done, {shown}; {options.workdir}/summary.json")


def _evaluate(verbs):
    verb = _verb(
        verbs,
        "evaluate",
        "a trained network on its test sets",
        "maknet evaluate --workdir runs/teacher --split test,hand",
        _run_evaluate,
    )
    verb.add_argument("--workdir", required=True, help="folder of the run")
    verb.add_argument("--split", help="names with commas (default: test and hand, if there)")
    verb.add_argument("--data", help="another prepared data set with the same labels")
    verb.add_argument("--checkpoint", default="best", choices=("best", "last"))
    verb.add_argument("--batch-size", type=_count, help="images a step (default: the config's)")


def _run_evaluate(options):
    from maknet_jax import evaluate

    _compile_cache()
    summary = evaluate.evaluate(
        options.workdir,
        splits=options.split.split(",") if options.split else None,
        data=options.data,
        checkpoint=options.checkpoint,
        batch_size=options.batch_size,
    )
    print(evaluate.table([summary], [pathlib.Path(options.workdir).name]))
    print(
        f"\n{summary['checkpoint']} checkpoint, step {summary['step']}; thresholds "
        f"{summary['thresholds']}; macro averages over labels with positives and negatives"
    )
    print(f"per label: {summary['out']}/*_labels.csv")


def _predict(verbs):
    verb = _verb(
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
    verb.add_argument("--batch-size", type=_count, default=16, help="slices a step (default: 16)")
    _png_window(verb)


def _run_predict(options):
    from maknet_jax import predict

    _compile_cache()
    summary = predict.predict(
        options.workdir,
        options.path,
        options.out,
        png_window=options.png_window,
        checkpoint=options.checkpoint,
        batch_size=options.batch_size,
        as_json=options.json,
        charts=options.charts,
    )
    print(
        f"{summary['slices']} slices of {summary['series']} series, by the {summary['checkpoint']} "
        f"checkpoint (step {summary['step']}):"
    )
    for file in summary["files"]:
        print(f"  {file}")
    if summary["failures"]:
        print(f"rejected: {summary['failures']}, see {summary['failures_file']}")
    return SOME_REJECTED if summary["failures"] else DONE


def _models(verbs):
    verb = _verb(
        verbs,
        "models",
        "parameters, FLOPs and bytes of the networks beside the paper's column",
        "maknet models maknet vgg16 --size 256",
        _run_models,
    )
    verb.add_argument("names", nargs="*", help="maknet, vgg16, resnet18 (default: all)")
    verb.add_argument("--labels", type=_count, default=115, help="how many (default: 115)")
    verb.add_argument("--size", type=_count, default=256, help="edge of images (default: 256)")
    verb.add_argument("--out", help="write the numbers as JSON too")


def _run_models(options):
    from maknet_jax import model_table

    names = options.names or list(model_table.PAGES)
    sizes = {"num_classes": options.labels, "size": options.size}
    print(model_table.model_table(names, out=options.out, **sizes)[0])


def _png_window(verb):
    verb.add_argument(
        "--png-window",
        type=_window,
        metavar="LOW,HIGH",
        help="HU that 0 and 255 of 8-bit PNGs mean, as --png-window=-175,275",
    )


def _window(text):
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be LOW,HIGH in HU") from None
    if not low < high:
        raise argparse.ArgumentTypeError(f"{text!r}: LOW should be below HIGH")
    return low, high


def _count(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number from 1 on")
    return int(text)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _compile_cache():
    """Compiled programs are kept between runs, so that a restart begins at once."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maknet" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache.expanduser()))
