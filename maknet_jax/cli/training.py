"""The commands that train and evaluate networks."""

import argparse
import json
import pathlib

from maknet_jax.cli import options
from maknet_jax.errors import InputError


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `import-weights`, `plan`, `train` and `evaluate`."""
    _import_weights(verbs)
    _plan(verbs)
    _train(verbs)
    _evaluate(verbs)


def _import_weights(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "import-weights", _run_import_weights)
    verb.add_argument("source", help="the .safetensors file (pickles are not supported)")
    verb.add_argument(
        "--model", required=True, choices=("vgg16", "resnet18"), help="the network of the weights"
    )
    verb.add_argument("--out", required=True, help="the .safetensors file to write")
    for name in ("mean", "std"):
        verb.add_argument(
            f"--{name}",
            type=_channels,
            metavar="R,G,B",
            help=f"{name} of the training images, scaled to 0..1 (default: ImageNet's)",
        )


def _channels(text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be three numbers, R,G,B") from None
    return red, green, blue


def _run_import_weights(chosen: argparse.Namespace) -> None:
    r"""Convert the trunk of torchvision's or timm's VGG16-BN or ResNet18 to initial weights.

        maknet import-weights vgg16_bn.safetensors --model vgg16 --out weights/vgg16.safetensors
        maknet train --config vgg16 --workdir runs/vgg16 \
            --config.init.path=weights/vgg16.safetensors
    """
    from maknet_jax import import_weights

    scaling = {name: getattr(chosen, name) for name in ("mean", "std") if getattr(chosen, name)}
    summary = import_weights.import_weights(
        chosen.source, chosen.out, model=chosen.model, **scaling
    )
    unplaced = ", ".join(summary["unplaced"]) or "none"
    options.show(f"{summary['placed']} arrays of {chosen.source} placed; not used: {unplaced}")
    options.show(f"  {summary['out']}  for --config.init.path; digest {summary['digest']}")


def _plan(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "plan", _run_plan, takes_config=True)
    verb.add_argument("--config", required=True, help="a config, as for `maknet train`")
    verb.add_argument(
        "--topology",
        required=True,
        help="TPU chips by axis, such as v5e:4x4, v5p:2x2x1 or v6e:2x2; or GPUs (a100, h100, h200, "
        "b200): h100 for one, h100:8 for those of a host, h100:4x8 for four hosts",
    )
    verb.add_argument(
        "--batch",
        type=options.count,
        metavar="N",
        help="images per chip (default: those of the config, divided among the chips)",
    )
    verb.add_argument(
        "--images",
        type=options.count,
        metavar="N",
        help="labelled images of an epoch (default: those of data.path if it exists, else the "
        "17,697 of DeepLesion)",
    )
    verb.add_argument(
        "--labels",
        type=options.count,
        metavar="N",
        help="number of labels (default: those of data.path if it exists, else 115)",
    )
    verb.add_argument("--out", help="also write the numbers to this JSON file")


def _run_plan(chosen: argparse.Namespace) -> None:
    """Compile the training step for a TPU or GPU that need not be present, and print its memory,
    bounds on step time, throughput and hours, and the efficiency at 8, 64 and 256 chips.

        maknet plan --config teacher --topology v5e:4x4 --batch 128
    """
    from maknet_jax.planning import chips

    chips.of_topology(chosen.topology)  # raises InputError
    chips.use_host_only()  # before JAX is imported
    import jax

    # A program compiled for a device that is not present cannot be loaded from the cache.
    jax.config.update("jax_enable_compilation_cache", False)

    from maknet_jax import plan
    from maknet_jax.runs import config as configs

    config = configs.load(chosen.config, chosen.overrides)
    names = ("batch", "images", "labels", "out")
    planned = plan.plan(config, chosen.topology, **options.selected(chosen, *names))
    options.show(plan.describe(planned))


def _train(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "train", _run_train, takes_config=True)
    verb.add_argument(
        "--config",
        required=True,
        help="teacher, vgg16 or resnet18 (table 1), student (table 2), vgg16_pretrain or lesanet "
        "(table 3), openkbp (real patients), finetune, body_order, smoke, smoke_student or linear "
        "(small); or the path of a .py file, of a config.json, or of a workdir, to train with the "
        "config of that run",
    )
    verb.add_argument(
        "--workdir",
        type=options.folder,
        help="folder of the run, or its s3:// or gs:// URL (extra `cloud`); required unless "
        "--print-config",
    )
    verb.set_defaults(may_be_url={"workdir"})
    verb.add_argument(
        "--print-config",
        action="store_true",
        help="print all fields with their values as JSON, changes included, and exit; --config "
        "takes the output, saved as a .json file",
    )
    options.processes(verb)
    verb.usage = (
        "maknet train --config NAME --workdir DIR [--config.FIELD=VALUE ...] [--print-config]"
    )


def _run_train(chosen: argparse.Namespace) -> None:
    r"""Train a network; the same command resumes an interrupted run.

        maknet train --config teacher --workdir runs/teacher \
            --config.data.path=shards/deeplesion --config.optimizer.learning_rate=0.003
        maknet train --config teacher --print-config      # every field that can be changed
    """
    from maknet_jax.runs import config as configs

    config = configs.load(chosen.config, chosen.overrides)
    if chosen.print_config:
        print(json.dumps(configs.to_json(config), indent=2))
        return
    if not chosen.workdir:
        raise InputError("train needs --workdir, the folder of the run")

    from maknet_jax import train

    options.keep_freed_memory()
    options.start_jax(chosen)
    summary = train.train(config, chosen.workdir)
    best = "no validation AUC"
    if summary["best_val_auc"] is not None:
        auc, step = summary["best_val_auc"], summary["best_step"]
        best = f"best validation AUC {auc:.4f} at step {step}, in best/"
    options.show(f"{summary['steps']} steps done, {best}; {chosen.workdir}/summary.json")


def _evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "evaluate", _run_evaluate)
    options.model(verb)
    verb.add_argument(
        "--split",
        type=options.words,
        help="comma-separated names (default: those of test and hand that exist)",
    )
    verb.add_argument("--data", help="another prepared data set with the same labels")
    verb.add_argument(
        "--out",
        type=options.folder,
        help="folder to write (default: WORKDIR/evaluation); required for a bundle",
    )
    options.checkpoint(verb)
    verb.add_argument(
        "--rules",
        default="ours",
        choices=("ours", "lesanet"),
        help="lesanet agrees with LesaNet's published evaluate.py; ours differs in three details, "
        "see maknet_jax/evaluation/protocol.py (default: ours)",
    )
    verb.add_argument(
        "--intervals",
        action="store_true",
        help="add 95 %% intervals of AUC and F1 by a bootstrap over patients",
    )
    options.processes(verb)
    verb.add_argument(
        "--batch-size", type=options.count, help="images per step (default: the config's)"
    )


def _run_evaluate(chosen: argparse.Namespace) -> None:
    """Score a trained network on its test sets.

    maknet evaluate --model runs/teacher --split test,hand
    """
    from maknet_jax import evaluate

    options.start_jax(chosen)
    summary = evaluate.evaluate(
        chosen.model,
        splits=chosen.split,
        data=chosen.data,
        checkpoint=chosen.checkpoint,
        batch_size=chosen.batch_size,
        rules=chosen.rules,
        intervals=chosen.intervals,
        out=chosen.out,
    )
    print(evaluate.table([summary], [pathlib.Path(chosen.model).name]))
    options.show(
        f"\n{summary['checkpoint']} checkpoint, step {summary['step']}; thresholds "
        f"{summary['thresholds']}; rules {summary['rules']}; macro averages over labels with "
        "positives and negatives"
    )
    if chosen.intervals:
        options.show("\n" + evaluate.interval_table(summary))
    if summary["trained_on"]:
        options.show(f"trained on {summary['trained_on']}")
    options.show(f"per label: {summary['out']}/*_labels.csv")
