"""The tables that `maknet predict` writes and prints."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax import console
from maknet_jax.evaluation import body_parts
from maknet_jax.evaluation.domain import SMALLEST_WINDOW
from maknet_jax.evaluation.series import FLAGS, SeriesResult

SLICE_COLUMNS = (
    "series",
    "slice",
    "z_mm",
    "label",
    "confidence",
    "threshold",
    "flags",
    "file",
    "sop_instance_uid",
    "position_mm",
    "distance",
    "distance_threshold",
)
_NUMBERS = ("distance", "distance_threshold", "order", "order_threshold")  # of a series
SERIES_COLUMNS = (
    "series",
    "label",
    "first_slice",
    "last_slice",
    "first_mm",
    "last_mm",
    "slices",
    "mean_confidence",
    "body_part_examined",
    "laterality",
    "sct_code",
    "sct_meaning",
    "flags",
    *_NUMBERS,
)
AUDIT_COLUMNS = (
    "series",
    "file",
    "tag",
    "body_part_examined",
    "sct_code",
    "audit",
    "flags",
    *_NUMBERS,
)
MOST_SERIES, MOST_LABELS = 20, 8  # printed; the tables hold all

Row = Mapping[str, Any]


def write_rows(path: pathlib.Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Writes the columns of rows as a CSV; lists are joined by |, and None is an empty cell."""

    def cell(value: Any) -> Any:
        return "|".join(value) if isinstance(value, list) else value

    console.write_table(path, columns, ([cell(row[name]) for name in columns] for row in rows))


def wide(results: Sequence[SeriesResult]) -> tuple[list[str], Iterator[list[Any]]]:
    """(header, rows) of the wide table: one row per slice, one column per label."""
    places = ("series", "slice", "z_mm", "labels", "flags", "file", "sop_instance_uid")
    header = [*places, *results[0].names]
    rows = (
        [
            *(result.id, number, "" if np.isnan(z_mm) else round(float(z_mm), 3)),
            *("|".join(result.labels[number]), "|".join(result.flags_of(number))),
            *(result.file_of(number), result.uid_of(number)),
            *np.round(result.confidences[number].astype(float), 4).tolist(),
        ]
        for result in results
        for number, z_mm in enumerate(result.z_mm)
    )
    return header, rows


def document(
    results: Sequence[SeriesResult], names: Sequence[str], thresholds: np.ndarray
) -> dict[str, Any]:
    """The content of all tables as one JSON object, with all confidences."""
    terms = [body_parts.of_label(name) for name in names]
    return {
        "labels": list(names),
        "thresholds": thresholds.tolist(),
        "body_part_examined": [part.term for part in terms],
        "laterality": [part.laterality for part in terms],
        "sct_codes": [part.code for part in terms],
        "flags": FLAGS,
        "series": [result.to_json() for result in results],
    }


def describe(overview: Row, covers: Sequence[Row], most: int | None = None) -> str:
    """What a series shows and covers, as text.

    Args:
      overview: see `SeriesResult.overview`.
      covers: the rows of its predicted labels, see `SeriesResult.cover_rows`.
      most: maximum number of labels, those in the most slices; None shows all.
    """
    span = "" if overview["mm"] is None else f", {overview['mm']:.0f} mm"
    outside = "outside" in overview["flags"]
    shown = f"shows {overview['body_part_examined'].replace('|', ' and ') or 'no region'}"
    shown = _unjudged(overview) if outside else shown
    tag = f" (tag {overview['tag']})" if overview["tag"] else ""
    name = overview["series"]
    if name.startswith("sha256:"):  # no SeriesInstanceUID: the file says more than a digest
        name += f" ({overview['file']})"
    lines = [f"{name}: {console.plural(overview['slices'], 'slice')}{span}; {shown}{tag}"]
    lines += [f"  {flag}: {FLAGS[flag]}" for flag in overview["flags"]]
    if overview["slices"] < SMALLEST_WINDOW and overview["distance"] is not None and not outside:
        lines.append(
            f"  fewer than {SMALLEST_WINDOW} slices: CT unlike the training data may not be noticed"
        )
    if overview["flagged_slices"]:
        lines.append(f"  slices with flags: {overview['flagged_slices']}")
    if not covers:
        return "\n".join([*lines, "  no label reaches its threshold"])
    lines += ["  unreliable labels, which reach their thresholds all the same:"] if outside else []
    largest = sorted(range(len(covers)), key=lambda k: -covers[k]["slices"])[:most]
    rows = [
        (
            row["label"],
            row["first_slice"],
            row["last_slice"],
            *("?" if mm is None else f"{mm:.0f}" for mm in (row["first_mm"], row["last_mm"])),
            row["slices"],
            f"{row['mean_confidence']:.2f}",
        )
        for row in (covers[k] for k in sorted(largest))
    ]
    header = ("label", "from slice", "to", "from mm", "to mm", "in slices", "confidence")
    lines += [f"  {line}" for line in console.format_table(header, rows).splitlines()]
    if len(rows) < len(covers):
        lines.append(f"  ... and {len(covers) - len(rows)} more labels")
    return "\n".join(lines)


def _unjudged(overview: Row) -> str:
    """Why a series is outside the domain, and what is not judged because of it."""
    distance, threshold = overview.get("distance"), overview.get("distance_threshold")
    why = "all of its slices are" if overview["slices"] > 1 else "its slice is"
    if distance is not None and threshold is not None and distance > threshold:
        why = f"distance {distance:.2f}, threshold {threshold:.2f}"
    order = " and the order of its slices are" if overview["slices"] > 1 else " is"
    return f"outside the domain of the network ({why}): its region of the body{order} not judged"


def describe_all(overviews: Sequence[Row], covers: Iterable[Row]) -> str:
    """What several series show and cover: at most `MOST_SERIES`, and `MOST_LABELS` of each."""
    by_series: dict[str, list[Row]] = {}
    for row in covers:
        by_series.setdefault(row["series"], []).append(row)
    lines = [
        describe(overview, by_series.get(overview["series"], []), MOST_LABELS)
        for overview in overviews[:MOST_SERIES]
    ]
    if len(overviews) > MOST_SERIES:
        lines.append(f"... and {len(overviews) - MOST_SERIES} more series")
    return "\n".join(lines)
