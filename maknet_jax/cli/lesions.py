"""The verb that compares lesions: `retrieve`."""

import argparse
from collections.abc import Callable

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `retrieve`."""
    verb = options.verb(verbs, "retrieve", _run_retrieve)
    options.model(verb, "a trained LesaNet")
    verb.add_argument("--image", required=True, help="slice with the lesion, PNG or DICOM")
    verb.add_argument(
        "--box",
        required=True,
        type=_numbers(4),
        metavar="X0,Y0,X1,Y1",
        help="corners of the lesion in pixels of the slice, counted from 0",
    )
    verb.add_argument(
        "--data", required=True, help="output folder of `prepare deeplesion --lesions`"
    )
    verb.add_argument(
        "--out", required=True, help="CSV file to write, with a contact sheet beside it"
    )
    verb.add_argument(
        "--spacing", type=_numbers(3), metavar="X,Y,Z", help="in mm; required for PNGs"
    )
    verb.add_argument(
        "--split", type=options.words, help="splits to search, separated by commas (default: all)"
    )
    verb.add_argument(
        "--top", type=options.count, default=11, help="number of lesions to list (default: 11)"
    )
    verb.add_argument(
        "--include-patient",
        action="store_true",
        help="also list the lesion itself and other lesions of its patient",
    )
    options.checkpoint(verb)
    options.override_options(verb)


def _numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    """The type of `count` numbers separated by commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count:
            raise argparse.ArgumentTypeError(f"{text!r} should be {count} numbers, as in 1,2,3")
        return numbers

    return parse


def _run_retrieve(chosen: argparse.Namespace) -> None:
    r"""Find the lesions of a data set that are most similar to one lesion.

        maknet retrieve --model runs/lesanet --image 000069_02_01/058.png \
            --box 160,268,186,290 --spacing 0.73,0.73,5 --data shards/lesions --out similar.csv
    """
    from maknet_jax import console, retrieve

    options.start_jax()
    summary = retrieve.retrieve(
        chosen.model,
        chosen.image,
        chosen.box,
        chosen.data,
        chosen.out,
        spacing=chosen.spacing,
        splits=chosen.split,
        top=chosen.top,
        checkpoint=chosen.checkpoint,
        include_patient=chosen.include_patient,
        **options.selected(chosen, *options.OVERRIDES),
    )
    rows = summary["found"]
    print(console.format_table(list(rows[0]), [row.values() for row in rows]))
    if summary["left_out"]:
        options.show(
            f"{summary['left_out']} lesions of the query's patient are left out: --include-patient "
            "lists them"
        )
    options.show("\n".join(f"  {file}" for file in summary["files"]))
