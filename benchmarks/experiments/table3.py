"""Table 3 of the paper: LesaNet from natural images and from pseudo-labelled CT.

    python benchmarks/experiments/table3.py --data shards/lesions --seeds 1 \\
        --init imagenet=weights/vgg16.safetensors --init tcia=runs/vgg16-tcia
    python benchmarks/experiments/table3.py --small  # phantom: pseudo-labels against random weights
    python benchmarks/experiments/table3.py --quick     # the same in tiny: shows only that it runs

`--init NAME=PATH` names what LesaNet's base starts from, `random=` random weights; imagenet and
tcia stand beside the paper's rows. Run again it goes on where it was. Other fields of lesanet.py
are changed with --config.FIELD=VALUE. Metrics follow LesaNet's own rules (`maknet evaluate --rules
lesanet`). Writes WORKDIR/table3.md, .csv and .json.
"""

import argparse
import pathlib
import statistics

from benchmarks import harness
from benchmarks.experiments.table1 import METRICS, SETS
from maknet_jax import console, evaluate, files, phantom, prepare, pseudo_label, train
from maknet_jax.cli import options
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import config as configs

PAPER = {
    "imagenet": {
        "test": (0.9344, 0.3423, 0.3593, 0.5327),
        "hand": (0.9398, 0.4344, 0.4737, 0.5274),
    },
    "tcia": {"test": (0.9331, 0.3569, 0.3045, 0.6669), "hand": (0.9403, 0.4972, 0.4754, 0.7531)},
}
HEADER = ["base", "from", "seeds", *(f"{s} {m}" for s in SETS for m in METRICS.values())]
# The phantom, the edge of slices and patches, and the changes of its three kinds of runs.
FORMS = {
    "small": {
        "phantom": {"patients": 60, "unlabelled_volumes": 12, "size": 96, "slices": 60},
        "size": 64,
        "teacher": ("epochs=20",),
        "student": ("epochs=20",),
        "lesanet": ("epochs=15", "data.batch_size=16", "optimizer.learning_rate=0.01"),
        "min_slices": 30,
    },
    "quick": {
        "phantom": {"patients": 8, "unlabelled_volumes": 1, "size": 64, "slices": 12},
        "size": 32,
        "teacher": ("epochs=1", "data.batch_size=8"),
        "student": ("epochs=1", "data.batch_size=8", "pseudo.batch_size=8"),
        "lesanet": ("epochs=1", "data.batch_size=8"),
        "min_slices": 1,
    },
}
NOTES = {
    "small": "SMALL FORM: a generated phantom with a small MAKNet for a base. It shows that the "
    "chain runs and what pre-training brings there, nothing of the paper's rows",
    "quick": "QUICK FORM: an epoch each on a tiny phantom, with a small MAKNet for a base. It "
    "shows only that everything runs: the numbers mean nothing",
}
# Fields that this script sets, and what to write instead; on a phantom it sets the trunk too.
OWN = {
    "seed": "use --seeds",
    "data.path": "use --data",
    "data.size": "it is that of the data",
    "init.path": "use --init",
}
TRUNK = dict.fromkeys(
    ("model.options.trunk", "model.options.trunk_options"), "the phantom's base is a small MAKNet"
)


def table3(workdir, data, inits, *, seeds=1, overrides=(), trunk=None, form="full", notes=()):
    """Trains and evaluates LesaNet from each base; what is finished is not repeated.

    Args:
      workdir: the folder of all runs and of the table.
      data: a data set of `prepare deeplesion --lesions` with train, val, test and hand.
      inits: name -> what `init.path` takes, "" for random weights.
      seeds: runs a base; the table has their means, the JSON each of them.
      overrides: strings `epochs=2` for configs/lesanet.py.
      trunk: (name, options) in the place of VGG16.
      form: full, small or quick, for the JSON.
      notes: sentences under the table.

    Returns:
      What `table3.json` holds.

    Raises:
      InputError: the data lack a split, or a base does not fit.
      Stopped: by a signal; the same call goes on.
    """
    workdir = pathlib.Path(workdir)
    dataset = records.open_dataset(data)
    for split in ("train", "val", *SETS):
        if not dataset.split(split)["count"]:
            raise InputError(f"{data} has no lesion in {split}: table 3 needs it, prepare it")
    runs = {}
    for name, path in inits.items():
        runs[name] = []
        for seed in range(seeds):
            changes = [*overrides, f"data.path={data}", f"data.size={dataset.size}"]
            page = configs.load("lesanet", [*changes, f"seed={seed}", f"init.path={path}"])
            if trunk:
                with page.unlocked():
                    page.model.options.trunk, page.model.options.trunk_options = trunk
            folder = workdir / f"lesanet-{name}-{seed}"
            console.Log().say(f"{folder}")
            train.train(page, folder)
            summary = evaluate.evaluate(folder, splits=list(SETS), rules="lesanet")
            runs[name].append(summary["splits"])
    result = harness.provenance("table3") | {"form": form, "runs": runs, "notes": list(notes)}
    result |= {"overrides": list(overrides), "bases": inits}
    rows = table_rows(runs)
    console.write_table(workdir / "table3.csv", HEADER, rows)
    cells = [
        ["-" if c is None else f"{c:.4f}" if isinstance(c, float) else c for c in row]
        for row in rows
    ]
    with files.write_whole(workdir / "table3.md") as file:
        file.write(console.markdown_table(HEADER, cells))
        file.write("".join(f"\n{note}.\n" for note in notes))
    files.write_json(workdir / "table3.json", result)
    print(console.format_table(HEADER, cells))
    for name, each in runs.items():
        found = ", ".join(f"{splits['test']['auc']:.4f}" for splits in each)
        print(f"{name}: AUC of each seed on {SETS['test']}: {found}")
    return result


