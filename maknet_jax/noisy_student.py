"""`maknet noisy-student`: a teacher, then rounds of pseudo-labels and students (section 4.4).

    WORKDIR/round-0/        the teacher, a workdir of `maknet train`
    WORKDIR/pseudo-N/       pseudo-labels by the network of round N-1, see `maknet pseudo-label`
    WORKDIR/round-N/        the student of round N
    WORKDIR/table2.csv      and .md, .png: the metrics of each round on the test sets; beside the
                            paper's if the labelled images are DeepLesion

The paper does not specify two details, which are our choice: each round labels and is evaluated
with its checkpoint of the best validation AUC, and images without any pseudo-label are dropped.

Every stage resumes if interrupted: a run that is killed and restarted gives the same numbers.
"""

import pathlib
from collections.abc import Sequence

import jax
import ml_collections

from maknet_jax import console, evaluate, files, pseudo_label, train
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.figures import charts
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir
from maknet_jax.runs.claim import claim
from maknet_jax.training import checkpoint

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
SETS = {"test": 0, "hand": 1}  # split -> its half of a row of `PAPER`


def noisy_student(config: ml_collections.ConfigDict, folder: pathlib.Path | str) -> dict:
    """Runs all rounds, or the remaining ones, and writes table 2.

    Args:
      config: a locked config, see `configs/noisy_student.py`.
      folder: the folder of all rounds.

    Returns:
      The summary (also in `summary.json`): the evaluations of all rounds and the files.

    Raises:
      InputError: the config or the data are invalid, or the folder belongs to another run.
      Stopped: a signal; the same call resumes.
    """
    folder = pathlib.Path(folder)
    checkpoint.check_path(folder)
    round_configs = [_round_config(config, folder, n) for n in range(config.rounds + 1)]
    _check(config, round_configs)
    paper = is_paper_data(records.open_dataset(config.labelled))
    main = jax.process_index() == 0
    rounds: list[dict] = []
    with claim(
        folder,
        {"noisy_student.json": configs.to_json(config)},
        command="maknet noisy-student",
        option="--workdir",
        may_change=MAY_CHANGE,
        upgrade=lambda _, stored: {"precision": 0.0} | stored,
    ):
        with console.Log(folder / "log.jsonl" if main else None) as log:
            for number, round_config in enumerate(round_configs):
                if number:
                    log.say(
                        f"round {number} of {config.rounds}: pseudo-labels of round {number - 1}"
                    )
                    pseudo_label.pseudo_label(
                        folder / f"round-{number - 1}",
                        config.unlabelled,
                        folder / f"pseudo-{number}",
                        split=config.split,
                        top=config.top,
                        threshold=config.threshold,
                        precision=config.precision or None,
                        soft=config.soft,
                        checkpoint=config.checkpoint,
                    )
                log.say(f"round {number} of {config.rounds}: {'student' if number else 'teacher'}")
                first = folder / "round-1" / "config.json"
                if number > 1 and first.is_file():
                    # In a run of an earlier version, later students have the recipe of the first.
                    stored = configs.to_json(configs.read_stored(first.parent))
                    round_config, _ = configs.as_stored(round_config, stored, lacking=False)
                train.train(round_config, folder / f"round-{number}")
                rounds.append(evaluate.evaluate(folder / f"round-{number}", splits=config.evaluate))
                if main:
                    # Finished rounds can be read while the next one runs.
                    _write_table(folder, rounds, paper=paper)
    summary = {
        "workdir": str(folder),
        "rounds": [{"step": each["step"], "splits": each["splits"]} for each in rounds],
        "files": [str(folder / f"table2.{suffix}") for suffix in ("csv", "md", "png")],
    }
    if main:
        files.write_json(folder / "summary.json", summary)
    return summary


def _check(
    config: ml_collections.ConfigDict, round_configs: Sequence[ml_collections.ConfigDict]
) -> None:
    """Checks all rounds before the first one starts.

    Raises:
      InputError: a config value, a data set or a split is invalid.
    """
    if config.rounds < 0:
        raise InputError(f"config rounds {config.rounds} should be 0 or above")
    if config.checkpoint not in workdir.FOLDERS:
        raise InputError(f"config checkpoint {config.checkpoint!r} is unknown: choose best or last")
    pseudo_label.check_rule(config.top, config.threshold, config.precision or None)
    labelled, unlabelled = map(records.open_dataset, (config.labelled, config.unlabelled))
    records.check_size(unlabelled, labelled.size, str(labelled.path))
    evaluate.splits_to_score(labelled, config.evaluate)
    evaluate.splits_to_score(unlabelled, [config.split])
    for round_config in round_configs:
        configs.validate(round_config, labelled.size, jax.device_count())


def _round_config(
    config: ml_collections.ConfigDict, folder: pathlib.Path, number: int
) -> ml_collections.ConfigDict:
    """The config of a round with its data and the pseudo-labels of the previous round."""
    changes = [f"data.path={config.labelled}", f"seed={config.seed}"]
    if number:
        changes.append(f"pseudo.path={folder / f'pseudo-{number}'}")
        if config.from_last:
            changes += [f"init.path={folder / f'round-{number - 1}'}", "init.head=True"]
        return configs.load(config.student, [*changes, *config.student_changes])
    return configs.load(config.teacher, [*changes, *config.teacher_changes])


def table(rounds: Sequence[dict], *, paper: bool) -> tuple[list[str], list[list[str]]]:
    """Table 2: the metrics of each round on each split.

    Args:
      rounds: the results of `evaluate`, one per round.
      paper: add the paper's numbers for the splits and rounds that it reports.

    Returns:
      (header, rows), with the columns `test_auc`, `paper_test_auc` and so on.
    """
    splits = list(rounds[0]["splits"])
    header = ["round"]
    for split in splits:
        header += [f"{split}_{metric}" for metric in METRICS]
        header += [f"paper_{split}_{metric}" for metric in METRICS if paper and split in SETS]
    rows = []
    for number, summary in enumerate(rounds):
        row = [f"{number} ({'student' if number else 'teacher'})"]
        for split in splits:
            values = summary["splits"][split]
            row += [_cell(values[metric]) for metric in METRICS]
            if paper and split in SETS:
                published = PAPER[number][SETS[split]] if number in PAPER else [None] * len(METRICS)
                row += map(_cell, published)
        rows.append(row)
    return header, rows


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def is_paper_data(dataset: records.Dataset) -> bool:
    """Whether the paper's numbers are comparable: DeepLesion's slices, not a generated phantom."""
    return dataset.info["kind"] == "deeplesion" and not dataset.info.get("about", {}).get("phantom")


def _write_table(folder: pathlib.Path, rounds: Sequence[dict], *, paper: bool) -> None:
    header, rows = table(rounds, paper=paper)
    console.write_table(folder / "table2.csv", header, rows)
    with files.write_whole(folder / "table2.md") as file:
        file.write(console.markdown_table(header, rows))
    lines = {
        split: [summary["splits"][split] for summary in rounds] for split in rounds[0]["splits"]
    }
    published = {
        split: [dict(zip(METRICS, PAPER[n][half], strict=True)) for n in PAPER if n < len(rounds)]
        for split, half in SETS.items()
        if paper and split in lines
    }
    charts.write_rounds(folder / "table2.png", lines, published, metrics=("auc", "f1"))
