"""Table 1 of the paper: VGG16, ResNet18 and MAKNet with one recipe, beside the paper's rows.

    python benchmarks/experiments/table1.py --data shards/deeplesion --workdir runs/table1
    python benchmarks/experiments/table1.py --small  # phantom at 96 x 96: 18 minutes on two cores
    python benchmarks/experiments/table1.py --quick  # tiny phantom: 2 minutes, only to see it run

--data takes the output of `maknet prepare deeplesion` and trains the full recipe of the configs. It
shows whether MAKNet is ahead of both baselines, as in the paper (hand-labelled AUC 0.910 against
0.903 and 0.902); the full data set has not been run. Expect no such order from --small: there
MAKNet came last (benchmarks/RESULTS.md).

Resumes if interrupted. --config.FIELD=VALUE changes other fields of the three configs. Writes
WORKDIR/table1.md, .csv and .json next to the runs.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from benchmarks import harness
from benchmarks.experiments import paper_table
from benchmarks.experiments.paper_table import SETS
from maknet_jax import console, evaluate, files, phantom, prepare, train
from maknet_jax.cli import options
from maknet_jax.data import deeplesion, records
from maknet_jax.errors import InputError
from maknet_jax.model_table import CONFIGS, PAPER_MILLIONS
from maknet_jax.runs import config as configs

TITLES = {"vgg16": "VGG16", "resnet18": "ResNet18", "maknet": "MAKNet"}  # in the paper's order
PAPER = {
    "vgg16": {"test": (0.8912, 0.1813, 0.4826, 0.4740), "hand": (0.9030, 0.2442, 0.4882, 0.5476)},
    "resnet18": {
        "test": (0.8987, 0.1991, 0.4285, 0.4736),
        "hand": (0.9024, 0.2699, 0.4503, 0.5759),
    },
    "maknet": {"test": (0.9051, 0.2078, 0.4696, 0.4744), "hand": (0.9101, 0.2755, 0.4638, 0.5780)},
}
HEADER = ["", "from", "parameters", *paper_table.COLUMNS]
# Form -> arguments of the phantom (None: the user's data), changes of the configs, note.
FORMS: dict[str, tuple[dict[str, int] | None, tuple[str, ...], str]] = {
    "full": (None, (), "the recipe of the configs"),
    "small": (
        {"patients": 100, "unlabelled_volumes": 0, "size": 128, "lesions_per_patient": 6},
        # At least 96 pixels: at 64 the last feature maps of ResNet18 are 2 x 2, where XLA's
        # convolution on CPU is tens of times slower.
        ("data.size=96", "data.batch_size=16", "epochs=4"),
        "SMALL FORM: a generated phantom, small images, few epochs, one seed, the networks in full "
        "width. It shows that the three train with one recipe; it says little about their order "
        "and nothing about the paper's rows",
    ),
    "quick": (
        {"patients": 12, "unlabelled_volumes": 0, "size": 64},
        ("data.size=32", "data.batch_size=16", "epochs=1"),
        "QUICK FORM: three training steps on a tiny phantom, the networks in full width. It only "
        "shows that everything runs: the numbers are meaningless",
    ),
}
# Fields that this script sets, and what to use instead.
RESERVED = {
    "seed": "use --seed",
    "data.path": "use --data",
    "model.name": "the table compares three networks",
}


def table1(
    workdir: str | pathlib.Path,
    *,
    data: str | pathlib.Path | None = None,
    form: str = "full",
    seed: int = 0,
    overrides: Sequence[str] = (),
    config_names: Mapping[str, str] = CONFIGS,
) -> dict[str, Any]:
    """Trains and evaluates the networks and writes the table; skips finished runs.

    Args:
      workdir: folder of the three runs and of the table.
      data: the prepared data set; the forms small and quick prepare it in `workdir`.
      form: "full", "small" or "quick".
      seed: of the weights, the order of the examples and the phantom.
      overrides: changes of all three configs, such as "epochs=2".
      config_names: network -> config.

    Returns:
      The content of `table1.json`.

    Raises:
      InputError: the data lack a split, an override does not fit all three configs, or `workdir`
        holds the phantom of another seed.
      Stopped: by a signal; the same call resumes.
    """
    workdir = pathlib.Path(workdir)
    phantom_arguments, changes, note = FORMS[form]
    if data is None or phantom_arguments:
        data = workdir / "shards"
    changes = (*changes, *overrides, f"seed={seed}", f"data.path={data}")
    recipes = {name: configs.load(config_names[name], changes) for name in PAPER}
    recipe = recipes["maknet"]
    if phantom_arguments:
        paths = phantom.open_phantom(workdir / "phantom", seed=seed, **phantom_arguments)
        if not (workdir / "shards" / "dataset.json").exists():
            source = phantom.deeplesion_files(paths)
            prepare.prepare_deeplesion(out=data, size=recipe.data.size, **source)
    dataset = records.open_dataset(data)
    counts = {split: dataset.split(split)["count"] for split in ("train", "val", *SETS)}
    if not all(counts.values()):
        raise InputError(f"{data} has splits {counts}: table 1 needs all four, prepare them")
    networks = {name: _run(recipes[name], workdir / name) for name in PAPER}
    notes = [
        note + (f"; changed: {', '.join(overrides)}" if overrides else ""),
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
    write(workdir, result)
    return result


def _run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """Trains and evaluates one network."""
    console.Log().say(f"{folder}")
    train.train(config, folder)
    trained = files.read_json(folder / "summary.json")  # written by the machine that trained
    evaluated = evaluate.evaluate(folder)
    return {
        "workdir": str(folder),
        "parameters": trained["parameters"],
        "devices": trained["devices"],
        "images_per_second": trained["images_per_second"],
        "checkpoint_step": evaluated["step"],
        "splits": evaluated["splits"],
    }


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in counts.items())


def table_rows(networks: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Two rows per network, ours and the paper's, in the order of `HEADER`.

    Args:
      networks: name -> parameters and splits, as in the result of `table1`.
    """
    rows = []
    for name, title in TITLES.items():
        ours = paper_table.our_values(networks[name]["splits"])
        paper = paper_table.paper_values(PAPER[name])
        rows.append([title, "ours", networks[name]["parameters"], *ours])
        rows.append([title, "paper", round(PAPER_MILLIONS[name] * 1e6), *paper])
    return rows


def write(workdir: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes and prints the table of a result of `table1`."""
    rows = table_rows(result["networks"])
    paper_table.write(
        workdir, HEADER, rows, result, format_int=lambda count: f"{count / 1e6:.2f} M"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and writes the table."""
    parser = paper_table.parser(
        __file__, __doc__, data_help="output of `maknet prepare deeplesion`: the full recipe"
    )
    parser.usage = (
        "%(prog)s (--data DIR | --small | --quick) [--workdir DIR] [--seed N] "
        "[--config.FIELD=VALUE ...]"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    chosen, rest = parser.parse_known_args(argv)
    overrides = options.config_changes(parser, rest, RESERVED)
    if chosen.seed < 0:
        parser.error(f"--seed {chosen.seed} should be 0 or above")
    table1(
        paper_table.workdir(__file__, chosen),
        data=chosen.data,
        form=chosen.form or "full",
        seed=chosen.seed,
        overrides=overrides,
    )


if __name__ == "__main__":
    harness.run(main)