def table_rows(runs):
    """A row a base, ours and the paper's where it has one: numbers in the order of `HEADER`.

    Args:
      runs: base -> a list of evaluated splits, one a seed.
    """
    rows = []
    for name, each in runs.items():
        means = []
        for split in SETS:
            for metric in METRICS:
                values = [splits[split][metric] for splits in each]
                means.append(None if None in values else statistics.fmean(values))
        rows.append([f"LesaNet ({name})", "ours", len(each), *means])
        if name in PAPER:
            numbers = [number for split in SETS for number in PAPER[name][split]]
            rows.append([f"LesaNet ({name})", "paper", 1, *numbers])
    return rows


def on_phantom(workdir, form, *, seeds, overrides=()):
    """The whole chain on a phantom: teacher, pseudo-labels, pre-training, LesaNet."""
    workdir, recipe = pathlib.Path(workdir), FORMS[form]
    size = recipe["size"]
    paths = phantom.open_phantom(workdir / "phantom", **recipe["phantom"])
    for name, patches in (("slices", False), ("lesions", True)):
        if not (workdir / name / "dataset.json").exists():
            prepare.prepare_deeplesion(
                out=workdir / name, size=size, patches=patches, **phantom.deeplesion_files(paths)
            )
    if not (workdir / "ct" / "dataset.json").exists():
        salt = workdir / "salt"
        prepare.prepare_dicom(
            paths["dicom"],
            workdir / "ct",
            salt_file=salt,
            min_slices=recipe["min_slices"],
            size=size,
        )
    own = [f"data.path={workdir / 'slices'}", f"data.size={size}"]
    train.train(configs.load("smoke", [*own, *recipe["teacher"]]), workdir / "teacher")
    pseudo_label.pseudo_label(workdir / "teacher", workdir / "ct", workdir / "pseudo")
    own.append(f"pseudo.path={workdir / 'pseudo'}")
    student = configs.load("smoke_student", [*own, *recipe["student"]])
    train.train(student, workdir / "pretrained")
    plain = student.model.options.to_dict() | {"dropout_rate": 0.0}
    inits = {"random": "", "pseudo-labels": str(workdir / "pretrained")}
    changes = [*recipe["lesanet"], *overrides]
    return table3(
        workdir,
        workdir / "lesions",
        inits,
        seeds=seeds,
        overrides=changes,
        trunk=("maknet", plain),
        form=form,
        notes=[NOTES[form]],
    )


def main(argv=None):
    """Parses, and makes the table."""
    parser = options.Parser(
        prog="benchmarks/experiments/table3.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--data", help="what `maknet prepare deeplesion --lesions` wrote")
    for name in FORMS:
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    parser.add_argument("--init", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--workdir", help="default: runs/table3, runs/table3-small or -quick")
    parser.add_argument("--seeds", type=options.count, help="default: 1, of --small 5")
    chosen, rest = parser.parse_known_args(argv)
    overrides = options.config_changes(parser, rest, OWN | (TRUNK if chosen.form else {}))
    if bool(chosen.init) != bool(chosen.data):
        parser.error("--data and --init NAME=PATH belong together")
    inits = {}
    for text in chosen.init:
        name, equals, path = text.partition("=")
        if not (name and equals and bool(path) == (name != "random")):
            parser.error(f"--init {text!r} should be NAME=PATH, or random= for random weights")
        if name in inits:
            parser.error(f"--init names {name!r} twice")
        inits[name] = path
    workdir = chosen.workdir or f"runs/table3{f'-{chosen.form}' if chosen.form else ''}"
    if chosen.form:
        seeds = chosen.seeds or {"small": 5, "quick": 1}[chosen.form]
        on_phantom(workdir, chosen.form, seeds=seeds, overrides=overrides)
    else:
        table3(workdir, chosen.data, inits, seeds=chosen.seeds or 1, overrides=overrides)


if __name__ == "__main__":
    harness.run(main)
