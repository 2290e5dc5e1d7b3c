"""The verbs that say why a network gives its labels, and the report of a run."""

from maknet_jax.cli import options


def add_verbs(verbs):
    """Adds `attribute`, `perturb` and `report`."""
    verb = options.verb(
        verbs,
        "attribute",
        "where in the image a network sees its labels: Integrated Gradients; run again it goes on",
        "maknet attribute --workdir runs/teacher --split test --labels liver,spleen --out maps",
        _run_attribute,
    )
    _picking(verb)
    verb.add_argument("--output", default="probability", choices=("probability", "logit"))
    verb.add_argument(
        "--refine", type=int, help="doublings of the steps where a map is not complete (default: 4)"
    )
    verb.add_argument(
        "--faithfulness", action="store_true", help="deletion and insertion against random pixels"
    )
    verb = options.verb(
        verbs,
        "perturb",
        "what a network still says when parts of the image change; run again it goes on",
        "maknet perturb --workdir runs/teacher --split test --strategy patch,attribution --out out",
        _run_perturb,
    )
    _picking(verb)
    verb.add_argument(
        "--strategy", help="of neighbour, patch, attribution and random, with commas (default: all)"
    )
    verb.add_argument(
        "--masks", help="regions: NIfTI, PNG or a folder (default: DeepLesion's boxes)"
    )
    verb.add_argument("--organs", help="names or values in the masks, with commas")
    verb.add_argument(
        "--share", type=float, default=0.1, help="of the pixels to delete (default: 0.1)"
    )
    verb = options.verb(
        verbs,
        "report",
        "a run on one offline page: curves, tables, labels, best and worst cases",
        "maknet report runs/teacher",
        _run_report,
    )
    verb.add_argument("workdir", help="folder of the trained run")
    verb.add_argument("--out", help="folder to write (default: WORKDIR/report)")
    verb.add_argument("--split", help="of the cases (default: test, else the validation's)")
    verb.add_argument(
        "--cases", type=options.count, default=3, help="best and worst each (default: 3)"
    )


def _picking(verb):
    verb.add_argument("path", nargs="?", help="CT files instead of a split: DICOM, NIfTI or PNG")
    verb.add_argument("--workdir", required=True, help="folder of the trained run")
    verb.add_argument("--out", required=True, help="folder to write")
    verb.add_argument("--split", help="of the data trained on, or of --data")
    verb.add_argument("--data", help="another prepared data set")
    verb.add_argument("--ids", help="only these images, with commas; of CT SERIES:SLICE")
    verb.add_argument("--labels", help="explain these, with commas; only images that have one")
    verb.add_argument("--limit", type=options.count, help="so many images at most")
    verb.add_argument("--compare", metavar="WORKDIR", help="a second network, shown beside")
    verb.add_argument("--top", type=options.count, default=5, help="labels (default: 5)")
    verb.add_argument("--steps", type=options.count, default=50, help="of the path (default: 50)")
    verb.add_argument(
        "--method", default="trapezoid", choices=("trapezoid", "right", "midpoint", "gauss")
    )
    verb.add_argument(
        "--baseline", default="black", help="black (-1024 HU), blurred or HU (default: black)"
    )
    verb.add_argument("--checkpoint", default="best", choices=("best", "last"))
    verb.add_argument("--batch-size", type=options.count, help="images a step (default: devices)")
    verb.add_argument(
        "--display",
        type=options.window,
        default=(-160.0, 240.0),
        metavar="LOW,HIGH",
        help="HU of the pictures, as --display=-160,240",
    )
    verb.add_argument(
        "--most-shown", type=options.count, default=50, help="images on the page (default: 50)"
    )
    options.png_window(verb)
    options.distributed(verb)


_SAME = (
    "path",
    "split",
    "data",
    "limit",
    "compare",
    "top",
    "steps",
    "method",
    "baseline",
    "checkpoint",
    "batch_size",
    "display",
    "most_shown",
    "png_window",
)


def _picked(chosen):
    options.start_jax(chosen.distributed)
    lists = {name: _words(getattr(chosen, name)) for name in ("ids", "labels")}
    return {name: getattr(chosen, name) for name in _SAME} | lists


def _words(text):
    return [word.strip() for word in text.split(",")] if text else None


def _run_attribute(chosen):
    from maknet_jax import attribute, console

    given = _picked(chosen)
    summary = attribute.attribute(
        chosen.workdir,
        chosen.out,
        output=chosen.output,
        faithful=chosen.faithfulness,
        refine=chosen.refine,
        **given,
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
    return _ended(summary)


def _run_perturb(chosen):
    from maknet_jax import console, perturb

    given = _picked(chosen)
    strategies = tuple(_words(chosen.strategy) or perturb.STRATEGIES)
    summary = perturb.perturb(
        chosen.workdir,
        chosen.out,
        strategies=strategies,
        masks=chosen.masks,
        organs=_words(chosen.organs),
        share=chosen.share,
        **given,
    )
    if "results" in summary:
        print(console.format_table(*perturb.table(summary["results"])))
    return _ended(summary)


def _ended(summary):
    for file in summary.get("files", ()):
        print(f"  {file}")
    if summary["failures"]:
        print(f"rejected: {summary['failures']}, see {summary.get('failures_file')}")
    return options.SOME_REJECTED if summary["failures"] else options.DONE


def _run_report(chosen):
    from maknet_jax import report

    options.start_jax()
    print(report.report(chosen.workdir, chosen.out, split=chosen.split, count=chosen.cases))
