"""The verbs that train and judge networks."""

import argparse
import pathlib

from maknet_jax.cli import options


def add_verbs(verbs):
    """Adds `import-weights`, `train` and `evaluate`."""
    _import_weights(verbs)
    _train(verbs)
    _evaluate(verbs)


def _import_weights(verbs):
    verb = options.verb(
        verbs,
        "import-weights",
        "the trunk of torchvision's or timm's VGG16-BN or ResNet18, to start a training from",
        "maknet import-weights vgg16_bn.safetensors --model vgg16 --out weights/vgg16.safetensors\n"
        "  maknet train --config vgg16 --workdir runs/vgg16 \\\n"
        "    --config.init.path=weights/vgg16.safetensors",
        _run_import_weights,
    )
    verb.add_argument("source", help="the .safetensors file (no pickle)")
    verb.add_argument("--model", required=True, choices=("vgg16", "resnet18"))
    verb.add_argument("--out", required=True, help="the .safetensors file to write")
    for name in ("mean", "std"):
        verb.add_argument(
            f"--{name}",
            type=_channels,
            metavar="R,G,B",
            help=f"{name} of the images in 0..1 that it was trained on (default: ImageNet's)",
        )


def _channels(text):
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be three numbers, R,G,B") from None
    return red, green, blue


def _run_import_weights(chosen):
    from maknet_jax import import_weights

    given = {name: getattr(chosen, name) for name in ("mean", "std") if getattr(chosen, name)}
    summary = import_weights.import_weights(chosen.source, chosen.out, model=chosen.model, **given)
    left = ", ".join(summary["unplaced"]) or "nothing"
    print(f"{summary['placed']} arrays of {chosen.source} placed, left behind: {left}")
    print(f"  {summary['out']}  for --config.init.path; digest {summary['digest']}")


def _train(verbs):
    verb = options.verb(
        verbs,
        "train",
        "a network, or go on with one: run the same command again",
        "maknet train --config teacher --workdir runs/teacher \\\n"
        "    --config.data.path=shards/deeplesion --config.optimizer.learning_rate=0.003",
        _run_train,
        takes_config=True,
    )
    verb.add_argument(
        "--config",
        required=True,
        help="a page: teacher, vgg16 or resnet18 (table 1), student (table 2), vgg16_pretrain or "
        "lesanet (table 3), finetune, body_order, smoke, smoke_student or linear (small), or a .py "
        "file; each field that it shows can be changed",
    )
    verb.add_argument("--workdir", required=True, help="folder of the run")
    options.distributed(verb)
    verb.usage = "maknet train --config NAME --workdir DIR [--config.FIELD=VALUE ...]"


def _run_train(chosen):
    from maknet_jax import train
    from maknet_jax.runs import config

    options.start_jax(chosen.distributed)
    page = config.load(chosen.config, chosen.overrides)
    summary = train.train(page, chosen.workdir)
    val = summary["best_val_auc"]
    shown = "no validation AUC"
    if val is not None:
        shown = f"best validation AUC {val:.4f} at step {summary['best_step']}, in best/"
    print(f"{summary['steps']} steps done, {shown}; {chosen.workdir}/summary.json")


def _evaluate(verbs):
    verb = options.verb(
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
    verb.add_argument(
        "--rules",
        default="ours",
        choices=("ours", "lesanet"),
        help="lesanet agrees with LesaNet's published evaluate.py; ours differs in three details, "
        "see maknet_jax/evaluation/protocol.py (default: ours)",
    )
    options.distributed(verb)
    verb.add_argument(
        "--batch-size", type=options.count, help="images a step (default: the config's)"
    )


def _run_evaluate(chosen):
    from maknet_jax import evaluate

    options.start_jax(chosen.distributed)
    summary = evaluate.evaluate(
        chosen.workdir,
        splits=chosen.split.split(",") if chosen.split else None,
        data=chosen.data,
        checkpoint=chosen.checkpoint,
        batch_size=chosen.batch_size,
        rules=chosen.rules,
    )
    print(evaluate.table([summary], [pathlib.Path(chosen.workdir).name]))
    print(
        f"\n{summary['checkpoint']} checkpoint, step {summary['step']}; thresholds "
        f"{summary['thresholds']}; rules {summary['rules']}; macro averages over labels with "
        "positives and negatives"
    )
    print(f"per label: {summary['out']}/*_labels.csv")
