"""`maknet prepare deeplesion`, `dicom` and `table`."""

import argparse
from typing import Any

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `prepare`."""
    prepare = verbs.add_parser(
        "prepare",
        help="write CT and labels as records: deeplesion, dicom or table",
        epilog="example: maknet prepare dicom TCIA --out shards/tcia",
    )
    forms = prepare.add_subparsers(dest="form", required=True, metavar="FORM")

    verb = options.verb(
        forms,
        "deeplesion",
        "prepare DeepLesion's PNGs with LesaNet's labels",
        "maknet prepare deeplesion --images Images_png --info DL_info.csv \\\n"
        "    --labels text_mined_labels_171_and_split.json \\\n"
        "    --hand-labels hand_labeled_test_set.json \\\n"
        "    --ontology lesion_ontology_181022.xlsx --out shards/deeplesion",
        _run_deeplesion,
    )
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
    _add_output_options(verb, size="256; with --lesions 120")
    verb.set_defaults(size=None)

    verb = options.verb(
        forms,
        "dicom",
        "prepare unlabelled folders of DICOM or NIfTI",
        "maknet prepare dicom TCIA --out shards/tcia",
        _run_dicom,
    )
    verb.add_argument("folder", help="a file or a folder tree of CT")
    verb.add_argument(
        "--salt-file",
        help="secret key that turns UIDs into ids, created if absent "
        "(default: ~/.config/maknet/salt)",
    )
    verb.add_argument(
        "--min-slices",
        type=options.count,
        default=51,
        help="skip volumes with fewer slices (default: 51)",
    )
    _add_output_options(verb)

    verb = options.verb(
        forms,
        "table",
        "prepare your own labelled slices from a CSV of path,labels,split[,slice,patient]",
        "maknet prepare table labels.csv --out shards/mine --png-window=-175,275",
        _run_table,
    )
    verb.add_argument("table", help="the CSV; labels are separated by |")
    options.png_window(verb)
    _add_output_options(verb)


def _add_output_options(verb: argparse.ArgumentParser, size: str = "256") -> None:
    verb.add_argument("--out", required=True, help="folder to write")
    verb.add_argument(
        "--size",
        type=options.count,
        default=256,
        help=f"edge of the images in pixels (default: {size})",
    )
    verb.add_argument(
        "--workers", type=options.count, default=options.cores(), help="processes (default: cores)"
    )


def _run_deeplesion(chosen: argparse.Namespace) -> int:
    from maknet_jax import prepare

    chosen.size = chosen.size or (120 if chosen.lesions else 256)
    return _report(
        prepare.prepare_deeplesion(
            chosen.images,
            chosen.info,
            label_file=chosen.labels,
            hand_labels=chosen.hand_labels,
            ontology=chosen.ontology,
            patches=chosen.lesions,
            **_output_options(chosen),
        )
    )


def _run_dicom(chosen: argparse.Namespace) -> int:
    from maknet_jax import prepare

    return _report(
        prepare.prepare_dicom(
            chosen.folder,
            salt_file=chosen.salt_file,
            min_slices=chosen.min_slices,
            **_output_options(chosen),
        )
    )


def _run_table(chosen: argparse.Namespace) -> int:
    from maknet_jax import prepare

    return _report(
        prepare.prepare_table(chosen.table, png_window=chosen.png_window, **_output_options(chosen))
    )


def _output_options(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"out": chosen.out, "size": chosen.size, "workers": chosen.workers}


def _report(summary: dict[str, Any]) -> int:
    from maknet_jax import prepare

    print(prepare.describe(summary))
    return options.SOME_REJECTED if summary["failures"] else options.DONE
