"""Table 1 of the paper: VGG16, ResNet18 and MAKNet by one recipe, beside the paper's rows.

    python benchmarks/experiments/table1.py --data shards/deeplesion --workdir runs/table1
    python benchmarks/experiments/table1.py --small  # phantom at 96 x 96: 18 minutes
    python benchmarks/experiments/table1.py --quick    # in tiny, 2 minutes: shows only that it runs

Run again it goes on where it was. Other fields of the three configs are changed
with --config.FIELD=VALUE. Writes WORKDIR/table1.md, .csv and .json; the runs lie beside them.
"""

import argparse
import pathlib

from benchmarks import harness
from maknet_jax import console, evaluate, files, phantom, prepare, train
from maknet_jax.cli import options
from maknet_jax.data import deeplesion, records
from maknet_jax.errors import InputError
from maknet_jax.model_table import CONFIGS, PAPER_MILLIONS
from maknet_jax.runs import config as configs

METRICS = {"auc": "AUC", "f1": "F1", "precision": "precision", "recall": "recall"}
SETS = {"test": "text-mined", "hand": "hand-labelled"}
TITLES = {"vgg16": "VGG16", "resnet18": "ResNet18", "maknet": "MAKNet"}  # in the paper's order
PAPER = {
    "vgg16": {"test": (0.8912, 0.1813, 0.4826, 0.4740), "hand": (0.9030, 0.2442, 0.4882, 0.5476)},
    "resnet18": {
        "test": (0.8987, 0.1991, 0.4285, 0.4736),
        "hand": (0.9024, 0.2699, 0.4503, 0.5759),
    },
    "maknet": {"test": (0.9051, 0.2078, 0.4696, 0.4744), "hand": (0.9101, 0.2755, 0.4638, 0.5780)},
}
HEADER = ["", "from", "parameters", *(f"{s} {m}" for s in SETS for m in METRICS.values())]
# What each form is made of: the phantom (None: the user's data), the recipe's changes, its name.
FORMS = {
    "full": (None, (), "the recipe of the config pages"),
    "small": (
        {"patients": 100, "unlabelled_volumes": 0, "size": 128, "lesions_per_patient": 6},
        # 96 pixels at least: at 64 the last maps of ResNet18 are 2 x 2, and XLA's convolution of
        # those on CPU is tens of times slower.
        ("data.size=96", "data.batch_size=16", "epochs=4"),
        "SMALL FORM: a generated phantom, small images, few epochs, one seed, the networks in full "
        "width. It shows that the three train by one recipe; it says little of their order and "
        "nothing of the paper's rows",
    ),
    "quick": (
        {"patients": 12, "unlabelled_volumes": 0, "size": 64},
        ("data.size=32", "data.batch_size=16", "epochs=1"),
        "QUICK FORM: three updates on a tiny phantom, the networks in full width. It shows only "
        "that everything runs: the numbers mean nothing",
    ),
}
# Fields that this script sets, and what to write instead.
OWN = {"seed": "use --seed", "data.path": "use --data", "model.name": "the table is of three"}


