"""`maknet report`: one run on one offline page."""

import csv
import html
import json
import pathlib

import numpy as np
from PIL import Image

from maknet_jax import attribute, files
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation.evaluator import Evaluator
from maknet_jax.explain import results, selection
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


def report(folder, out=None, *, split=None, count=3, steps=50):
    """Writes curves, tables, scores a label, the contact sheet and the best and worst cases.

    A case is judged by its mean cross entropy over the labels that are known; the best ones have a
    label to be right about.

    Args:
      folder: the workdir of `maknet train`; what `maknet evaluate` wrote is shown if it is there.
      out: the folder to write; None takes WORKDIR/report.
      split: of the cases; None takes test, else the validation split.
      count: of cases, best and worst each.
      steps: of Integrated Gradients.

    Returns:
      The path of the page.

    Raises:
      InputError: `folder` is no run, or its data is gone.
    """
    folder = pathlib.Path(folder)
    out = folder / "report" if out is None else pathlib.Path(out)
    run = workdir.open_run(folder)
    data = files.read_json(folder / "dataset.json")["path"]
    dataset = records.open_dataset(data)
    if split is None:
        known = dataset.info["splits"]
        split = "test" if "test" in known and known["test"]["count"] else run.val_split
    parts = [*_curves(folder), *_tables(folder), *_labels(folder)]
    parts += [*_cases(run, folder, out, dataset, split, count, steps), *_sheet(dataset)]
    lead = page.paragraph(
        f"{run.model_name}, step {run.step} ({run.name} checkpoint), "
        f"{len(run.vocabulary)} labels, images of {run.size} x "
        f"{run.size}, trained on {dataset.path}. Research software: nothing here is a "
        "diagnosis."
    )
    with files.write_whole(out / "index.html") as file:
        file.write(page.document(f"Report of {folder.resolve().name}", lead, parts))
    return out / "index.html"


def _heading(text):
    return f"<h2>{html.escape(text)}</h2>\n"


def _curves(folder):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    panels = []
    for names in CURVES:
        points = {
            title: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            for name, title in names.items()
        }
        panels.append({title: drawn for title, drawn in points.items() if drawn})
    if any(panels):
        picture = overlay.to_uri(charts.draw_curves(panels), lossy=False)
        yield _heading("Training")
        yield f'<img class="chart" src="{picture}" alt="curves of loss and validation">\n'


def _tables(folder):
    rows = []
    for path in sorted((folder / "evaluation").glob("summary_*.json")):
        for split, values in files.read_json(path)["splits"].items():
            numbers = [values[name] for name in METRICS]
            row = [split, *("-" if n is None else f"{n:.4g}" for n in numbers)]
            rows += [] if row in rows else [row]
    yield _heading("Scores")
    if rows:
        yield page.table(["set", *METRICS.values()], rows)
        yield page.paragraph(
            "Macro averages over labels with positives and negatives, thresholds chosen on the "
            "validation split."
        )
    else:
        yield page.paragraph("None yet: run maknet evaluate, then this again.")


def _labels(folder):
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
        title = f"Each label on {path.stem.removesuffix('_labels')}: {len(cells)}"
        header = ["label", "positives", "AUC", "F1", "precision", "recall"]
        yield f"<details><summary>{html.escape(title)}</summary>{page.table(header, cells)}"
        yield "</details>\n"


def _cases(run, folder, out, dataset, split, count, steps):
    """The best and the worst images of a split with their attributions."""
    if run.model.takes_box:
        yield _heading(f"Cases of {split}")
        yield page.paragraph(
            f"Left out: {run.model_name} looks at a lesion's box beside the image, and only "
            "networks that see the image alone can be explained."
        )
        return
    if dataset.vocabulary.names != run.vocabulary.names:
        raise InputError(f"{dataset.path} has other labels than {folder}: it was changed since")
    source = dataset.source(split)
    evaluator = Evaluator(
        source, run.predict, batch_size=sharding.round_up_to_devices(run.batch_size)
    )
    scores = evaluator.scores(run.variables)
    right = np.where(scores.labels > 0, scores.scores, 1 - scores.scores)
    loss = -np.log(np.clip(right, 1e-7, 1)) * scores.label_mask
    loss = loss.sum(axis=1) / np.maximum(scores.label_mask.sum(axis=1), 1)
    order = np.argsort(loss, kind="stable")
    has_label = (scores.labels * scores.label_mask).any(axis=1)
    best = [k for k in order if has_label[k]][:count]
    worst = [k for k in order[::-1] if k not in best][:count]
    for title, chosen in (("Best cases", best), ("Worst cases", worst)):
        if not chosen:
            continue
        ids = [source[int(k)].id for k in chosen]
        # Other weights, data or cases are another folder: what a folder holds stays true.
        about = transfer.digest(**run.variables), dataset.fingerprint, ids, steps
        done = out / f"{title.split()[0].lower()}-{split}-{selection.digest(about)}"
        options = SelectionOptions(split=split, ids=ids, data=dataset.path)
        attribute.attribute(folder, done, options, PathOptions(steps=steps))
        yield _heading(f"{title} of {split}")
        yield page.SLIDER if title.startswith("Best") or not best else ""
        paths = {
            results.load_metadata(path)["id"]: path for path in sorted(done.glob("cases/*.npz"))
        }
        display = files.read_json(done / "settings.json")["display"]
        yield from attribute.cards([paths[name] for name in ids], display)


def _sheet(dataset):
    path = dataset.path / "contact_sheet.png"
    if path.is_file():
        with Image.open(path) as picture:
            uri = overlay.to_uri(np.asarray(picture.convert("RGB")))
        yield _heading("What the network is shown")
        yield f'<img class="chart" src="{uri}" alt="contact sheet of the data">\n'
