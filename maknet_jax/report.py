"""`maknet report`: one run on one offline page."""

import csv
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from maknet_jax import attribute, console, evaluate, files, scoring
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation.evaluator import Evaluator
from maknet_jax.evaluation.series import FLAGS
from maknet_jax.explain import network, results, selection, truth
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.explain.ranking import group_of
from maknet_jax.figures import charts, contact_sheet, overlay, page, picture
from maknet_jax.runs import ownership, workdir
from maknet_jax.training import sharding, transfer

METRICS = {
    "auc": "AUC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "f1_at_0.5": "F1 at 0.5",
    "examples": "images",
}
CURVES = {"train/loss": "training loss", "val/auc": "validation AUC", "val/f1": "validation F1"}
_SAMPLES = 18  # images of the data set


def report(
    folder: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    *,
    split: str | None = None,
    data: str | pathlib.Path | None = None,
    count: int = 3,
    steps: int = 50,
    ct: str | pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes curves, tables, scores per label, the best and worst cases and sample images.

    Cases are ranked by their mean cross entropy over the scored labels. Best cases have at least
    one label that is present. The best cases are of different patients with different labels, and
    so are the worst.

    Args:
      folder: the workdir of `maknet train`; results of `maknet evaluate` are shown if present. A
        bundle or a released name, which have no curves, need `out` and `data`.
      out: the folder to write; None takes WORKDIR/report.
      split: the split of the cases; None takes test if it has images, else the validation split.
      data: the prepared data set; None takes the one that the network was trained on.
      count: number of best cases, and of worst cases.
      steps: of Integrated Gradients.
      ct: see `SelectionOptions`.

    Returns:
      The path of the page.

    Raises:
      InputError: `folder` is not a run, or its data is missing.
    """
    run = workdir.open_run(folder)
    out = run.output_folder("report") if out is None else pathlib.Path(out)
    with ownership.owned(out, "maknet report", "--out"):
        return _report(run, out, split, data, count, steps, ct)


def _report(
    run: workdir.Run,
    out: pathlib.Path,
    split: str | None,
    data: str | pathlib.Path | None,
    count: int,
    steps: int,
    ct: str | pathlib.Path | None,
) -> pathlib.Path:
    """See `report`."""
    folder = run.source
    dataset = records.open_dataset(data or run.data_path)
    if split is None:
        known = dataset.info["splits"]
        split = "test" if "test" in known and known["test"]["count"] else run.val_split
    takes_box = run.model.takes_box
    curves, unplotted = _curves(folder, run.step)
    scores = _scores(folder)
    text = page.render(
        "report",
        title=f"Report of {folder.resolve().name}",
        network=run.model_name,
        step=run.step,
        checkpoint=run.name,
        labels=len(run.vocabulary),
        size=run.size,
        data=dataset.address,
        trained_on=run.trained_on,
        complete=truth.labels_are_complete(dataset.info, split),
        warnings=[f"{name}: {FLAGS[name]}" for name in scoring.network_flags(run)],
        numbers=_headline(scores),
        curves=curves,
        unplotted=unplotted,
        metrics=list(METRICS.values()),
        scores=[[name, *("-" if n is None else f"{n:.4g}" for n in row)] for name, row in scores],
        label_scores=_label_scores(folder),
        split=split,
        takes_box=takes_box,
        cases=[] if takes_box else _cases(run, folder, out, dataset, split, count, steps, ct),
        samples=contact_sheet.make_tiles(dataset.sample(_SAMPLES), dataset.vocabulary.names),
        window=picture.describe_window(picture.SOFT_TISSUE),
    )
    with files.write_whole(out / "index.html") as file:
        file.write(text)
    return out / "index.html"


def _curves(folder: pathlib.Path, step: int) -> tuple[list[tuple[str, str]], list[str]]:
    """([(chart as a data URI, alternative text)], sentences about curves of one point)."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    charts_of_run, unplotted = [], []
    for name, title in CURVES.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        (first, start), (last, end) = points[0], points[-1]
        if first == last:
            unplotted.append(f"{title}: {end:.4g} at step {last}, the only value.")
            continue
        drawn = charts.draw_curve(title, points, marked=step)
        alt = f"{title} from {start:.3g} at step {first} to {end:.3g} at step {last}"
        charts_of_run.append((overlay.to_uri(drawn, lossy=False), alt))
    return charts_of_run, unplotted


def _scores(folder: pathlib.Path) -> list[tuple[str, list[float | None]]]:
    """(split, its `METRICS`) of each evaluation."""
    rows: list[tuple[str, list[float | None]]] = []
    for summary in evaluate.summaries(folder):
        for split, values in summary["splits"].items():
            row = split, [values.get(name) for name in METRICS]
            rows += [] if row in rows else [row]
    return rows


def _headline(scores: Sequence[tuple[str, list[float | None]]]) -> list[tuple[str, str]]:
    """(AUC, the split) of each evaluation for which it is defined."""
    return [
        (f"{auc:.3f}", f"AUC, split {split} ({console.plural(round(images), 'image')})")
        for split, (auc, *_, images) in scores
        if auc is not None and images is not None
    ]


def _label_scores(folder: pathlib.Path) -> list[tuple[str, list[list[str]]]]:
    """(split, one row per evaluated label, by decreasing AUC) of each evaluated split."""
    tables = []
    for path in sorted((folder / "evaluation").glob("*_labels.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["evaluated"] == "True"]
        rows.sort(key=lambda row: -float(row["auc"]))
        cells = [
            [
                row["name"],
                row["positives"],
                *(f"{float(row[name]):.3f}" for name in ("auc", "f1", "precision", "recall")),
            ]
            for row in rows
        ]
        tables.append((path.stem.removesuffix("_labels"), cells))
    return tables


def _cases(
    run: workdir.Run,
    folder: pathlib.Path,
    out: pathlib.Path,
    dataset: records.Dataset,
    split: str,
    count: int,
    steps: int,
    ct: str | pathlib.Path | None,
) -> list[tuple[str, list[Markup]]]:
    """(heading, cards) of the best and of the worst images of a split."""
    if dataset.vocabulary.names != run.vocabulary.names:
        raise InputError(
            f"{dataset.path} has other labels than {folder}: it changed after the training; "
            "restore the data set or train again"
        )
    source = dataset.source(split)
    evaluator = Evaluator(
        source, run.predict, batch_size=sharding.round_up_to_devices(run.batch_size)
    )
    scores = evaluator.scores(run.prepared)
    correct = np.where(scores.labels > 0, scores.scores, 1 - scores.scores)
    loss = -np.log(np.clip(correct, 1e-7, 1)) * scores.label_mask
    loss = loss.sum(axis=1) / np.maximum(scores.label_mask.sum(axis=1), 1)
    order = np.argsort(loss, kind="stable").tolist()
    has_label = (scores.labels * scores.label_mask).any(axis=1)
    best = _varied([k for k in order if has_label[k]], source, count)
    worst = _varied([k for k in order[::-1] if k not in best], source, count)
    scored = scores.label_mask.sum(axis=1)
    cases = []
    for kind, numbers in (("best", best), ("worst", worst)):
        notes = [
            f"mean cross entropy {loss[k]:.3f} over {scored[k]:.0f} scored labels" for k in numbers
        ]
        if numbers:
            drawn = _cards(run, folder, out, dataset, split, kind, numbers, notes, steps, ct)
            cases.append((f"{kind.title()} cases", drawn))
    return cases


def _varied(numbers: Sequence[int], source: records.RecordSource, count: int) -> list[int]:
    """The first `count` images of different patients and with different labels, in this order.

    Series count as patients where these are unknown. If there are too few sets of labels, they
    repeat.
    """
    chosen: dict[str, int] = {}
    repeated: dict[str, int] = {}
    sets = set()
    for number in numbers:
        if len(chosen) == count:
            break
        example = source[number]
        patient, present = group_of(example.id, example.meta), example.labels.tobytes()
        if patient in chosen:
            continue
        if present in sets:
            repeated.setdefault(patient, number)
            continue
        sets.add(present)
        chosen[patient] = number
    for patient, number in repeated.items():
        if len(chosen) < count:
            chosen.setdefault(patient, number)
    return sorted(chosen.values(), key=numbers.index)


def _cards(
    run: workdir.Run,
    folder: pathlib.Path,
    out: pathlib.Path,
    dataset: records.Dataset,
    split: str,
    kind: str,
    numbers: Sequence[int],
    notes: Sequence[str],
    steps: int,
    ct: str | pathlib.Path | None,
) -> list[Markup]:
    """The cards of some images of a split, whose attributions are computed unless present."""
    source = dataset.source(split)
    ids = [source[number].id for number in numbers]
    # Other weights, data or cases get their own folder, so that the results in one never change.
    settings = (
        transfer.digest(**run.variables),
        dataset.fingerprint,
        ids,
        steps,
        truth.RULE,
        str(ct),
    )
    explained = out / f"{kind}-{split}-{selection.digest(settings)}"
    options = SelectionOptions(split=split, ids=ids, data=dataset.address, ct=ct)
    attribute.attribute(folder, explained, options, PathOptions(steps=steps))
    paths = {results.load_metadata(file)["id"]: file for file in explained.glob("cases/*.npz")}
    stored = files.read_json(explained / "settings.json")
    names = [network.network_name(run)]
    lines = {paths[name]: [note] for name, note in zip(ids, notes, strict=True)}
    return list(attribute.cards([[paths[name]] for name in ids], stored, names, lines))