def table1(workdir, *, data=None, form="full", seed=0, overrides=(), pages=CONFIGS):
    """Trains, evaluates and tabulates; what is finished in `workdir` is not repeated.

    Args:
      workdir: the folder of the three runs and of the table.
      data: the prepared data set; for the forms small and quick it is made in `workdir`.
      form: full, small or quick.
      seed: of the weights, the order of the examples and the phantom.
      overrides: strings `epochs=2` for all three configs.
      pages: network -> config page.

    Returns:
      What `table1.json` holds.

    Raises:
      InputError: the data lack a split, or an override fits not all three configs, or
        `workdir` holds the phantom of another seed.
      Stopped: by a signal; the same call goes on.
    """
    workdir = pathlib.Path(workdir)
    arguments, changes, what = FORMS[form]
    data = workdir / "shards" if arguments else pathlib.Path(data)
    changes = [*changes, *overrides, f"seed={seed}", f"data.path={data}"]
    recipes = {name: configs.load(pages[name], changes) for name in PAPER}
    recipe = recipes["maknet"]
    if arguments:
        paths = phantom.open_phantom(workdir / "phantom", seed=seed, **arguments)
        if not (data / "dataset.json").exists():
            source = phantom.deeplesion_files(paths)
            prepare.prepare_deeplesion(out=data, size=recipe.data.size, **source)
    dataset = records.open_dataset(data)
    counts = {split: dataset.split(split)["count"] for split in ("train", "val", *SETS)}
    if not all(counts.values()):
        raise InputError(f"{data} has splits {counts}: table 1 needs all four, prepare them")
    networks = {name: _run(recipes[name], workdir / name) for name in PAPER}
    notes = [
        what + (f"; changed: {', '.join(overrides)}" if overrides else ""),
        f"images {_listed(counts)}, {len(dataset.vocabulary)} labels (the paper's: "
        f"{_listed(deeplesion.PAPER_COUNTS)}, 115 labels); data fingerprint "
        f"{dataset.fingerprint[:16]}",
        f"{recipe.data.size} x {recipe.data.size} pixels, {recipe.epochs:g} epochs, batch "
        f"{recipe.data.batch_size}, seed {seed}, trained on "
        + ", ".join(sorted({row["devices"] for row in networks.values()})),
        "test: " + "; hand: ".join(SETS.values()) + ". Averages over labels that have positives "
        "and negatives; thresholds and the checkpoint chosen on the validation split",
    ]
    result = harness.provenance("table1") | {
        "form": form,
        "notes": notes,
        "seed": seed,
        "overrides": list(overrides),
        "data": {"path": str(data), "fingerprint": dataset.fingerprint, "images": counts},
        "networks": networks,
    }
    _write(workdir, notes, networks)
    files.write_json(workdir / "table1.json", result)  # the last: where it is, all is
    return result


def _run(config, folder):
    console.Log().say(f"{folder}")
    train.train(config, folder)
    trained = files.read_json(folder / "summary.json")  # of the machine that trained
    evaluated = evaluate.evaluate(folder)
    return {
        "workdir": str(folder),
        "parameters": trained["parameters"],
        "devices": trained["devices"],
        "images_per_second": trained["images_per_second"],
        "checkpoint_step": evaluated["step"],
        "splits": evaluated["splits"],
    }


def _listed(counts):
    return ", ".join(f"{split} {count:,}" for split, count in counts.items())


def table_rows(networks):
    """Two rows a network, ours and the paper's: numbers in the order of `HEADER`.

    Args:
      networks: name -> parameters and splits, as `table1` returns them.
    """
    rows = []
    for name, title in TITLES.items():
        splits = networks[name]["splits"]
        ours = [splits[split][metric] for split in SETS for metric in METRICS]
        paper = [number for split in SETS for number in PAPER[name][split]]
        rows.append([title, "ours", networks[name]["parameters"], *ours])
        rows.append([title, "paper", round(PAPER_MILLIONS[name] * 1e6), *paper])
    return rows


def _write(workdir, notes, networks):
    rows = table_rows(networks)
    console.write_table(workdir / "table1.csv", HEADER, rows)
    cells = [
        [title, source, f"{count / 1e6:.2f} M"]
        + ["-" if number is None else f"{number:.4f}" for number in numbers]
        for title, source, count, *numbers in rows
    ]
    with files.write_whole(workdir / "table1.md") as file:
        file.write(console.markdown_table(HEADER, cells))
        file.write("\n" + "".join(f"- {note}.\n" for note in notes))
    print(console.format_table(HEADER, cells))
    print("\n" + ".\n".join(notes) + f".\n\nwritten: {workdir / 'table1'}.md, .csv, .json")


def main(argv=None):
    """Parses, and makes the table."""
    parser = options.Parser(
        prog="benchmarks/experiments/table1.py",
        description=__doc__,
        usage="%(prog)s (--data DIR | --small | --quick) [--workdir DIR] [--seed N] "
        "[--config.FIELD=VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--data", help="what `maknet prepare deeplesion` wrote: the full recipe")
    for name in ("small", "quick"):
        form.add_argument(
            f"--{name}", dest="form", action="store_const", const=name, help="on a phantom"
        )
    parser.add_argument("--workdir", help="default: runs/table1, runs/table1-small or -quick")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    chosen, rest = parser.parse_known_args(argv)
    overrides = options.config_changes(parser, rest, OWN)
    if chosen.seed < 0:
        parser.error(f"--seed {chosen.seed} should be 0 or above")
    form = chosen.form or "full"
    workdir = chosen.workdir or f"runs/table1{f'-{form}' if chosen.form else ''}"
    table1(workdir, data=chosen.data, form=form, seed=chosen.seed, overrides=overrides)


if __name__ == "__main__":
    harness.run(main)
