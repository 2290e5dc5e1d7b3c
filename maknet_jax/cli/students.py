"""The commands of semi-supervised training."""

import argparse

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `pseudo-label` and `noisy-student`."""
    _pseudo_label(verbs)
    _noisy_student(verbs)


def _pseudo_label(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "pseudo-label", _run_pseudo_label)
    options.model(verb, "the teacher")
    verb.add_argument("--records", required=True, help="prepared data set of the images")
    verb.add_argument("--out", type=options.folder, required=True, help="folder to write")
    verb.add_argument(
        "--split", default="unlabelled", help="split of the records (default: unlabelled)"
    )
    verb.add_argument(
        "--top", type=options.count, default=15, help="maximum labels per image (default: 15)"
    )
    verb.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="labels must have a confidence above it; images without any label are dropped, our "
        "choice (default: 0.5)",
    )
    verb.add_argument(
        "--precision",
        type=float,
        help="choose a threshold per label, the lowest with at least this precision on the "
        "teacher's validation images; see OUT/thresholds.json (default: --threshold for all)",
    )
    verb.add_argument(
        "--soft", action="store_true", help="students learn the confidences instead of 1"
    )
    verb.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="checkpoint of the teacher; best is by validation AUC, our choice (default: best)",
    )
    verb.add_argument(
        "--batch-size", type=options.count, help="images per step (default: the teacher's)"
    )
    verb.add_argument(
        "--truth",
        action="store_true",
        help="the split has labels: compare the pseudo-labels with them",
    )
    options.processes(verb)


def _run_pseudo_label(chosen: argparse.Namespace) -> None:
    """Pseudo-label images with a trained teacher; resumes if interrupted.

    maknet pseudo-label --model runs/teacher --records shards/tcia --out shards/pseudo-1
    """
    from maknet_jax import pseudo_label

    options.start_jax(chosen)
    names = ("split", "top", "threshold", "precision", "soft", "checkpoint", "batch_size", "truth")
    result = pseudo_label.pseudo_label(
        chosen.model, chosen.records, chosen.out, **options.selected(chosen, *names)
    )
    options.show(
        f"{result['kept']} of {result['images']} images labelled, see {chosen.out}/pseudo.json"
    )
    options.show(
        f"images per label: {chosen.out}/counts.csv, histogram.png; other thresholds: sweep.csv"
    )


def _noisy_student(verbs: argparse._SubParsersAction) -> None:
    verb = options.verb(verbs, "noisy-student", _run_noisy_student, takes_config=True)
    verb.add_argument("--config", required=True, help="noisy_student (the paper's) or a .py file")
    verb.add_argument("--workdir", type=options.folder, required=True, help="folder of all rounds")
    verb.usage = "maknet noisy-student --config NAME --workdir DIR [--config.FIELD=VALUE ...]"
    options.processes(verb)


def _run_noisy_student(chosen: argparse.Namespace) -> None:
    r"""Train a teacher, then rounds of pseudo-labels and students; resumes if interrupted.

        maknet noisy-student --config noisy_student --workdir runs/ns \
            --config.labelled=shards/deeplesion --config.unlabelled=shards/tcia
    """
    from maknet_jax import evaluate, noisy_student
    from maknet_jax.runs import config

    options.keep_freed_memory()
    options.start_jax(chosen)
    summary = noisy_student.noisy_student(
        config.load(chosen.config, chosen.overrides), chosen.workdir
    )
    titles = [f"round {number}" for number in range(len(summary["rounds"]))]
    print(evaluate.table(summary["rounds"], titles))
    options.show("\ntable 2: " + ", ".join(summary["files"]))
