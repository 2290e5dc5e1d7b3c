"""`maknet select idc`: CT series of the Imaging Data Commons to download (paper, section 3)."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from maknet_jax import console, files
from maknet_jax.data import idc, idc_selection
from maknet_jax.data.idc import Series
from maknet_jax.data.idc_selection import Filters
from maknet_jax.errors import InputError, OutputExists

PAPER = {"series": 6568, "patients": 3653, "slices": 1_500_000}
MANIFEST = "manifest.s5cmd"
SERIES_COLUMNS = (
    "collection",
    "patient",
    "study",
    "series",
    "modality",
    "body_part",
    "description",
    "slices",
    "megabytes",
    "licence",
    "doi",
    "url",
    "segments",
)
CITATION_COLUMNS = (
    "doi",
    "collection",
    "analysis",
    "licence",
    "series",
    "patients",
    "instances",
    "gigabytes",
)
_FILES = (MANIFEST, "series.csv", "citations.csv", "summary.json")
_FILTERS = Filters()


def select_idc(
    out: str | os.PathLike[str] | None = None,
    *,
    filters: Filters = _FILTERS,
    analysis: str | None = None,
    index: str | os.PathLike[str] | None = None,
    seg_index: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Selects CT series of the Imaging Data Commons from its index, which needs no network.

    With `analysis` only CT series with a segmentation of that analysis result are selected, and the
    segmentations with them. Pairs are inferred from the study and the series number in the
    description of the segmentation, or where it has none, from studies with a single CT series of
    enough slices; `maknet prepare segmentations` confirms them by the references in the files.

    Args:
      out: the folder to write: a manifest for `idc download`, a table of the series, a table of
        licences and DOIs to cite, and the summary. None writes nothing.
      filters: which series to select.
      analysis: an analysis result, such as totalsegmentator_ct_segmentations.
      index: a parquet file of IDC's index; None takes the one of the package `idc-index-data`.
      seg_index: IDC's parquet file of that name, which states the series of each segmentation.
      overwrite: replace an existing selection at `out`.

    Returns:
      The summary: counts of what was selected and left out, and the paper's counts.

    Raises:
      InputError: the index is missing or invalid, a filter matches nothing, nothing is selected, or
        `out` is in use.
    """
    if seg_index is not None and analysis is None:
        raise InputError(
            f"--seg-index {seg_index} needs --with: it states the pairs of an analysis"
        )
    path, version = idc.find_index(index)
    references = None if seg_index is None else idc.read_references(seg_index)
    selection = idc_selection.select(
        idc.read_index(path, analysis),
        filters,
        paired=analysis is not None,
        references=references,
        nonhuman=idc.read_nonhuman(path),
    )
    if not selection.ct:
        most = max(selection.left_out, key=selection.left_out.__getitem__, default="an empty index")
        raise InputError(f"no CT series of {version} is selected: most are left out for {most!r}")
    segmentations = [row for rows in selection.segmentations.values() for row in rows]
    selected = [*selection.ct, *segmentations]
    summary = {
        "index": version,
        "filters": dataclasses.asdict(filters),
        "analysis": analysis,
        "selected": _counts(selection.ct),
        "segmentations": _counts(segmentations) if analysis else None,
        "gigabytes": _gigabytes(selected),
        "paper": PAPER,
        "left_out": selection.left_out,
        "segmentations_left_out": selection.segmentations_left_out,
        "licences": dict(collections.Counter(row.licence for row in selected).most_common()),
        "out": None if out is None else str(out),
    }
    if out is not None:

        def replace(folder: pathlib.Path) -> bool:
            mine = not files.has_foreign_files(folder, *_FILES)
            if mine and not overwrite:
                raise OutputExists(folder)
            return mine

        with files.write_folder(out, replace=replace) as folder:
            _write(folder, selected, selection.segmentations, summary)
    return summary


def _counts(series: Iterable[Series]) -> dict[str, Any]:
    rows = list(series)
    return {
        "series": len(rows),
        "patients": len({(row.collection, row.patient) for row in rows}),
        "slices": sum(row.slices for row in rows),
        "collections": len({row.collection for row in rows}),
        "gigabytes": _gigabytes(rows),
    }


def _gigabytes(series: Iterable[Series]) -> float:
    return round(sum(row.megabytes for row in series) / 1000, 3)


def _write(
    folder: pathlib.Path,
    selected: list[Series],
    segmentations: dict[str, list[Series]],
    summary: dict[str, Any],
) -> None:
    segments = {row.uid: ct for ct, rows in segmentations.items() for row in rows}
    with files.write_whole(folder / MANIFEST) as file:
        file.write(
            f"# {len(selected)} series of {summary['index']}, selected by maknet select idc\n"
        )
        file.writelines(f"cp {row.url} .\n" for row in selected)
    console.write_table(
        folder / "series.csv",
        SERIES_COLUMNS,
        (
            (
                row.collection,
                row.patient,
                row.study,
                row.uid,
                row.modality,
                row.body_part,
                row.description,
                row.slices,
                row.megabytes,
                row.licence,
                row.doi,
                row.url,
                segments.get(row.uid, ""),
            )
            for row in selected
        ),
    )
    console.write_table(folder / "citations.csv", CITATION_COLUMNS, _citations(selected))
    files.write_json(folder / "summary.json", summary)


def _citations(selected: Iterable[Series]) -> Iterator[tuple[object, ...]]:
    """Yields a row of `CITATION_COLUMNS` per DOI, collection and licence."""
    groups: dict[tuple[str, str, str, str], list[Series]] = {}
    for row in selected:
        key = row.doi, row.collection, row.analysis, row.licence
        groups.setdefault(key, []).append(row)
    for key, rows in sorted(groups.items()):
        counts = _counts(rows)
        yield (*key, *(counts[name] for name in ("series", "patients", "slices", "gigabytes")))


def describe(summary: dict[str, Any]) -> str:
    """Formats the summary: the selection beside the paper's, and what was left out."""
    rows = [[name, f"{summary['selected'][name]:,}", f"{PAPER[name]:,}"] for name in PAPER]
    lines = [console.format_table([summary["index"], "selected", "paper"], rows), ""]
    if summary["segmentations"]:
        lines.append(f"{summary['segmentations']['series']:,} segmentations of these CT series")
    licences = ", ".join(f"{name} ({count:,})" for name, count in summary["licences"].items())
    lines += [f"{summary['gigabytes']:,.1f} GB to download; licences: {licences}", ""]
    left_out = [[reason, f"{count:,}"] for reason, count in summary["left_out"].items()]
    left_out += [
        [f"segmentation: {reason}", f"{count:,}"]
        for reason, count in summary["segmentations_left_out"].items()
    ]
    lines.append(console.format_table(["left out", "series"], left_out))
    if summary["out"] is not None:
        out = pathlib.Path(summary["out"])
        kind = "segmentations" if summary["analysis"] else "dicom"
        lines += [
            "",
            f"cite what {out / 'citations.csv'} lists, then:",
            f"  idc download {out / MANIFEST} --download-dir idc",
            f"  maknet prepare {kind} idc --out shards/idc",
        ]
    return "\n".join(lines)
