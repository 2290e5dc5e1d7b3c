"""Table 3 of the paper: LesaNet from ImageNet weights and from pseudo-labelled CT.

    python benchmarks/experiments/table3.py --data shards/lesions --seeds 1 \\
        --init imagenet=weights/vgg16.safetensors --init tcia=runs/vgg16-tcia
    python benchmarks/experiments/table3.py --small  # phantom, pseudo-labels against random weights
    python benchmarks/experiments/table3.py --quick  # tiny phantom, only to see it run

--data takes the output of `maknet prepare deeplesion --lesions`. Each `--init NAME=PATH` names the
initial weights of LesaNet's trunk; `random=` are random weights. imagenet and tcia get the paper's
rows beside them. It shows whether pre-training on pseudo-labelled CT helps LesaNet: in the paper it
raises hand-labelled F1 from 0.434 to 0.497. That has not been run on the full data set. --small
shows no gain (benchmarks/RESULTS.md). The runs of --small have no recorded duration: ten LesaNets,
a teacher and a student at 64 x 64.

Resumes if interrupted. --config.FIELD=VALUE changes other fields of configs/lesanet.py. Metrics
follow LesaNet's rules (`maknet evaluate --rules lesanet`). Writes WORKDIR/table3.md, .csv and
.json.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.experiments import paper_table
from benchmarks.experiments.paper_table import SETS
from maknet_jax import console, evaluate, phantom, prepare, pseudo_label, train
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
HEADER = ["base", "from", "seeds", *paper_table.COLUMNS]
# Form -> arguments of the phantom, pixels per side of slices and patches, changes of the configs.
FORMS: dict[str, dict[str, Any]] = {
    "small": {
        "phantom": {"patients": 60, "unlabelled_volumes": 12, "size": 96, "slices": 60},
        "size": 64,
        "teacher": ("epochs=20",),
        "student": ("epochs=20",),
        "lesanet": ("epochs=15", "data.batch_size=16", "optimizer.learning_rate=0.01"),
        "min_slices": 30,
        "seeds": 5,
    },
    "quick": {
        "phantom": {"patients": 8, "unlabelled_volumes": 1, "size": 64, "slices": 12},
        "size": 32,
        "teacher": ("epochs=1", "data.batch_size=8"),
        "student": ("epochs=1", "data.batch_size=8", "pseudo.batch_size=8"),
        "lesanet": ("epochs=1", "data.batch_size=8"),
        "min_slices": 1,
        "seeds": 1,
    },
}
NOTES = {
    "small": "SMALL FORM: a generated phantom with a small MAKNet as trunk. It shows that all "
    "stages run and what pre-training brings there; it says nothing about the paper's rows",
    "quick": "QUICK FORM: one epoch each on a tiny phantom, with a small MAKNet as trunk. It only "
    "shows that everything runs: the numbers are meaningless",
}
# Fields that this script sets, and what to use instead; with a phantom it sets the trunk too.
RESERVED = {
    "seed": "use --seeds",
    "data.path": "use --data",
    "data.size": "it is that of the data",
    "init.path": "use --init",
}
RESERVED_ON_PHANTOM = RESERVED | dict.fromkeys(
    ("model.options.trunk", "model.options.trunk_options"), "the phantom's trunk is a small MAKNet"
)


def table3(
    workdir: str | pathlib.Path,
    data: str | pathlib.Path,
    inits: Mapping[str, str],
    *,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    trunk: tuple[str, dict[str, Any]] | None = None,
    form: str = "full",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains and evaluates LesaNet from each initialization; skips finished runs.

    Args:
      workdir: folder of all runs and of the table.
      data: a data set of `prepare deeplesion --lesions` with train, val, test and hand.
      inits: name -> value of `init.path`, "" for random weights.
      seeds: runs per initialization. The table has their means, the JSON each run.
      overrides: changes of configs/lesanet.py, such as "epochs=2".
      trunk: (name, options) of the trunk; None for VGG16.
      form: "full", "small" or "quick", for the JSON.
      notes: sentences for the table.

    Returns:
      The content of `table3.json`.

    Raises:
      InputError: the data lack a split, or initial weights do not fit.
      Stopped: by a signal; the same call resumes.
    """
    workdir = pathlib.Path(workdir)
    dataset = records.open_dataset(data)
    for split in ("train", "val", *SETS):
        if not dataset.split(split)["count"]:
            raise InputError(
                f"{data} has no lesion in split {split!r}: table 3 needs it, prepare it"
            )
    runs: dict[str, list[paper_table.Splits]] = {}
    for name, path in inits.items():
        runs[name] = []
        for seed in range(seeds):
            changes = [*overrides, f"data.path={data}", f"data.size={dataset.size}"]
            config = configs.load("lesanet", [*changes, f"seed={seed}", f"init.path={path}"])
            if trunk:
                with config.unlocked():
                    config.model.options.trunk, config.model.options.trunk_options = trunk
            folder = workdir / f"lesanet-{name}-{seed}"
            console.Log().say(f"{folder}")
            train.train(config, folder)
            summary = evaluate.evaluate(folder, splits=list(SETS), rules="lesanet")
            runs[name].append(summary["splits"])
    result = harness.provenance("table3") | {"form": form, "runs": runs, "notes": list(notes)}
    result |= {"overrides": list(overrides), "bases": dict(inits)}
    paper_table.write(workdir, HEADER, table_rows(runs), result)
    for name, evaluations in runs.items():
        values = (splits["test"]["auc"] for splits in evaluations)
        listed = ", ".join("-" if value is None else f"{value:.4f}" for value in values)
        print(f"{name}: AUC of each seed on {SETS['test']}: {listed}")
    return result


