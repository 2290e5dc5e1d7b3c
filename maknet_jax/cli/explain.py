"""`maknet attribute`, `maknet perturb` and `maknet report`."""

import argparse
import dataclasses
from typing import Any

from maknet_jax.cli import options
from maknet_jax.explain.options import (
    METHODS,
    OUTPUTS,
    SHARE,
    STRATEGIES,
    DisplayOptions,
    PathOptions,
    SelectionOptions,
)


def add_verbs(verbs: Any) -> None:
    """Adds `attribute`, `perturb` and `report`."""
    verb = options.verb(verbs, "attribute", _run_attribute)
    _shared_options(verb)
    verb.add_argument(
        "--output", choices=OUTPUTS, help="output to attribute (default: %(default)s)"
    )
    verb.add_argument(
        "--refine",
        type=int,
        help="double the steps of incomplete maps up to this many times (default: 4)",
    )
    verb.add_argument(
        "--faithfulness",
        action="store_true",
        help="measure deletion and insertion, compared with random pixels",
    )
    verb = options.verb(verbs, "perturb", _run_perturb)
    _shared_options(verb)
    verb.add_argument(
        "--strategy",
        type=_words,
        help="comma-separated, from neighbour, patch, attribution and random (default: all)",
    )
    verb.add_argument(
        "--masks", help="masks of the regions: NIfTI, PNG or a folder (default: DeepLesion's boxes)"
    )
    verb.add_argument("--organs", type=_words, help="names or values in the masks, comma-separated")
    verb.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="share of the pixels to delete (default: %(default)s)",
    )
    verb = options.verb(verbs, "report", _run_report)
    verb.add_argument("model", help="workdir of `maknet train`, or a bundle with --out and --data")
    verb.add_argument("--out", help="folder to write (default: WORKDIR/report)")
    verb.add_argument("--split", help="split of the cases (default: test, otherwise validation)")
    verb.add_argument("--data", help="prepared data set (default: the one trained on)")
    _ct(verb)
    verb.add_argument(
        "--cases",
        type=options.count,
        default=3,
        help="number of best and of worst cases (default: 3)",
    )


def _ct(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--ct",
        metavar="FOLDER",
        help="CT that --data was prepared from (DeepLesion's images, or NIfTI cases): pictures "
        "then have its resolution instead of the network's",
    )


def _shared_options(verb: argparse.ArgumentParser) -> None:
    """Adds the fields of the three dataclasses of options, with their defaults."""
    verb.add_argument(
        "path", nargs="?", help="CT files to explain instead of a split: DICOM, NIfTI or PNG"
    )
    options.model(verb)
    verb.add_argument("--out", required=True, help="folder to write")
    verb.add_argument("--split", help="split of --data")
    verb.add_argument("--data", help="prepared data set (default: the one trained on)")
    _ct(verb)
    verb.add_argument(
        "--ids", type=_words, help="only these images, comma-separated; SERIES:SLICE for CT files"
    )
    verb.add_argument(
        "--labels",
        type=_words,
        help="explain these labels, comma-separated; selects images that have any of them",
    )
    verb.add_argument("--limit", type=options.count, help="maximum number of images")
    verb.add_argument("--compare", metavar="MODEL", help="a second network, shown beside the first")
    verb.add_argument(
        "--top", type=options.count, help="number of labels per image (default: %(default)s)"
    )
    verb.add_argument(
        "--steps", type=options.count, help="steps of the path (default: %(default)s)"
    )
    verb.add_argument("--method", choices=METHODS, help="integration rule (default: %(default)s)")
    verb.add_argument(
        "--baseline", help="black (-1024 HU), blurred or a number in HU (default: %(default)s)"
    )
    verb.add_argument("--checkpoint", choices=("best", "last"), help="default: %(default)s")
    verb.add_argument(
        "--batch-size", type=options.count, help="images per step (default: one per device)"
    )
    verb.add_argument(
        "--display",
        dest="window",
        type=options.window,
        metavar="LOW,HIGH",
        help="window of the pictures in HU, as in --display=-160,240",
    )
    verb.add_argument(
        "--most-shown",
        type=options.count,
        help="maximum number of images on the HTML page (default: %(default)s)",
    )
    options.png_window(verb)
    options.pseudonyms(verb)
    options.distributed(verb)
    for kind in (SelectionOptions, PathOptions, DisplayOptions):
        verb.set_defaults(**{field.name: field.default for field in dataclasses.fields(kind)})


def _chosen(
    chosen: argparse.Namespace,
) -> tuple[SelectionOptions, PathOptions, DisplayOptions]:
    """The options of `attribute` and `perturb` from the command line; starts JAX."""
    options.start_jax(chosen.distributed)
    selection, path, display = (
        {field.name: getattr(chosen, field.name) for field in dataclasses.fields(kind)}
        for kind in (SelectionOptions, PathOptions, DisplayOptions)
    )
    return SelectionOptions(**selection), PathOptions(**path), DisplayOptions(**display)


def _words(text: str) -> list[str] | None:
    """The type of WORD,WORD..."""
    return [word.strip() for word in text.split(",")] if text else None


def _run_attribute(chosen: argparse.Namespace) -> int:
    """Map the pixels that support each label (Integrated Gradients); resumes if interrupted.

    maknet attribute --model runs/teacher --split test --labels liver,spleen --out maps
    """
    from maknet_jax import attribute, console

    summary = attribute.attribute(
        chosen.model, chosen.out, *_chosen(chosen), faithful=chosen.faithfulness
    )
    for name, share in summary.get("complete", {}).items():
        flagged = summary["flagged"][name]
        print(
            f"{name}: {summary['images']} images, {share:.1%} of maps complete to 1 %, {flagged} "
            "flagged"
        )
    areas = {
        f"{name}: {area}": values
        for name, each in summary.get("faithfulness", {}).items()
        for area, values in each.items()
    }
    for name, values in (areas | summary.get("differences", {})).items():
        print(name, console.format_interval(values))
    if areas:
        print(console.describe_groups(summary["groups"]))
    return _ended(summary)


def _run_perturb(chosen: argparse.Namespace) -> int:
    """Compare labels before and after parts of an image change; resumes if interrupted.

    maknet perturb --model runs/teacher --split test --strategy patch,attribution --out out
    """
    from maknet_jax import console, perturb

    summary = perturb.perturb(
        chosen.model,
        chosen.out,
        *_chosen(chosen),
        strategies=chosen.strategy or STRATEGIES,
        masks=chosen.masks,
        organs=chosen.organs,
        share=chosen.share,
    )
    if "results" in summary:
        print(console.format_table(*perturb.table(summary["results"])))
    return _ended(summary)


def _ended(summary: dict[str, Any]) -> int:
    for file in summary.get("files", ()):
        print(f"  {file}")
    if summary["failures"]:
        print(f"rejected: {summary['failures']}, see {summary.get('failures_file')}")
    return options.SOME_REJECTED if summary["failures"] else options.DONE


def _run_report(chosen: argparse.Namespace) -> None:
    """Write one offline page about a run: curves, tables, labels, best and worst cases.

    maknet report runs/teacher
    """
    from maknet_jax import report

    options.start_jax()
    page = report.report(
        chosen.model,
        chosen.out,
        split=chosen.split,
        data=chosen.data,
        count=chosen.cases,
        ct=chosen.ct,
    )
    print(page)
