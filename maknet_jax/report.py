"""`maknet report`: one run on one offline page."""

import csv
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

from maknet_jax import attribute, files
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation.evaluator import Evaluator
from maknet_jax.explain import network, results, selection, truth
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.figures import charts, overlay, page
from maknet_jax.runs import workdir
from maknet_jax.training import sharding, transfer

METRICS = {
    "auc": "AUC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "f1_at_0.5": "F1 at 0.5",
    "examples": "images",
}
CURVES = ({"train/loss": "training loss"}, {"val/auc": "validation AUC", "val/f1": "validation F1"})


def report(
    folder: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    *,
    split: str | None = None,
    data: str | pathlib.Path | None = None,
    count: int = 3,
    steps: int = 50,
) -> pathlib.Path:
    """Writes curves, tables, scores per label, the best and worst cases and the contact sheet.

    Cases are ranked by their mean cross entropy over the known labels. A best case has at least one
    label that is present.

    Args:
      folder: the workdir of `maknet train`; results of `maknet evaluate` are shown if present. A
        bundle or a released name, which have no curves, need `out` and `data`.
      out: the folder to write; None takes WORKDIR/report.
      split: the split of the cases; None takes test if it has images, else the validation split.
      data: the prepared data set; None takes the one that the network was trained on.
      count: number of best cases, and of worst cases.
      steps: of Integrated Gradients.

    Returns:
      The path of the page.

    Raises:
      InputError: `folder` is not a run, or its data is missing.
    """
    run = workdir.open_run(folder)
    folder = run.source
    out = run.output_folder("report") if out is None else pathlib.Path(out)
    dataset = records.open_dataset(data or run.data_path)
    if split is None:
        known = dataset.info["splits"]
        split = "test" if "test" in known and known["test"]["count"] else run.val_split
    takes_box = run.model.takes_box
    text = page.render(
        "report",
        title=f"Report of {folder.resolve().name}",
        network=run.model_name,
        step=run.step,
        checkpoint=run.name,
        labels=len(run.vocabulary),
        size=run.size,
        data=dataset.path,
        curves=_curves(folder),
        metrics=list(METRICS.values()),
        scores=_scores(folder),
        label_scores=_label_scores(folder),
        split=split,
        takes_box=takes_box,
        cases=[] if takes_box else _cases(run, folder, out, dataset, split, count, steps),
        contact_sheet=_contact_sheet(dataset),
    )
    with files.write_whole(out / "index.html") as file:
        file.write(text)
    return out / "index.html"


def _curves(folder: pathlib.Path) -> str | None:
    """The chart of `metrics.jsonl` as a data URI; None where there is nothing to draw."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    panels = []
    for names in CURVES:
        points = {
            title: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            for name, title in names.items()
        }
        panels.append({title: drawn for title, drawn in points.items() if drawn})
    return overlay.to_uri(charts.draw_curves(panels), lossy=False) if any(panels) else None


def _scores(folder: pathlib.Path) -> list[list[str]]:
    """One row per evaluated split: its name and the `METRICS`."""
    rows: list[list[str]] = []
    for path in sorted((folder / "evaluation").glob("summary_*.json")):
        for split, values in files.read_json(path)["splits"].items():
            numbers = [values[name] for name in METRICS]
            row = [split, *("-" if n is None else f"{n:.4g}" for n in numbers)]
            rows += [] if row in rows else [row]
    return rows


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
    scores = evaluator.scores(run.variables)
    correct = np.where(scores.labels > 0, scores.scores, 1 - scores.scores)
    loss = -np.log(np.clip(correct, 1e-7, 1)) * scores.label_mask
    loss = loss.sum(axis=1) / np.maximum(scores.label_mask.sum(axis=1), 1)
    order = np.argsort(loss, kind="stable")
    has_label = (scores.labels * scores.label_mask).any(axis=1)
    best = [int(k) for k in order if has_label[k]][:count]
    worst = [int(k) for k in order[::-1] if k not in best][:count]
    return [
        (f"{kind.title()} cases", _cards(run, folder, out, dataset, split, kind, numbers, steps))
        for kind, numbers in (("best", best), ("worst", worst))
        if numbers
    ]


def _cards(
    run: workdir.Run,
    folder: pathlib.Path,
    out: pathlib.Path,
    dataset: records.Dataset,
    split: str,
    kind: str,
    numbers: Sequence[int],
    steps: int,
) -> list[Markup]:
    """The cards of some images of a split, whose attributions are computed unless present."""
    source = dataset.source(split)
    ids = [source[number].id for number in numbers]
    # Other weights, data or cases get their own folder, so that the results in one never change.
    settings = transfer.digest(**run.variables), dataset.fingerprint, ids, steps, truth.RULE
    explained = out / f"{kind}-{split}-{selection.digest(settings)}"
    options = SelectionOptions(split=split, ids=ids, data=dataset.path)
    attribute.attribute(folder, explained, options, PathOptions(steps=steps))
    paths = {results.load_metadata(file)["id"]: file for file in explained.glob("cases/*.npz")}
    display = files.read_json(explained / "settings.json")["display"]
    names = [network.network_name(run)]
    return list(attribute.cards([paths[name] for name in ids], display, names))


def _contact_sheet(dataset: records.Dataset) -> str | None:
    """The contact sheet of the data set as a data URI; None where there is none."""
    path = dataset.path / "contact_sheet.png"
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return overlay.to_uri(np.asarray(picture.convert("RGB")))
