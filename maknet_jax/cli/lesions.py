"""The verb that compares lesions."""

import argparse

from maknet_jax.cli import options


def add_verbs(verbs):
    """Adds `retrieve`."""
    verb = options.verb(
        verbs,
        "retrieve",
        "the lesions of a prepared set that are most like one lesion",
        "maknet retrieve --workdir runs/lesanet --image 000069_02_01/058.png \\\n"
        "    --box 160,268,186,290 --spacing 0.73,0.73,5 --data shards/lesions --out similar.csv",
        _run_retrieve,
    )
    verb.add_argument("--workdir", required=True, help="folder of a LesaNet's run")
    verb.add_argument("--image", required=True, help="the slice: PNG or DICOM")
    verb.add_argument(
        "--box",
        required=True,
        type=_numbers(4),
        metavar="X0,Y0,X1,Y1",
        help="of the lesion, in pixels of the slice from 0",
    )
    verb.add_argument("--data", required=True, help="folder of `prepare deeplesion --lesions`")
    verb.add_argument("--out", required=True, help="the CSV to write; a picture lies beside it")
    verb.add_argument(
        "--spacing", type=_numbers(3), metavar="X,Y,Z", help="mm; PNGs do not know theirs"
    )
    verb.add_argument("--split", help="names with commas (default: all)")
    verb.add_argument("--top", type=options.count, default=11, help="how many (default: 11)")
    verb.add_argument("--checkpoint", default="best", choices=("best", "last"))


def _numbers(count):
    def read(text):
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != count:
            raise argparse.ArgumentTypeError(f"{text!r} should be {count} numbers with commas")
        return numbers

    return read


def _run_retrieve(chosen):
    from maknet_jax import console, retrieve

    options.start_jax()
    summary = retrieve.retrieve(
        chosen.workdir,
        chosen.image,
        chosen.box,
        chosen.data,
        chosen.out,
        spacing=chosen.spacing,
        splits=chosen.split.split(",") if chosen.split else None,
        top=chosen.top,
        checkpoint=chosen.checkpoint,
    )
    found = summary["found"]
    print(console.format_table(list(found[0]), [row.values() for row in found]))
    print("\n".join(f"  {file}" for file in summary["files"]))
