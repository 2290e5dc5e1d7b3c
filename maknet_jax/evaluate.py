"""`maknet evaluate`: scores a trained network by LesaNet's protocol (tables 1 to 3)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maknet_jax import console, files
from maknet_jax.data import records
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError
from maknet_jax.evaluation import bootstrap, protocol
from maknet_jax.evaluation.evaluator import Evaluator, Scores
from maknet_jax.runs import claim, workdir
from maknet_jax.training import sharding

DEFAULT_SPLITS = ("test", "hand")
# LesaNet's three groups of labels, by their number of training examples.
FREQUENCIES = {"rare": (0, 100), "medium": (101, 1000), "frequent": (1001, float("inf"))}
METRICS = ("auc", "f1", "precision", "recall")


def evaluate(
    folder: pathlib.Path | str,
    *,
    splits: Sequence[str] | None = None,
    data: pathlib.Path | str | None = None,
    checkpoint: str = "best",
    batch_size: int | None = None,
    rules: str = protocol.OURS,
    intervals: bool = False,
    out: pathlib.Path | str | None = None,
) -> dict:
    """Scores splits and writes `WORKDIR/evaluation/SPLIT.json` and `SPLIT_labels.csv`.

    Thresholds are chosen on the validation split. On a data set other than the training data the
    thresholds of the training run apply, and the results go to `WORKDIR/evaluation/on-NAME/`.
    Macro averages are over the labels that have positives and negatives. Averages at the fixed
    threshold 0.5 and micro averages are reported too. For labels with classes (body part, type,
    attribute), `groups` and `SPLIT_groups.csv` hold the means by class and by the number of
    training examples.

    Args:
      folder: the workdir of `maknet train`; a bundle or a released name needs `data` and `out`.
      splits: names; None takes those of `test` and `hand` that exist.
      data: another prepared data set with the same labels; None takes the training data.
      checkpoint: "best" or "last".
      batch_size: images per step; None takes the config's.
      rules: "ours", or "lesanet" to agree with LesaNet's published evaluate.py, see
        `evaluation.protocol`; the results of "lesanet" go to a subfolder `lesanet`.
      intervals: add 95 % intervals of AUC and F1, macro and per label, by a bootstrap over
        patients (`evaluation.bootstrap`); the records must name their patients.
      out: the folder to write instead of `WORKDIR/evaluation`.

    Returns:
      The summary, also written to `summary_SPLITS.json`; `splits` holds the metrics of each split.

    Raises:
      InputError: a split is missing or empty, the labels or the image size differ from the
        network's, or the data set lacks the direct parents that LesaNet's rules need.
    """
    protocol.find_rules(rules)  # before anything is scored
    run = workdir.open_run(folder, checkpoint_name=checkpoint)
    out = pathlib.Path(out) if out else run.output_folder("evaluation")
    with claim.owned(out, "maknet evaluate"):
        return _evaluate(run, folder, splits, data, batch_size, rules, intervals, out)


def _evaluate(
    run: workdir.Run,
    folder: pathlib.Path | str,
    splits: Sequence[str] | None,
    data: pathlib.Path | str | None,
    batch_size: int | None,
    rules: str,
    intervals: bool,
    out: pathlib.Path,
) -> dict:
    """See `evaluate`."""
    dataset = records.open_dataset(data or run.data_path)
    other = dataset.fingerprint != run.dataset.get("fingerprint")
    if dataset.vocabulary.names != run.vocabulary.names:
        raise InputError(
            f"the {len(dataset.vocabulary)} labels of {dataset.path} differ from the "
            f"{len(run.vocabulary)} of {folder}: evaluate on data with the labels of the network"
        )
    records.check_size(dataset, run.size)
    requested = splits_to_score(dataset, splits)
    parents = direct_parents(dataset) if rules == protocol.LESANET else run.vocabulary.parents
    val = None if other else run.val_split
    chosen_on = val if val and dataset.info["splits"].get(val, {}).get("count") else None
    names = list(dict.fromkeys([*([chosen_on] if chosen_on else []), *requested]))
    scores = score_splits(run, dataset, names, batch_size or run.batch_size)
    thresholds = scores[chosen_on].thresholds(rules) if chosen_on else run.thresholds
    out = out / (f"on-{pathlib.PurePath(dataset.address).name}" if other else "")
    out = out / ("" if rules == protocol.OURS else rules)
    summary: dict[str, Any] = {
        "workdir": str(folder),
        "data": dataset.url or str(dataset.path),
        "checkpoint": run.name,
        "step": run.step,
        "trained_on": run.trained_on,
        "thresholds": f"chosen on {chosen_on}" if chosen_on else "of the training run",
        "rules": rules,
        "out": str(out),
    }
    reports = {name: scores[name].report(thresholds, parents, rules) for name in requested}
    counts = None if other else dataset.split(run.train_split)["label_counts"]
    summary["splits"] = {
        name: report.summary | by_group(report, run.vocabulary, counts)
        for name, report in reports.items()
    }
    for name in requested if intervals else ():
        patients = patients_of(dataset, name)
        predicted = scores[name].predicted(thresholds, parents, rules)
        summary["splits"][name]["intervals"] = bootstrap_split(
            scores[name], predicted, patients, run.vocabulary.names
        )
    if jax.process_index() == 0:
        _write(out, summary, reports, thresholds, run.vocabulary.names)
        with console.Log((out if run.is_read_only else run.source) / "log.jsonl") as log:
            log.event(event="evaluated", **summary)
    return summary


def summaries(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The summaries of `maknet evaluate` in a workdir.

    Raises:
      InputError: one is damaged.
    """
    results = []
    for path in sorted((folder / "evaluation").glob("summary_*.json")):
        summary = files.read_json(path)
        try:
            _ = summary["checkpoint"], summary["step"], list(summary["splits"].items())
            intact = all(isinstance(split, dict) for split in summary["splits"].values())
        except (KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise InputError(f"{path} is damaged: delete it, or run `maknet evaluate` again")
        results.append(summary)
    return results


def patients_of(dataset: records.Dataset, split: str) -> np.ndarray:
    """The patient of each record of a split, int `[N]` from 0.

    Raises:
      InputError: records do not name their patient, as those of `prepare segmentations` do.
    """
    source = dataset.source(split)
    names = [source[index].meta.get("patient", "") for index in range(len(source))]
    if not all(names):
        raise InputError(
            f"records of {dataset.path} name no patient, which intervals need: leave them out, or "
            "prepare the data with `maknet prepare segmentations`"
        )
    return np.unique(names, return_inverse=True)[1]


def bootstrap_split(
    scores: Scores, predicted: np.ndarray, patients: np.ndarray, names: Sequence[str]
) -> dict:
    """Intervals of AUC and F1 by a bootstrap over patients, see `bootstrap.summarize`.

    Args:
      scores: of N records.
      predicted: bool `[N, K]`.
      patients: int `[N]`, the patient of each record.
      names: of the K labels.
    """
    labels, known = scores.labels > 0, scores.label_mask
    weights = bootstrap.draw_weights(patients)
    draws = bootstrap.metric_draws(scores.scores, labels, known, predicted, weights)
    counts = bootstrap.patients_by_label(labels, known, patients)
    return bootstrap.summarize(draws, names, counts, int(patients.max()) + 1)


def splits_to_score(dataset: records.Dataset, splits: Sequence[str] | None = None) -> list[str]:
    """The splits that are evaluated: `splits`, or those of `test` and `hand` that have examples.

    Raises:
      InputError: a split is missing or empty, or there is neither test nor hand.
    """
    available = [name for name, split in dataset.info["splits"].items() if split["count"]]
    names = list(splits or [name for name in DEFAULT_SPLITS if name in available])
    if not names:
        raise InputError(f"{dataset.path} has neither test nor hand: name the splits to evaluate")
    for name in names:
        dataset.split(name)
        if name not in available:
            raise InputError(f"split {name!r} of {dataset.path} is empty: choose another split")
    return names


def direct_parents(dataset: records.Dataset) -> list[list[int]]:
    """For each label of a data set the columns of its direct parents.

    Raises:
      InputError: labels have ancestors, but `dataset.json` does not say which are direct parents.
    """
    vocabulary = dataset.vocabulary
    by_name = dataset.info.get("about", {}).get("direct_parents")
    if by_name is None and any(vocabulary.parents):
        raise InputError(
            f"{dataset.path} does not record direct parents, which LesaNet's rules need: prepare "
            "the data again and pass it as --data"
        )
    return [
        [vocabulary.index[parent] for parent in (by_name or {}).get(name, ())]
        for name in vocabulary.names
    ]


def score_splits(
    run: workdir.Run, dataset: records.Dataset, names: Sequence[str], batch_size: int
) -> dict[str, Scores]:
    """Scores splits of a data set.

    Args:
      run: the network.
      dataset: data with the labels and the image size of the network.
      names: splits.
      batch_size: images per step, rounded up to a multiple of the devices.

    Returns:
      Split -> scores, on all processes.
    """
    scores = {}
    total = sum(dataset.split(name)["count"] for name in names)
    with console.progress("evaluate", total) as advance:
        for name in names:
            evaluator = Evaluator(
                dataset.source(name),
                run.predict,
                batch_size=sharding.round_up_to_devices(batch_size),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            scores[name] = evaluator.scores(run.prepared, advance)
    return scores


def by_group(
    report: protocol.Report, vocabulary: Vocabulary, counts: Sequence[int] | None = None
) -> dict[str, dict]:
    """Averages the metrics of the evaluated labels by class and by number of training examples.

    Args:
      report: `protocol.Report`.
      vocabulary: the labels.
      counts: training examples of each label, `[K]`; None omits these groups.

    Returns:
      {"groups": {name: {labels, auc, f1, precision, recall}}}; an empty dict if all labels have
      the same class.
    """
    classes = np.array([label.label_class for label in vocabulary.labels])
    if len(set(classes)) < 2:
        return {}
    members = {str(name): classes == name for name in dict.fromkeys(classes)}
    if counts is not None:
        for name, (least, most) in FREQUENCIES.items():
            members[name] = (np.asarray(counts) >= least) & (np.asarray(counts) <= most)
    groups = {}
    for name, inside in members.items():
        rows = [row for row in report.per_label if inside[row["label"]] and row["evaluated"]]
        means = {m: float(np.mean([row[m] for row in rows])) if rows else None for m in METRICS}
        groups[name] = {"labels": len(rows)} | means
    return {"groups": groups}


def _write(
    out: pathlib.Path,
    summary: dict,
    reports: Mapping[str, protocol.Report],
    thresholds: np.ndarray,
    names: Sequence[str],
) -> None:
    for split, report in reports.items():
        header = ["name", *report.per_label[0]]
        rows = [[names[row["label"]], *row.values()] for row in report.per_label]
        console.write_table(out / f"{split}_labels.csv", header, rows)
        files.write_json(out / f"{split}.json", summary["splits"][split])
        if groups := summary["splits"][split].get("groups"):
            rows = [[name, *means.values()] for name, means in groups.items()]
            console.write_table(out / f"{split}_groups.csv", ["", "labels", *METRICS], rows)
    files.write_json(out / "thresholds.json", np.asarray(thresholds).tolist())
    files.write_json(out / f"summary_{'_'.join(reports)}.json", summary)


def table(summaries: Sequence[dict], titles: Sequence[str]) -> str:
    """A text table like the paper's, with one row per network and split.

    Args:
      summaries: the results of `evaluate`, one per network.
      titles: the names of the networks.
    """
    header = ["", "set", "AUC", "F1", "precision", "recall", "F1 at 0.5", "images"]
    rows = []
    for summary, title in zip(summaries, titles, strict=True):
        for split, values in summary["splits"].items():
            numbers = [values[name] for name in ("auc", "f1", "precision", "recall", "f1_at_0.5")]
            cells = ["-" if number is None else f"{number:.4f}" for number in numbers]
            rows.append([title, split, *cells, values["examples"]])
    return console.format_table(header, rows)


def interval_table(summary: dict) -> str:
    """A text table of the intervals, macro and per label, of the splits that have them."""
    rows, notes = [], []
    for split, values in summary["splits"].items():
        if "intervals" in values:
            rows += [[split, *row] for row in console.interval_rows(values["intervals"])]
            notes.append(f"{split}: {console.describe_intervals(values['intervals'])}")
    return "\n".join([console.format_table(["set", *console.INTERVAL_HEADER], rows), *notes])
