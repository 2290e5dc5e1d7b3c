"""`maknet prepare deeplesion`, `dicom`, `table`, `segmentations` and `openkbp`."""

import argparse
from typing import Any

from maknet_jax import console
from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `prepare`."""
    prepare = verbs.add_parser(
        "prepare",
        help="write CT and labels as records: deeplesion, dicom, table, segmentations or openkbp",
        epilog="example: maknet prepare dicom TCIA --out shards/tcia",
    )
    forms = prepare.add_subparsers(dest="form", required=True, metavar="FORM")

    verb = options.verb(forms, "deeplesion", _run_deeplesion)
    verb.add_argument("--images", required=True, help="folder of 16-bit PNGs, nested or flat")
    verb.add_argument("--info", required=True, help="DL_info.csv in its original order")
    verb.add_argument(
        "--labels", help="LesaNet's text-mined labels (JSON); omit for unlabelled records"
    )
    verb.add_argument("--hand-labels", help="LesaNet's hand-labelled test set (JSON)")
    verb.add_argument("--ontology", help="LesaNet's ontology (xlsx)")
    verb.add_argument(
        "--lesions",
        action="store_true",
        help="write patches around the lesions with all 171 labels, for LesaNet",
    )
    _add_output_options(verb, size="256; with --lesions 120", dicom=False)

    verb = options.verb(forms, "dicom", _run_dicom)
    verb.set_defaults(several="put them into one parent folder, or ")
    verb.add_argument(
        "folder", help="a file or a folder tree of CT, a zip or tar of one, or a DICOMDIR"
    )
    options.pseudonyms(verb)
    verb.add_argument(
        "--min-slices",
        type=options.count,
        default=51,
        help="skip volumes with fewer slices (default: 51)",
    )
    _add_output_options(verb)

    verb = options.verb(forms, "table", _run_table)
    verb.add_argument("table", help="the CSV; labels are separated by |")
    options.png_window(verb)
    options.pseudonyms(verb)
    _add_output_options(verb)
    _add_segmentations(forms)

    verb = options.verb(forms, "openkbp", _run_openkbp)
    verb.add_argument("folder", help="a folder of the release that contains pt_N/ct.csv")
    verb.add_argument(
        "--out",
        type=options.folder,
        required=True,
        help="folder to write; finished patients are skipped",
    )


def _add_segmentations(forms: argparse._SubParsersAction) -> None:
    verb = options.verb(forms, "segmentations", _run_segmentations)
    verb.add_argument(
        "folder",
        nargs="+",
        metavar="[SPLIT=]DIR",
        help="CASE/ct.nii.gz with CASE/segmentations/ORGAN.nii.gz or CASE/segmentation.nii.gz, or "
        "DICOM with DICOM SEG; SPLIT= assigns all of its cases to one split",
    )
    verb.add_argument(
        "--labels",
        metavar="CSV",
        help="mask,label: the masks that form each label; others are not read. totalsegmentator: "
        "DeepLesion's body parts from TotalSegmentator's names (default: every mask is a label)",
    )
    verb.add_argument(
        "--every", type=options.count, default=1, help="use every N-th slice (default: 1)"
    )
    verb.add_argument(
        "--min-area",
        type=float,
        metavar="MM2",
        help="minimum area of a label that is present; smaller ones are unknown (default: 50)",
    )
    verb.add_argument(
        "--missing-is-absent",
        action="store_true",
        help="an organ without a mask, or with an empty one, is absent, not unknown",
    )
    verb.add_argument(
        "--unknown-below",
        metavar="LABELS",
        type=options.words,
        help="labels, separated by commas, that are unknown below their lowest contoured slice",
    )
    verb.add_argument(
        "--splits",
        metavar="CSV",
        help="case,split or patient,split (default: meta.csv in DIR if it has splits, else a "
        "hash of the patient)",
    )
    verb.add_argument(
        "--shares",
        type=options.shares,
        metavar="SPLIT=SHARE,...",
        help="split the patients by a hash (default: train=0.8,val=0.1,test=0.1)",
    )
    verb.add_argument("--seed", type=int, default=0, help="seed of the hash (default: 0)")
    verb.add_argument(
        "--source", default="", help="name of the data, recorded in runs trained on them"
    )
    verb.add_argument("--citation", default="", help="citation of the data")
    verb.add_argument("--licence", default="", help="licence of the data")
    options.pseudonyms(verb)
    _add_output_options(verb)


def _add_output_options(
    verb: argparse.ArgumentParser, size: str = "256", *, dicom: bool = True
) -> None:
    options.override_options(verb, dicom=dicom)
    verb.add_argument("--out", type=options.folder, required=True, help="folder to write")
    verb.add_argument(
        "--size",
        type=options.count,
        help=f"edge of the images in pixels (default: {size})",
    )
    verb.add_argument(
        "--workers", type=options.count, default=options.cores(), help="processes (default: cores)"
    )
    options.scheduler(verb)


def _run_deeplesion(chosen: argparse.Namespace) -> int:
    r"""Prepare DeepLesion's PNGs with LesaNet's labels.

        maknet prepare deeplesion --images Images_png --info DL_info.csv \
            --labels text_mined_labels_171_and_split.json \
            --hand-labels hand_labeled_test_set.json \
            --ontology lesion_ontology_181022.xlsx --out shards/deeplesion
    """
    _start_workers(chosen, "data.key_slices")
    from maknet_jax import prepare

    return _report(
        prepare.prepare_deeplesion(
            chosen.images,
            chosen.info,
            label_file=chosen.labels,
            patches=chosen.lesions,
            **options.selected(chosen, "hand_labels", "ontology"),
            **_output_options(chosen),
        )
    )


def _run_dicom(chosen: argparse.Namespace) -> int:
    """Prepare unlabelled folders of DICOM or NIfTI.

    maknet prepare dicom TCIA --out shards/tcia
    """
    _start_workers(chosen, "data.triplets")
    from maknet_jax import prepare

    return _report(
        prepare.prepare_dicom(
            chosen.folder,
            **options.selected(chosen, "salt_file", "pseudonyms"),
            min_slices=chosen.min_slices,
            **_output_options(chosen),
        )
    )


def _run_table(chosen: argparse.Namespace) -> int:
    """Prepare your own labelled slices from a CSV of path,labels,split[,slice,patient,unknown].

    maknet prepare table labels.csv --out shards/mine --png-window=-175,275
    """
    _start_workers(chosen, "data.triplets")
    from maknet_jax import prepare

    return _report(
        prepare.prepare_table(
            chosen.table,
            **options.selected(chosen, "png_window", "salt_file", "pseudonyms"),
            **_output_options(chosen),
        )
    )


def _run_segmentations(chosen: argparse.Namespace) -> int:
    r"""Prepare CT with organ masks (NIfTI or DICOM SEG) as labelled slices.

        maknet prepare segmentations openkbp/train test=openkbp/validation \
            --shares train=0.82,val=0.18 --unknown-below spinal_cord,esophagus \
            --every 3 --size 64 --source "OpenKBP: head, neck, upper chest" --out shards/openkbp
    """
    _start_workers(chosen, "data.segmentations")
    from maknet_jax import prepare

    rules = prepare.Rules(
        min_area=prepare.Rules.min_area if chosen.min_area is None else chosen.min_area,
        every=chosen.every,
        missing_is_absent=chosen.missing_is_absent,
        unknown_below=tuple(chosen.unknown_below or ()),
    )
    return _report(
        prepare.prepare_segmentations(
            chosen.folder,
            label_table=chosen.labels,
            rules=rules,
            splits=prepare.SplitOptions(chosen.splits, chosen.shares, chosen.seed),
            origin={name: getattr(chosen, name) for name in ("source", "citation", "licence")},
            **options.selected(chosen, "salt_file", "pseudonyms"),
            **_output_options(chosen),
        )
    )


def _run_openkbp(chosen: argparse.Namespace) -> int:
    """Convert the OpenKBP release (sparse CSV) to NIfTI for `prepare segmentations`.

    maknet prepare openkbp open-kbp/provided-data/train-pats --out openkbp/train
    """
    from maknet_jax import prepare

    summary = prepare.prepare_openkbp(chosen.folder, chosen.out)
    options.show(
        f"{console.plural(summary['patients'], 'patient')} in {summary['out']}, "
        f"{summary['present_before']} of them converted before"
    )
    if summary["failures"]:
        options.show(f"rejected: {summary['failures']}, see {summary['out']}/failures.csv")
    return options.SOME_REJECTED if summary["failures"] else options.DONE


def _start_workers(chosen: argparse.Namespace, module: str) -> None:
    from maknet_jax import workers  # before `prepare`, whose import takes about a second

    workers.start_early(chosen.workers, chosen.scheduler, module)


def _output_options(chosen: argparse.Namespace) -> dict[str, Any]:
    size = {} if chosen.size is None else {"size": chosen.size}
    overrides = options.selected(chosen, *options.OVERRIDES)
    places = options.selected(chosen, "out", "workers", "scheduler")
    return places | overrides | size


def _report(summary: dict[str, Any]) -> int:
    from maknet_jax import prepare

    print(prepare.describe(summary))
    return options.SOME_REJECTED if summary["failures"] else options.DONE
