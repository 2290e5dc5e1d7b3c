"""`maknet noisy-student`: a teacher, then rounds of pseudo-labels and students (section 4.4).

    WORKDIR/round-0/        the teacher, a workdir of `maknet train`
    WORKDIR/pseudo-N/       what round N-1 labelled, see `maknet pseudo-label`
    WORKDIR/round-N/        the student of round N
    WORKDIR/table2.csv      and .md, .png: what each round reaches on the test sets

Every part goes on where it was, so the same command does: killed anywhere, it ends with the same
numbers.
"""

import pathlib

import jax

from maknet_jax import console, evaluate, files, pseudo_label, train
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.figures import charts
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir
from maknet_jax.runs.claim import claim

# May change on resume: more rounds may follow, and moved data keep their fingerprint.
MAY_CHANGE = ("rounds", "labelled", "unlabelled")
METRICS = ("auc", "f1", "precision", "recall")
# Table 2: round -> AUC, F1, precision, recall on the text-mined, then on the hand-labelled set.
PAPER = {
    0: ((0.9051, 0.2078, 0.4696, 0.4744), (0.9101, 0.2755, 0.4638, 0.5780)),
    1: ((0.9074, 0.2231, 0.1636, 0.6384), (0.9153, 0.3084, 0.2471, 0.7833)),
    2: ((0.9065, 0.2278, 0.1707, 0.6586), (0.9177, 0.3151, 0.2610, 0.7778)),
    3: ((0.9093, 0.2179, 0.1601, 0.6618), (0.9181, 0.3065, 0.2486, 0.7455)),
    4: ((0.9064, 0.2108, 0.1554, 0.7042), (0.9164, 0.2904, 0.2226, 0.8273)),
    5: ((0.9112, 0.2275, 0.1735, 0.6583), (0.9102, 0.3086, 0.2466, 0.7654)),
}
SETS = {"test": 0, "hand": 1}  # which half of a row of the paper a split stands beside


def noisy_student(config, folder):
    """Runs all rounds, or those that are left, and writes table 2.

    Args:
      config: a locked config, see `configs/noisy_student.py`.
      folder: the folder of all rounds.

    Returns:
      The summary (also in `summary.json`): the evaluations of all rounds and the files.

    Raises:
      InputError: the config or the data do not fit, or the folder is another run's.
      Stopped: SIGTERM or SIGINT; the same call goes on.
    """
    folder = pathlib.Path(folder)
    pages = [_page(config, folder, number) for number in range(config.rounds + 1)]
    _check(config, pages)
    main = jax.process_index() == 0
    claim(
        folder,
        {"noisy_student.json": configs.to_json(config)},
        command="maknet noisy-student",
        option="--workdir",
        may_change=MAY_CHANGE,
    )
    rounds = []
    with console.Log(folder / "log.jsonl" if main else None) as log:
        for number, page in enumerate(pages):
            if number:
                log.say(f"round {number} of {config.rounds}: pseudo-labels by round {number - 1}")
                pseudo_label.pseudo_label(
                    folder / f"round-{number - 1}",
                    config.unlabelled,
                    folder / f"pseudo-{number}",
                    split=config.split,
                    top=config.top,
                    threshold=config.threshold,
                    soft=config.soft,
                    checkpoint=config.checkpoint,
                )
            log.say(f"round {number} of {config.rounds}: {'student' if number else 'teacher'}")
            train.train(page, folder / f"round-{number}")
            rounds.append(evaluate.evaluate(folder / f"round-{number}", splits=config.evaluate))
            if main:
                _write_table(folder, rounds)  # what is reached can be read while it goes on
    summary = {
        "workdir": str(folder),
        "rounds": [{"step": done["step"], "splits": done["splits"]} for done in rounds],
        "files": [str(folder / f"table2.{suffix}") for suffix in ("csv", "md", "png")],
    }
    if main:
        files.write_json(folder / "summary.json", summary)
    return summary


def _check(config, pages):
    """Refuses before the first round what a later part would refuse after it."""
    if config.rounds < 0:
        raise InputError(f"config rounds {config.rounds} should be 0 or above")
    if config.checkpoint not in workdir.FOLDERS:
        raise InputError(f"config checkpoint {config.checkpoint!r} is unknown: choose best or last")
    pseudo_label.check_rule(config.top, config.threshold)
    labelled, unlabelled = map(records.open_dataset, (config.labelled, config.unlabelled))
    if labelled.size != unlabelled.size:
        raise InputError(
            f"{unlabelled.path} has images of {unlabelled.size}, {labelled.path} of "
            f"{labelled.size}: prepare one of them again"
        )
    given = labelled.info["splits"]
    known = [name for name in evaluate.DEFAULT_SPLITS if name in given and given[name]["count"]]
    if not config.evaluate and not known:
        raise InputError(f"{labelled.path} has neither test nor hand: name splits in evaluate")
    wanted = [(labelled, name) for name in config.evaluate] + [(unlabelled, config.split)]
    for dataset, name in wanted:
        if not dataset.split(name)["count"]:
            raise InputError(f"split {name!r} of {dataset.path} is empty")
    for page in pages:
        configs.validate(page, labelled.size, jax.device_count())


def _page(config, folder, number):
    """The page of a round with its data, and the teacher's labels of the round before."""
    changes = [f"data.path={config.labelled}", f"seed={config.seed}"]
    if number:
        changes.append(f"pseudo.path={folder / f'pseudo-{number}'}")
        if config.from_last:
            changes += [f"init.path={folder / f'round-{number - 1}'}", "init.head=True"]
        return configs.load(config.student, [*changes, *config.student_changes])
    return configs.load(config.teacher, [*changes, *config.teacher_changes])


def table(rounds):
    """(header, rows): each round's metrics on each set, and the paper's beside them.

    Args:
      rounds: what `evaluate` returned, one a round.
    """
    splits = list(rounds[0]["splits"])
    header = ["round"]
    for split in splits:
        header += [f"{split} {metric}" for metric in METRICS]
        header += [f"paper {metric}" for metric in METRICS] if split in SETS else []
    rows = []
    for number, done in enumerate(rounds):
        row = [f"{number} ({'student' if number else 'teacher'})"]
        for split in splits:
            values = done["splits"][split]
            row += ["-" if values[m] is None else f"{values[m]:.4f}" for m in METRICS]
            if split in SETS:
                paper = PAPER[number][SETS[split]] if number in PAPER else ()
                row += [f"{value:.4f}" for value in paper] or ["-"] * len(METRICS)
        rows.append(row)
    return header, rows


def _write_table(folder, rounds):
    header, rows = table(rounds)
    console.write_table(folder / "table2.csv", header, rows)
    with files.write_whole(folder / "table2.md") as file:
        file.write(console.markdown_table(header, rows))
    lines = {}
    for split in rounds[0]["splits"]:
        lines[split] = [done["splits"][split] for done in rounds]
    paper = {
        split: [dict(zip(METRICS, PAPER[n][half], strict=True)) for n in PAPER if n < len(rounds)]
        for split, half in SETS.items()
        if split in lines
    }
    charts.write_rounds(folder / "table2.png", lines, paper, metrics=("auc", "f1"))
