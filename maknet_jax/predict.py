"""`maknet predict`: any folder of CT -> body parts per slice and per series."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from maknet_jax import console, files, scoring
from maknet_jax.ct import pseudonym, reading, search, volumes
from maknet_jax.data import cluster
from maknet_jax.errors import InputError, NothingUsable
from maknet_jax.evaluation import series_tables, structured_reports
from maknet_jax.evaluation.series import FLAGS, SeriesResult, count_flags, describe_flags
from maknet_jax.evaluation.series_files import SeriesFiles
from maknet_jax.evaluation.series_tables import MOST_SERIES
from maknet_jax.figures import picture
from maknet_jax.runs import domain_file, ownership, workdir
from maknet_jax.scoring import predict_volume as predict_volume
from maknet_jax.scoring import score_volume as score_volume

MIN_CHART_SLICES = 3  # a chart of a shorter series shows nothing


def predict(
    folder: str | pathlib.Path,
    path: search.Paths,
    out: str | pathlib.Path,
    *,
    png_window: tuple[float, float] | None = None,
    checkpoint: str = "best",
    batch_size: int = 16,
    as_json: bool = False,
    wide: bool = False,
    audit: bool = False,
    charts: bool = False,
    sr: bool = False,
    features: str | pathlib.Path | None = None,
    overwrite: bool = False,
    pseudonyms: bool = False,
    salt_file: str | pathlib.Path | None = None,
    scheduler: str | None = None,
    **overrides: bool,
) -> dict[str, Any]:
    """Predicts the labels of every slice of every CT series under `path`.

    Each slice is the middle of a triplet with its neighbours; at the ends the edge slice is
    repeated. A label is predicted if its confidence reaches its threshold (chosen in training) or
    if it is a parent of a predicted label. Labels are listed by decreasing confidence. Slices and
    series that differ from the training data have the flag `outside` or `order`, see
    `evaluation.domain`.

    Args:
      folder: the workdir of `maknet train`, a bundle or a released name.
      path: a file or a folder of DICOM, NIfTI or PNG, an archive, or a DICOMDIR; or several.
      out: the CSV of slices, with one row per slice and predicted label. `STEM.series.csv`,
        `STEM.summary.json` and `STEM.log.jsonl` are written beside it, and `STEM.failures.csv` if
        inputs were rejected. One unreadable slice rejects its whole series. None of these files is
        an input, even if it lies under `path`.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
      checkpoint: "best" or "last".
      batch_size: slices per step.
      as_json: also write `STEM.json`: the content of the tables, and all confidences.
      wide: also write `STEM.wide.csv`: one row per slice, the confidence of each label in a column.
      audit: also write `STEM.audit.csv`: whether BodyPartExamined agrees with what is seen.
      charts: draw `STEM.NNN.png` for each series: its labels from head to feet.
      sr: write `STEM.NNN.sr.dcm` for each DICOM series: its coded labels as a DICOM structured
        report, see `evaluation.structured_reports`. It names the patient.
      features: an .npz file for the pooled features of all slices: `features` float32 `[N, F]` and
        `ids`, SERIES:SLICE each.
      overwrite: replace existing outputs.
      pseudonyms: write pseudonyms instead of the names of series and files, which identify
        patients; see `ct.pseudonym`.
      salt_file: the secret key of the pseudonyms, created if absent; None means
        `~/.config/maknet/salt`.
      scheduler: the address of a Dask scheduler, whose workers read and score the series. All must
        see the files and the network under the same paths.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary: counts, files, what each series shows (`overview`), and the range of slices of
      each label (`covers`).

    Raises:
      InputError: `out` is not a CSV file, an output exists, or no series could be read.
    """
    out = pathlib.Path(out)
    extras: dict[str, Any] = {"as_json": as_json, "wide": wide, "audit": audit}
    outputs = SeriesFiles(
        out, **extras, features=None if features is None else pathlib.Path(features)
    )
    outputs.check(overwrite=overwrite)
    if sr:
        structured_reports.require_highdicom()
    if sr and pseudonyms:
        raise InputError("--sr writes reports that name the patient: omit it or --pseudonyms")
    read_as = reading.Overrides(**overrides)
    hidden = pseudonym.read_pseudonyms(pseudonyms, salt_file)
    results, views = [], []
    cluster.check(scheduler)
    with (
        contextlib.ExitStack() as owning,
        console.list_failures(outputs.beside("failures.csv"), hidden),
    ):
        series, failures = find_inputs(path, read_as)
        run = workdir.open_run(folder, checkpoint_name=checkpoint)
        owning.enter_context(ownership.owned(out.parent, "maknet predict", "--out", file=out.name))
        options: dict[str, Any] = {"batch_size": batch_size, "png_window": png_window}
        options |= {"features": features is not None, "hidden": hidden, "overrides": read_as}
        if scheduler is None:
            each = _with_views(predict_series(run, series, failures, **options), charts)
        else:
            model = scoring.Model.of_run(run, folder)
            each = scoring.on_cluster(scheduler, model, series, failures, views=charts, **options)
        for result, view in each:
            results.append(result)
            if view is not None:
                views.append(view)
        stale = outputs.written_before()
        written = outputs.write(results, read_as)
        if charts:
            written += _write_charts(out, run, results, views)
        no_report = None
        if sr:
            reports, no_report = structured_reports.write_reports(
                out, results, series, f"{run.source.resolve().name}, step {run.step}"
            )
            written += reports
        failures = hidden.failures(failures) if hidden else failures
        console.write_failures(outputs.beside("failures.csv"), failures)
        summary = {
            "workdir": str(folder),
            **_counts(run, results),
            **dataclasses.asdict(read_as),
            "copies": sum(ref.copies for ref in series),
            "failures": len(failures),
            "failures_file": str(outputs.beside("failures.csv")) if failures else None,
            "without_chart": sum(len(r) < MIN_CHART_SLICES for r in results) if charts else None,
            "without_report": None if no_report is None else len(no_report),
            "no_report": no_report,
            "files": [str(file) for file in written],
        }
        tables = {
            "overview": [result.overview() for result in results],
            "covers": [row for result in results for row in result.cover_rows() if row["label"]],
        }
        files.write_json(outputs.beside("summary.json"), summary | tables)
        for file in stale - {file.absolute() for file in written}:
            file.unlink(missing_ok=True)
        with console.Log(outputs.beside("log.jsonl")) as log:
            log.event(event="predicted", **summary)
    return summary | tables


def _counts(run: workdir.Run, results: Sequence[SeriesResult]) -> dict[str, Any]:
    """What the network is, and how many series and slices it labelled and flagged."""
    return {
        "checkpoint": run.name,
        "step": run.step,
        "trained_on": run.trained_on,
        "series": len(results),
        "slices": sum(map(len, results)),
        "flags": count_flags(result.flags for result in results),
        "domain": run.domain.about if run.domain else None,
    }


def text(summary: dict[str, Any]) -> str:
    """The result of `predict` as text for standard output: what each series covers."""
    lines = [series_tables.describe_all(summary["overview"], summary["covers"])]
    lines.append(
        f"\n{console.plural(summary['slices'], 'slice')} of {summary['series']} series "
        f"labelled by the {summary['checkpoint']} checkpoint (step {summary['step']}):"
    )
    lines += [f"  {file}" for file in summary["files"]]
    if summary["trained_on"]:
        lines.append(f"trained on {summary['trained_on']}")
    lines += describe_flags(summary["flags"], f"{summary['series']} series")
    if summary["copies"]:
        lines.append(f"copies of slices, taken once: {summary['copies']}")
    if summary["domain"] is None:
        lines.append(
            "the network has no out-of-domain statistics: nothing marks CT unlike its training data"
        )
    elif unjudged := domain_file.not_judged(summary["domain"]):
        lines.append(f"not judged: {unjudged}")
    if summary["without_chart"]:
        why = f"fewer than {MIN_CHART_SLICES} slices"
        lines.append(f"series without a chart: {summary['without_chart']} ({why})")
    if summary["without_report"]:
        lines.append(f"series without a structured report: {summary['without_report']}")
        lines += [f"  {name}: {why}" for name, why in summary["no_report"][:MOST_SERIES]]
        if summary["without_report"] > MOST_SERIES:
            lines.append(f"  ... and {summary['without_report'] - MOST_SERIES} more (no_report)")
    if summary["failures"]:
        lines.append(f"rejected: {summary['failures']}, see {summary['failures_file']}")
    lines.append(console.NOTICE)
    return "\n".join(lines)


def find_inputs(
    path: search.Paths, overrides: reading.Overrides = reading.STRICT
) -> tuple[list[search.SeriesRef], list[tuple[str, str]]]:
    """The CT series under one or several paths, and (input, reason) of what cannot be used.

    Raises:
      NothingUsable: there is no series.
    """
    series, failures = search.find_series(path, overrides=overrides)
    if not series:
        first, *others = search.as_list(path)
        named = f"{first} and {len(others)} other paths hold" if others else f"{first} holds"
        problem = f"{named} no readable series of DICOM, NIfTI or PNG"
        problem += "" if failures else f": it holds {search.contents(path)}"
        raise NothingUsable(problem, failures)
    return series, failures


def predict_series(
    run: workdir.Run,
    series: Sequence[search.SeriesRef],
    failures: list[tuple[str, str]],
    *,
    batch_size: int = 16,
    png_window: tuple[float, float] | None = None,
    features: bool = False,
    hidden: pseudonym.Pseudonyms | None = None,
    overrides: reading.Overrides = reading.STRICT,
) -> Iterator[tuple[SeriesResult, volumes.Volume]]:
    """Yields the labels of each series and its volume, which is read again if they need it.

    Args:
      run: the trained network.
      series: see `find_inputs`.
      failures: rejected series are appended as (first file, reason).
      batch_size: slices per step.
      png_window: (low, high), the HU of pixel values 0 and 255 in 8-bit PNGs.
      features: also return the pooled features.
      hidden: replaces the names of series and slices; None keeps them.
      overrides: what is read although it would be rejected.

    Raises:
      NothingUsable: none could be read.
    """
    read_any = False
    with console.progress("predict", sum(ref.count for ref in series)) as advance:
        options: dict[str, Any] = {"png_window": png_window, "overrides": overrides}
        for ref, volume in volumes.load_all(series, failures, **options):
            read = functools.partial(volumes.load_series, ref, **options)
            volume = hidden.volume(volume) if hidden else volume
            result = predict_volume(
                run, volume, batch_size, png_window, advance, features=features, read=read
            )
            yield result, volume
            read_any = True
    if not read_any:
        raise NothingUsable(f"none of the {len(series)} series can be read", failures)


def _write_charts(
    out: pathlib.Path,
    run: workdir.Run,
    results: Sequence[SeriesResult],
    views: Sequence[tuple[np.ndarray, tuple[float, float]]],
) -> list[pathlib.Path]:
    """Draws the labels of each series that is long enough; returns the files."""
    from maknet_jax.figures.charts import write_label_chart  # Matplotlib takes long to import

    charts = []
    network = f"{run.source.resolve().name}, step {run.step}"
    network += f", trained on {run.trained_on}" if run.trained_on else ""
    for number, (result, (view, spacing)) in enumerate(zip(results, views, strict=True)):
        if len(result) >= MIN_CHART_SLICES:
            charts.append(out.with_suffix(f".{number:03d}.png"))
            mm = (len(result) - 1) * spacing[0]  # from the first slice to the last
            title = f"{console.plural(len(result), 'slice')} from head to feet"
            write_label_chart(
                charts[-1],
                result.confidences,
                result.predicted,
                result.names,
                title=title if np.isnan(mm) else f"{title}, {mm:.0f} mm",
                notes=[f"series {result.id}", network]
                + [f"{flag}: {FLAGS[flag]}" for flag in result.flags],
                coronal=view,
                outside=None if result.verdict is None else result.verdict.outside,
                spacing=spacing,
            )
    return charts


def _with_views(
    each: Iterable[tuple[SeriesResult, volumes.Volume]], wanted: bool
) -> Iterator[tuple[SeriesResult, scoring.View | None]]:
    for result, volume in each:
        yield result, picture.coronal(volume.hu, volume.spacing) if wanted else None
