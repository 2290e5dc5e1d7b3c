"""`maknet select idc`."""

import argparse

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `select`."""
    select = verbs.add_parser(
        "select",
        help="choose public CT to download: idc",
        epilog="example: maknet select idc --per-patient 2 --max 6568 --out selection",
    )
    forms = select.add_subparsers(dest="form", required=True, metavar="FORM")
    verb = options.verb(forms, "idc", _run_idc)
    verb.add_argument(
        "--out", type=options.folder, help="folder to write (default: only print the counts)"
    )
    verb.add_argument(
        "--body-parts",
        nargs="+",
        default=(),
        metavar="NAME",
        help="BodyPartExamined of the series; * and ? are wildcards, `unspecified` means none "
        "(default: all)",
    )
    verb.add_argument(
        "--collections",
        nargs="+",
        default=(),
        metavar="NAME",
        help="collections to select from; * and ? are wildcards (default: all)",
    )
    verb.add_argument(
        "--exclude-collections",
        nargs="+",
        default=(),
        metavar="NAME",
        help="collections to leave out; * and ? are wildcards",
    )
    verb.add_argument(
        "--phantoms",
        action="store_true",
        help="also select phantoms and animals, as far as the index tells",
    )
    verb.add_argument(
        "--licences",
        nargs="+",
        default=("CC BY",),
        metavar="NAME",
        help="licences, as in 'CC BY' 'CC BY-NC'; without a version, all versions (default: 'CC "
        "BY', which excludes non-commercial licences)",
    )
    verb.add_argument(
        "--min-slices",
        type=options.count,
        default=51,
        help="leave out series with fewer slices (default: 51)",
    )
    verb.add_argument(
        "--per-patient", type=options.count, metavar="N", help="at most N series per patient"
    )
    verb.add_argument(
        "--per-collection", type=options.count, metavar="N", help="at most N series per collection"
    )
    verb.add_argument("--max", type=options.count, metavar="N", help="at most N series in all")
    verb.add_argument("--seed", type=int, default=0, help="seed of the random order (default: 0)")
    verb.add_argument(
        "--with",
        dest="analysis",
        metavar="RESULT",
        help="select CT series with their segmentations of this analysis result, such as "
        "totalsegmentator_ct_segmentations",
    )
    verb.add_argument(
        "--seg-index",
        metavar="FILE",
        help="IDC's seg_index as parquet, which states the CT series of each segmentation "
        "(default: infer it from the study, and the series number in the description)",
    )
    verb.add_argument(
        "--index",
        metavar="FILE",
        help="IDC's index as parquet (default: that of the package idc-index-data)",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace a selection at OUT")


def _run_idc(chosen: argparse.Namespace) -> None:
    """Choose CT series of the Imaging Data Commons, offline, and write a manifest for `idc
    download`.

        maknet select idc --per-collection 500 --max 6568 --out selection
    """
    from maknet_jax import select_idc

    limits = ("min_slices", "phantoms", "per_patient", "per_collection", "seed")
    filters = select_idc.Filters(
        body_parts=tuple(chosen.body_parts),
        collections=tuple(chosen.collections),
        exclude_collections=tuple(chosen.exclude_collections),
        licences=tuple(chosen.licences),
        total=chosen.max,
        **options.selected(chosen, *limits),
    )
    names = ("analysis", "index", "seg_index", "overwrite")
    summary = select_idc.select_idc(chosen.out, filters=filters, **options.selected(chosen, *names))
    print(select_idc.describe(summary))
