"""What a prepared data set contains, in counts without names: spacings, slices, reasons.

Workers count the properties of a volume among the counters of a unit of work, which are summed over
the run and survive an interruption.
"""

import collections
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maknet_jax import console
from maknet_jax.ct.pseudonym import Redaction

LABEL_COLUMNS = ("label", "split", "records", "known", "present", "unknown")
_PREFIX = "volume: "
_NUMBER = re.compile(r"(--[\w-]+ \S+)|(?<![\w-])-?\d+(?:\.\d+)?")  # but not the value of an option
# Entries of `about` that count skipped inputs.
_COUNTED = (
    "series_too_small",
    "series_unreadable",
    "copies_of_slices",
    "images_missing",
    "cases_without_split",
    "cases_not_found",
    "series_without_segmentation",
)
PROPERTIES = ("slices", "mm between slices", "mm per pixel")


def of_volume(spacing: Sequence[float | None], slices: int | None = None) -> dict[str, int]:
    """Counters of one volume.

    Args:
      spacing: mm along (z, y, x); None or nan where unknown.
      slices: number of slices; None if the series was not read as a whole.
    """
    values = dict(zip(PROPERTIES[1:], map(_rounded, spacing[:2]), strict=True))
    if slices is not None:
        values["slices"] = str(slices)
    return {f"{_PREFIX}{name} {value}": 1 for name, value in values.items()}


def _rounded(mm: float | None) -> str:
    return "unknown" if mm is None or not math.isfinite(mm) else f"{mm:.3g}"


def separate(counters: Mapping[str, int]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """(the other counters, property -> value -> number of volumes) of the counters of a run."""
    others = {name: count for name, count in counters.items() if not name.startswith(_PREFIX)}
    volumes: dict[str, dict[str, int]] = {}
    for name in PROPERTIES:
        start = f"{_PREFIX}{name} "
        values = {
            key.removeprefix(start): n for key, n in counters.items() if key.startswith(start)
        }
        if values:
            volumes[name] = dict(sorted(values.items(), key=lambda item: _number(item[0])))
    return others, volumes


def _number(text: str) -> float:
    return math.inf if text == "unknown" else float(text)


def by_reason(failures: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Counts (input, reason) pairs by reason, the most frequent first.

    Names are removed from the reasons, and numbers become N, so that equal reasons agree.
    """
    counts = collections.Counter(
        _NUMBER.sub(lambda match: match[1] or "N", re.sub(r"^[…/\\ ]+: ", "", reason))
        for _, reason in Redaction().failures(failures)
    )
    return dict(counts.most_common())


def beside_the_paper(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
    """(header, rows) of the counts of DeepLesion beside the paper's; None for other data.

    Args:
      summary: that of `maknet prepare`.
    """
    about, rows = summary["about"], []
    if "numbering" not in about:
        return None
    for split, counts in about["label_counts"].items():
        written = summary["records"].get(split, 0)
        first = [counts[name] for name in ("labelled", "without_row", "noisy")]
        absent = counts["kept"] - written
        rows.append([split, *first, absent, written, about["paper_counts"][split]])
    return ["split", "labelled", "no row", "noisy", "no image", "records", "paper"], rows


def describe(summary: dict[str, Any]) -> str:
    """Formats the summary as a few lines of text, with the paper's counts if there are any."""
    lines = []
    about = summary["about"]
    if paper := beside_the_paper(summary):
        lines.append(f"lesions are {about['numbering']}")
        lines.append(console.format_table(*paper))
    else:
        lines += [
            f"{split}: {console.plural(count, 'record')}"
            for split, count in summary["records"].items()
        ]
    if "label_counts" in summary:
        lines.append(console.format_table(LABEL_COLUMNS, summary["label_counts"]))
    if absent := about.get("masks_without_case"):
        lines.append(f"masks of --labels that no case has: {console.shortened(absent)}")
    if summary["records"].get("train") and not summary["records"].get("val"):
        lines.append(
            "split val is empty, so that training cannot choose a checkpoint or thresholds: add "
            "cases, or change the splits"
        )
    for name in _COUNTED:
        if about.get(name):
            lines.append(f"{name.replace('_', ' ')}: {about[name]}")
    lines += [f"{name}: {count}" for name, count in summary["counters"].items()]
    if summary["failures"]:
        lines.append(f"rejected: {summary['failures']}, see {summary['out']}/failures.csv")
    lines.append(f"look at {summary['out']}/index.html and contact_sheet.png")
    return "\n".join(lines)
