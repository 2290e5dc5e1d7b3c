"""HTML pages that work offline and on a phone: pictures, styles and script are in the file itself.

The HTML is in `templates/`; all inserted values are escaped unless they are `Markup`, which only
`render` returns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from maknet_jax import console

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("maknet_jax.figures"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals["notice"] = console.NOTICE


def render(template: str, **values: object) -> Markup:
    """Renders `templates/TEMPLATE.html.j2`; a missing value is an error.

    Args:
      template: the name without `.html.j2`.
      **values: plain text, numbers, lists and dicts, or `Markup` of another template.
    """
    return Markup(_templates.get_template(f"{template}.html.j2").render(values))


def document(title: str, lead: Markup, cards: Iterable[Markup]) -> str:
    """A whole page: the title, the text above the cards, and the cards."""
    return render("document", title=title, lead=lead, cards=cards)


def attribution_lead(
    summary: Mapping[str, Any],
    shown: int,
    slices: int,
    warnings: Sequence[str] = (),
    *,
    truth_known: bool = True,
) -> Markup:
    """The text and tables above the cards of `maknet attribute`.

    Args:
      summary: its `summary.json`.
      shown: number of slices on the page.
      slices: number of slices; several images can show lesions of one slice.
      warnings: what is doubtful about the network or the images.
      truth_known: any label of any image is annotated; otherwise the key explains no marks.
    """
    areas = summary.get("faithfulness", {})
    share = min(summary["complete"].values())
    numbers: list[tuple[object, str]] = [(slices, "slice" if slices == 1 else "slices")]
    numbers += [(f"{100 * share:.1f} %", "of maps sum to the change of the output within 1 %")]
    for name, each in areas.items():
        deleted, random = (each[area][0] for area in ("deletion", "random deletion"))
        text = f"{name}: deletion, lower is better; random pixels: {random:.2f}"
        numbers.append((f"{deleted:.2f}", text))
    return render(
        "attribution_lead",
        summary=summary,
        shown=shown,
        slices=slices,
        warnings=warnings,
        truth_known=truth_known,
        numbers=numbers,
        intervals=console.describe_groups(summary["groups"]),
        area_header=["network", *next(iter(areas.values()), ())],
        area_rows=[
            [name, *(console.format_interval(values, 2) for values in each.values())]
            for name, each in areas.items()
        ],
        difference_rows=[
            [name, console.format_interval(values, 2)]
            for name, values in summary.get("differences", {}).items()
        ],
    )


def attribution_card(
    title: str,
    ct: str,
    models: Sequence[Mapping[str, Any]],
    *,
    facts: Sequence[str] = (),
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    aspect: float = 1.0,
    right: bool = False,
    scale: tuple[float, str] | None = None,
) -> Markup:
    """One image, and for each network a map and its labels (figure 3).

    The map is that of the first network's most confident label.

    Args:
      title: the image's id.
      ct: the CT slice as a data URI.
      models: dicts of name, labels (label, outcome, reason, confidence, threshold, map, flagged),
        missed ([label, confidence, threshold]) and uris, one per map. The outcome is
        "true_positive", "false_positive", "true_negative", "false_negative" or "unknown". A label
        can have an effect: what its map explains, in words.
      facts: phrases below the title: split, slice, window, resolution.
      notes: lines below the CT.
      warnings: what is doubtful about the image.
      aspect: width / height of the CT; the maps are stretched to it.
      right: mark the left edge as the patient's right.
      scale: (the value of full colour, its unit), of all maps.
    """
    mapped = [
        {entry["label"]: entry for entry in model["labels"] if entry["map"] is not None}
        for model in models
    ]
    first = max(mapped[0], key=lambda name: mapped[0][name]["confidence"], default="")
    shown = [entries.get(first, {"label": "", "map": 0}) for entries in mapped]
    return render(
        "attribution_card",
        title=title,
        ct=ct,
        alt=f"CT slice {title}",
        models=[dict(model) | {"shown": one} for model, one in zip(models, shown, strict=True)],
        facts=facts,
        notes=notes,
        warnings=warnings,
        aspect=aspect,
        right=right,
        scale=scale,
    )


def perturbation_lead(
    summary: Mapping[str, Any],
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    shown: int,
    warnings: Sequence[str] = (),
    *,
    truth_known: bool = True,
) -> Markup:
    """The text and the table above the cards of `maknet perturb`.

    Args:
      summary: its `summary.json`; images, top, labels and results are used.
      header: of the table of results.
      rows: of the table of results.
      shown: number of images on the page.
      warnings: what is doubtful about the network or the images.
      truth_known: any label of any image is annotated; otherwise the key explains no marks.
    """
    results = summary["results"]
    first = [row for row in results if row["model"] == results[0]["model"]]
    return render(
        "perturbation_lead",
        summary=summary,
        header=header,
        rows=rows,
        shown=shown,
        warnings=warnings,
        truth_known=truth_known,
        numbers=[
            (
                f"{-row['fall'][0]:+.2f}".replace("-", "\N{MINUS SIGN}"),
                f"{row['strategy']}: change of the confidence in the top {summary['top']} of "
                f"{summary['labels']} labels",
            )
            for row in first
        ],
        intervals=console.describe_groups(*(row["groups"] for row in results)),
    )


def perturbation_card(
    title: str,
    models: Sequence[Mapping[str, Any]],
    *,
    facts: Sequence[str] = (),
    warnings: Sequence[str] = (),
    aspect: float = 1.0,
    right: bool = False,
) -> Markup:
    """For each network a row of an image's perturbed forms with their labels (figure 4).

    Args:
      title: the image's id.
      models: dicts of name and columns, each a dict of title, uri and labels (label, outcome,
        reason, confidence, threshold, state). The state is "gone" for a label that dropped out of
        the original's top labels, "new" for one that entered them, "" otherwise.
      facts: phrases below the title: split, slice, window, resolution.
      warnings: what is doubtful about the image.
      aspect: width / height of the pictures.
      right: mark the left edge as the patient's right.
    """
    return render(
        "perturbation_card",
        title=title,
        models=models,
        facts=facts,
        warnings=warnings,
        aspect=aspect,
        right=right,
    )
