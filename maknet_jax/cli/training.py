"""The verbs that train and judge networks."""

import pathlib

from maknet_jax.cli import options


def add_verbs(verbs):
    """Adds `train` and `evaluate`."""
    _train(verbs)
    _evaluate(verbs)


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
        help="teacher (the paper's), smoke (small) or linear (a baseline), or a .py file; each "
        "field that it shows can be changed",
    )
    verb.add_argument("--workdir", required=True, help="folder of the run")
    verb.usage = "maknet train --config NAME --workdir DIR [--config.FIELD=VALUE ...]"


def _run_train(chosen):
    from maknet_jax import config, train

    options.start_jax()
    page = config.load(chosen.config, chosen.overrides)
    summary = train.train(page, chosen.workdir)
    val = summary["best_val_auc"]
    shown = "no validation AUC" if val is None else f"best validation AUC {val:.4f}"
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
        "--batch-size", type=options.count, help="images a step (default: the config's)"
    )


def _run_evaluate(chosen):
    from maknet_jax import evaluate

    options.start_jax()
    summary = evaluate.evaluate(
        chosen.workdir,
        splits=chosen.split.split(",") if chosen.split else None,
        data=chosen.data,
        checkpoint=chosen.checkpoint,
        batch_size=chosen.batch_size,
    )
    print(evaluate.table([summary], [pathlib.Path(chosen.workdir).name]))
    print(
        f"\n{summary['checkpoint']} checkpoint, step {summary['step']}; thresholds "
        f"{summary['thresholds']}; macro averages over labels with positives and negatives"
    )
    print(f"per label: {summary['out']}/*_labels.csv")
