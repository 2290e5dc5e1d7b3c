"""The verbs of the semi-supervised rounds."""

import argparse

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `pseudo-label` and `noisy-student`."""
    _pseudo_label(verbs)
    _noisy_student(verbs)


def _pseudo_label(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(
        verbs,
        "pseudo-label",
        "images that nobody labelled, by a teacher; run again it goes on",
        "maknet pseudo-label --workdir runs/teacher --records shards/tcia --out shards/pseudo-1",
        _run_pseudo_label,
    )
    verb.add_argument("--workdir", required=True, help="folder of the teacher's run")
    verb.add_argument("--records", required=True, help="prepared data set with the images")
    verb.add_argument("--out", required=True, help="folder to write")
    verb.add_argument("--split", default="unlabelled", help="of the records (default: unlabelled)")
    verb.add_argument("--top", type=options.count, default=15, help="labels an image (default: 15)")
    verb.add_argument(
        "--threshold", type=float, default=0.5, help="a confidence must exceed it (default: 0.5)"
    )
    verb.add_argument("--soft", action="store_true", help="students learn the confidences, not 1")
    verb.add_argument("--checkpoint", default="best", choices=("best", "last"))
    verb.add_argument("--batch-size", type=options.count, help="images a step (default: teacher's)")
    verb.add_argument(
        "--truth", action="store_true", help="the split has labels: judge the pseudo-labels by them"
    )
    options.distributed(verb)


def _run_pseudo_label(chosen: argparse.Namespace) -> None:
    from maknet_jax import pseudo_label

    options.start_jax(chosen.distributed)
    result = pseudo_label.pseudo_label(
        chosen.workdir,
        chosen.records,
        chosen.out,
        split=chosen.split,
        top=chosen.top,
        threshold=chosen.threshold,
        soft=chosen.soft,
        checkpoint=chosen.checkpoint,
        batch_size=chosen.batch_size,
        truth=chosen.truth,
    )
    print(f"{result['kept']} of {result['images']} images kept labels; {chosen.out}/pseudo.json")
    print(f"images a label: {chosen.out}/counts.csv, histogram.png; other thresholds: sweep.csv")


def _noisy_student(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(
        verbs,
        "noisy-student",
        "a teacher and rounds of pseudo-labels and students; run again it goes on",
        "maknet noisy-student --config noisy_student --workdir runs/ns \\\n"
        "    --config.labelled=shards/deeplesion --config.unlabelled=shards/tcia",
        _run_noisy_student,
        takes_config=True,
    )
    verb.add_argument("--config", required=True, help="noisy_student (the paper's), or a .py file")
    verb.add_argument("--workdir", required=True, help="folder of all rounds")
    verb.usage = "maknet noisy-student --config NAME --workdir DIR [--config.FIELD=VALUE ...]"
    options.distributed(verb)


def _run_noisy_student(chosen: argparse.Namespace) -> None:
    from maknet_jax import evaluate, noisy_student
    from maknet_jax.runs import config

    options.start_jax(chosen.distributed)
    summary = noisy_student.noisy_student(
        config.load(chosen.config, chosen.overrides), chosen.workdir
    )
    titles = [f"round {number}" for number in range(len(summary["rounds"]))]
    print(evaluate.table(summary["rounds"], titles))
    print("\nbeside the paper's table 2: " + ", ".join(summary["files"]))