def table_rows(runs: Mapping[str, Sequence[paper_table.Splits]]) -> list[list[Any]]:
    """A row per initialization, and the paper's if it has one, in the order of `HEADER`.

    Args:
      runs: initialization -> the evaluated splits of each seed.
    """
    rows: list[list[Any]] = []
    for name, evaluations in runs.items():
        means = [
            None if None in values else statistics.fmean(values)
            for values in zip(*map(paper_table.our_values, evaluations), strict=True)
        ]
        rows.append([f"LesaNet ({name})", "ours", len(evaluations), *means])
        if name in PAPER:
            rows.append([f"LesaNet ({name})", "paper", 1, *paper_table.paper_values(PAPER[name])])
    return rows


def on_phantom(
    workdir: str | pathlib.Path,
    form: str,
    *,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs all stages on a phantom: teacher, pseudo-labels, pre-training, LesaNet.

    Args:
      workdir: folder of all runs and of the table.
      form: a name in `FORMS`.
      seeds: see `table3`; None takes that of the form.
      overrides: changes of configs/lesanet.py.

    Returns:
      The result of `table3`.
    """
    workdir, recipe = pathlib.Path(workdir), FORMS[form]
    size = recipe["size"]
    paths = phantom.open_phantom(workdir / "phantom", **recipe["phantom"])
    for name, patches in (("slices", False), ("lesions", True)):
        if not (workdir / name / "dataset.json").exists():
            prepare.prepare_deeplesion(
                out=workdir / name, size=size, patches=patches, **phantom.deeplesion_files(paths)
            )
    if not (workdir / "ct" / "dataset.json").exists():
        prepare.prepare_dicom(
            paths["dicom"],
            workdir / "ct",
            salt_file=workdir / "salt",
            min_slices=recipe["min_slices"],
            size=size,
        )
    changes = [f"data.path={workdir / 'slices'}", f"data.size={size}"]
    train.train(configs.load("smoke", [*changes, *recipe["teacher"]]), workdir / "teacher")
    pseudo_label.pseudo_label(workdir / "teacher", workdir / "ct", workdir / "pseudo")
    changes.append(f"pseudo.path={workdir / 'pseudo'}")
    student = configs.load("smoke_student", [*changes, *recipe["student"]])
    train.train(student, workdir / "pretrained")
    trunk_options = student.model.options.to_dict() | {"dropout_rate": 0.0}
    return table3(
        workdir,
        workdir / "lesions",
        {"random": "", "pseudo-labels": str(workdir / "pretrained")},
        seeds=seeds or recipe["seeds"],
        overrides=[*recipe["lesanet"], *overrides],
        trunk=("maknet", trunk_options),
        form=form,
        notes=[NOTES[form]],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and writes the table."""
    parser = paper_table.parser(
        __file__, __doc__, data_help="output of `maknet prepare deeplesion --lesions`"
    )
    parser.add_argument(
        "--init", action="append", default=[], metavar="NAME=PATH", help="initial weights"
    )
    parser.add_argument(
        "--seeds", type=options.count, help="runs per initialization (default: 1; with --small 5)"
    )
    chosen, rest = parser.parse_known_args(argv)
    reserved = RESERVED_ON_PHANTOM if chosen.form else RESERVED
    overrides = options.config_changes(parser, rest, reserved)
    if bool(chosen.init) != bool(chosen.data):
        parser.error("--data and --init NAME=PATH need each other: pass both or neither")
    inits: dict[str, str] = {}
    for text in chosen.init:
        name, equals, path = text.partition("=")
        if not (name and equals and bool(path) == (name != "random")):
            parser.error(f"--init {text!r} should be NAME=PATH, or random= for random weights")
        if name in inits:
            parser.error(f"--init names {name!r} twice")
        inits[name] = path
    workdir = paper_table.workdir(__file__, chosen)
    if chosen.form:
        on_phantom(workdir, chosen.form, seeds=chosen.seeds, overrides=overrides)
    else:
        table3(workdir, chosen.data, inits, seeds=chosen.seeds or 1, overrides=overrides)


if __name__ == "__main__":
    harness.run(main)
