"""`maknet attribute`, `maknet perturb` and `maknet report`."""

import argparse
import dataclasses
from typing import Any

from maknet_jax import console
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
    _shared_options(
        verb,
        labels="explain these labels, and only images of the split that have any of them",
        top="without --labels, explain the N most confident labels of each image",
    )
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
    verb.add_argument(
        "--no-nifti",
        dest="nifti",
        action="store_false",
        help="do not write the maps of CT files as NIfTI",
    )
    verb = options.verb(verbs, "perturb", _run_perturb)
    _shared_options(
        verb,
        labels="only images of the split that have any of these labels; see also --limit",
        top="compare the N most confident labels of each image",
        path_note="For --strategy attribution, which deletes the pixels that matter most. "
        "--baseline\nis also what attribution and random put in place of deleted pixels.",
    )
    verb.add_argument(
        "--strategy",
        type=options.words,
        help="comma-separated, from neighbour, patch, attribution and random (default: all)",
    )
    verb.add_argument(
        "--masks",
        help="masks of the regions: NIfTI, PNG, a folder of PNGs, or the cases of `maknet prepare "
        "segmentations` (default: DeepLesion's boxes)",
    )
    verb.add_argument(
        "--organs", type=options.words, help="names or values in the masks, comma-separated"
    )
    verb.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="share of the pixels to delete (default: %(default)s)",
    )
    verb = options.verb(verbs, "report", _run_report)
    verb.add_argument("model", help="workdir of `maknet train`, or a bundle with --out and --data")
    verb.add_argument(
        "--out", type=options.folder, help="folder to write (default: WORKDIR/report)"
    )
    verb.add_argument("--split", help="split of the cases (default: test, otherwise validation)")
    verb.add_argument("--data", help="prepared data set (default: the one trained on)")
    _ct(verb)
    verb.add_argument(
        "--cases",
        type=options.count,
        default=3,
        metavar="N",
        help="explain the N best and the N worst cases (default: 3)",
    )


def _ct(verb: argparse._ActionsContainer) -> None:
    verb.add_argument(
        "--ct",
        metavar="FOLDER",
        help="CT that --data was prepared from (DeepLesion's images, or NIfTI cases): pictures "
        "then have its resolution instead of the network's",
    )


def _shared_options(
    verb: argparse.ArgumentParser, *, labels: str, top: str, path_note: str | None = None
) -> None:
    """Adds the fields of the three dataclasses of options, with their defaults.

    Args:
      verb: the parser.
      labels: the help of --labels.
      top: the help of --top.
      path_note: when the options of Integrated Gradients matter.
    """
    verb.add_argument(
        "path",
        nargs="*",
        help="files and folders of CT to explain instead of a split: DICOM, NIfTI or PNG",
    )
    options.model(verb)
    verb.add_argument("--out", type=options.folder, required=True, help="folder to write")
    which = verb.add_argument_group(
        "which images and labels", "Give CT files, or --split of a prepared data set."
    )
    which.add_argument("--split", help="split of --data")
    which.add_argument("--data", help="prepared data set (default: the one trained on)")
    _ct(which)
    which.add_argument(
        "--ids",
        type=options.words,
        help="only these images, comma-separated; SERIES:SLICE for CT files",
    )
    which.add_argument(
        "--labels",
        type=options.words,
        help=f"{labels}, comma-separated; quote a label that contains a comma",
    )
    which.add_argument(
        "--limit",
        metavar="N",
        type=options.count,
        help="take at most N images: of CT files the slices with the highest confidences, of "
        "--labels or of any label (those that reach their threshold and different series first); "
        "of a split the first ones (default: all)",
    )
    which.add_argument(
        "--compare", metavar="MODEL", help="a second network, shown beside the first"
    )
    which.add_argument(
        "--top",
        metavar="N",
        type=options.count,
        help=f"{top} (default: %(default)s)",
    )
    which.add_argument("--checkpoint", choices=("best", "last"), help="default: %(default)s")
    path = verb.add_argument_group("path of Integrated Gradients", path_note)
    path.add_argument(
        "--steps", metavar="N", type=options.count, help="steps of the path (default: %(default)s)"
    )
    path.add_argument("--method", choices=METHODS, help="integration rule (default: %(default)s)")
    path.add_argument(
        "--baseline",
        help="start of the path: black (-1024 HU), blurred or a number in HU "
        "(default: %(default)s)",
    )
    path.add_argument(
        "--batch-size",
        metavar="N",
        type=options.count,
        help="images per step; changes speed and memory only (default: one per device)",
    )
    shown = verb.add_argument_group("pictures and page")
    shown.add_argument(
        "--display",
        dest="window",
        type=options.window,
        metavar="LOW,HIGH",
        help="window of the pictures in HU, as in --display=-160,240",
    )
    shown.add_argument(
        "--most-shown",
        metavar="N",
        type=options.count,
        help="show at most N images on the HTML page; the tables hold all (default: %(default)s)",
    )
    options.png_window(verb)
    options.pseudonyms(verb)
    options.override_options(verb)
    options.processes(verb)
    for kind in (SelectionOptions, PathOptions, DisplayOptions):
        verb.set_defaults(**{field.name: field.default for field in dataclasses.fields(kind)})


