"""The page of a prepared data set: counts, spacings, labels and sample images, without names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from maknet_jax.figures import contact_sheet, page, picture
from maknet_jax.figures.contact_sheet import Example

_MOST_BARS = 12
_STEPS = (1, 2, 2.5, 5)  # times a power of ten: the widths of bins


def render(
    title: str,
    info: Mapping[str, Any],
    examples: Sequence[Example],
    names: Sequence[str],
    paper: tuple[Sequence[str], Sequence[Sequence[object]]] | None = None,
) -> Markup:
    """The page as HTML.

    Args:
      title: the title.
      info: the content of `dataset.json`, with `volumes`, `rejected` and `missing` of
        `data.overview`.
      examples: the sample images.
      names: the K label names.
      paper: (header, rows) of a table of counts beside the paper's.
    """
    splits = info["splits"]
    volumes: Mapping[str, Mapping[str, int]] = info["volumes"]
    counted: Mapping[str, int] = next(iter(volumes.values()), {})
    about = info["about"]
    headline = [
        (sum(split["count"] for split in splits.values()), "images"),
        (len(names), "labels"),
        (sum(counted.values()), _unit(info["kind"])),
        (sum(info["rejected"].values()), "inputs rejected"),
    ]
    return page.render(
        "dataset",
        title=title,
        kind=info["kind"],
        size=info["size"],
        origin=[about[name] for name in ("source", "citation", "licence") if about.get(name)],
        numbers=[(f"{number:,}", text) for number, text in headline if number],
        splits=[(name, f"{split['count']:,}") for name, split in splits.items()],
        paper=paper,
        histograms=[(name, _bars(values)) for name, values in volumes.items()],
        unit=_unit(info["kind"]),
        rejected=_bars(info["rejected"], ordered=False),
        missing=_bars(info["missing"], ordered=False),
        counters=[(name, f"{count:,}") for name, count in info["counters"].items() if count],
        label_header=["label", *(name for name, split in splits.items() if split["count"])],
        labels=_label_rows(splits, names),
        samples=contact_sheet.make_tiles(examples, names),
        window=picture.describe_window(picture.SOFT_TISSUE),
        versions=", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    )


def _unit(kind: str) -> str:
    return "slices read" if kind in ("deeplesion", "lesions") else "volumes"


def _label_rows(
    splits: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """(label, a cell per split that has images), the most frequent label first.

    A cell is a dict of text, the images with the label, `unknown`, those in which it is unknown,
    and `share`, the percentage of the known images that have the label.
    """
    rows = []
    for column, name in enumerate(names):
        cells = []
        for split in splits.values():
            if not split["count"]:
                continue
            present, known = split["label_counts"][column], split["known_counts"][column]
            unknown = split["count"] - known
            cells.append(
                {
                    "text": f"{present:,}",
                    "unknown": f"{unknown:,}" if unknown else "",
                    "share": 100 * present / known if known else 0.0,
                }
            )
        total = sum(split["label_counts"][column] for split in splits.values())
        rows.append((total, name, cells))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [(name, cells) for _, name, cells in rows]


def _bars(counts: Mapping[str, int], *, ordered: bool = True) -> list[tuple[str, str, float]]:
    """(value, count, percentage of the largest count) of the bars of a histogram.

    Args:
      counts: value -> count.
      ordered: the values are numbers or "unknown"; many different ones are binned. Otherwise
        they are text, in the order of the bars.
    """
    if ordered and len(counts) > _MOST_BARS:
        counts = _binned(counts)
    largest = max(counts.values(), default=1)
    return [(value, f"{count:,}", 100 * count / largest) for value, count in counts.items()]


def _binned(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in bins of equal and round width."""
    numbers = {float(text): count for text, count in counts.items() if text != "unknown"}
    low, high = min(numbers), max(numbers)
    exact = (high - low) / _MOST_BARS
    power = 10 ** math.floor(math.log10(exact))
    width = next(step * power for step in (*_STEPS, 10) if step * power >= exact)
    whole = all(number.is_integer() for number in numbers)
    width = max(1, math.ceil(width)) if whole else width
    first = math.floor(low / width)
    bins: dict[str, int] = {}
    for index in range(first, math.floor(high / width) + 1):
        start, end = index * width, (index + 1) * width
        label = f"{start:g} to {end - 1:g}" if whole else f"{start:g} to {end:g}"
        bins[label] = sum(n for number, n in numbers.items() if math.floor(number / width) == index)
    if "unknown" in counts:
        bins["unknown"] = counts["unknown"]
    return bins