def _chosen(
    chosen: argparse.Namespace,
) -> tuple[SelectionOptions, PathOptions, DisplayOptions]:
    """The options of `attribute` and `perturb` from the command line; starts JAX."""
    options.start_jax(chosen)
    selection, path, display = (
        {field.name: getattr(chosen, field.name) for field in dataclasses.fields(kind)}
        for kind in (SelectionOptions, PathOptions, DisplayOptions)
    )
    selection["path"] = selection["path"] or None
    return SelectionOptions(**selection), PathOptions(**path), DisplayOptions(**display)


def _run_attribute(chosen: argparse.Namespace) -> int:
    """Map the pixels that support each label (Integrated Gradients); resumes if interrupted.

    maknet attribute --model runs/teacher --split test --labels liver,spleen --out maps
    maknet attribute scans/ --model head-neck --labels larynx --limit 5 --out maps
    """
    from maknet_jax import attribute

    summary = attribute.attribute(
        chosen.model,
        chosen.out,
        *_chosen(chosen),
        faithful=chosen.faithfulness,
        nifti=chosen.nifti,
    )
    for name, share in summary.get("complete", {}).items():
        flagged = summary["flagged"][name]
        options.show(
            f"{name}: {console.plural(summary['images'], 'image')}, {share:.1%} of maps sum to the "
            f"change of the output within 1 %, {flagged} do not"
        )
    areas = {
        f"{name}: {area}": values
        for name, each in summary.get("faithfulness", {}).items()
        for area, values in each.items()
    }
    for name, values in (areas | summary.get("differences", {})).items():
        options.show(f"{name} {console.format_interval(values)}")
    if areas:
        options.show(console.describe_groups(summary["groups"]))
    if summary.get("without_geometry"):
        options.show(
            f"series without NIfTI maps: {summary['without_geometry']} (their position is unknown)"
        )
    return _ended(summary)


def _run_perturb(chosen: argparse.Namespace) -> int:
    """Compare labels before and after parts of an image change; resumes if interrupted.

    maknet perturb --model runs/teacher --split test --strategy patch,attribution --out out
    """
    from maknet_jax import perturb

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
        print(console.format_table(*perturb.table(summary)))
        options.show(console.describe_groups(*(row["groups"] for row in summary["results"])))
    return _ended(summary)


def _ended(summary: dict[str, Any]) -> int:
    from maknet_jax import attribute

    options.show(f"selected: {summary['selected']}")
    if summary["trained_on"]:
        options.show(f"trained on {summary['trained_on']}")
    for line in attribute.warnings(summary):
        options.show(line)
    for file in summary.get("files", ()):
        options.show(f"  {file}")
    if summary["failures"]:
        options.show(f"rejected: {summary['failures']}, see {summary.get('failures_file')}")
    options.show(console.NOTICE)
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
    options.show(str(page))
