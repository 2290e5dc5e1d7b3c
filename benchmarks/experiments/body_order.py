"""Learns the position of a slice in the body from real slices whose order is known.

    python benchmarks/experiments/body_order.py          # five folds, five networks
    python benchmarks/experiments/body_order.py --quick  # two folds, few epochs, only to see it run
    python benchmarks/experiments/body_order.py --table FOLDER slices.csv  # for `prepare table`
    python benchmarks/experiments/body_order.py --train FOLDER --predict OTHER --out positions.csv

Slices are 8-bit PNGs named RANK_score_SCORE_PATIENT_STUDY_SERIES_SLICE.png, with ranks from neck to
thigh. Label k means that a slice lies beyond threshold k of the body; the mean confidence is its
position, from 0 to 1. The first form compares training from random weights, from weights
pre-trained on a phantom or on the organs of OpenKBP's patients, and as noisy students of these two,
by Spearman correlation in folds by patient; the interval of all held-out slices is a bootstrap over
slices. The last form trains on one folder and writes the positions of the slices of another. The
recipe is configs/body_order.py.

For results see benchmarks/RESULTS.md. The full form pre-trains twice and trains 25 networks. It
needs the real data (data/README.md) and resumes in --workdir if interrupted.
"""

import argparse
import csv
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from benchmarks import harness
from benchmarks.experiments import patients
from benchmarks.experiments.ranked_slices import (
    COLUMNS,
    NAME,
    THRESHOLDS,
    Row,
    Slice,
    correlation,
    correlation_interval,
    cumulative_labels,
    labelled_rows,
    make_folds,
    places,
    png_files,
    read_slices,
    unlabelled_rows,
)
from benchmarks.real_data import DATA
from maknet_jax import console, phantom, predict, prepare, pseudo_label, train
from maknet_jax.cli import options
from maknet_jax.ct import volumes
from maknet_jax.errors import InputError, Rejected
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir

CONFIG = "body_order"
UNLABELLED = ("nifti/torso_112/example_ct.nii.gz", "dicom/liver_j2k_20", "deeplesion")
# The phantom and its changes of the config: it has many images, and each tissue has the same HU in
# all of them, unlike in real ones.
PHANTOM = {"patients": 200, "unlabelled_volumes": 0}
HEIGHTS = (0.25 + 0.7 * 0.08, 0.25 + 0.7 * 0.92)  # of the phantom, shoulders to thighs
OPENKBP = ("epochs=12.0", "data.batch_size=32", "evaluate_every=2.0")
PRETRAINING = ("epochs=16.0", "data.batch_size=32", "augment.contrast_probability=0.5")
FULL: dict[str, Any] = {
    "folds": 5,
    "phantom": PHANTOM,
    "pretraining": PRETRAINING,
    "openkbp": OPENKBP,
    "changes": (),
}
QUICK: dict[str, Any] = {
    "folds": 2,
    "phantom": PHANTOM | {"patients": 20},
    "pretraining": (*PRETRAINING, "epochs=4.0"),
    "openkbp": (*OPENKBP, "epochs=0.1"),
    "changes": ("epochs=10.0",),
}
TITLES = {
    "random": "random weights",
    "phantom": "pre-trained on the phantom",
    "student": "noisy student of the pre-trained network",
    "openkbp": "pre-trained on OpenKBP's organs",
    "openkbp-student": "noisy student of that network, OpenKBP's slices unlabelled",
}
PRETRAINED_ON_OPENKBP = ("openkbp", "openkbp-student")


def _prepare(rows: Sequence[Row], folder: pathlib.Path, config: ml_collections.ConfigDict) -> str:
    """Prepares a table in `folder` if not yet done; returns the config change `data.path=...`."""
    if not (folder / "shards" / "dataset.json").exists():
        console.write_table(folder / "slices.csv", COLUMNS, rows)
        window = tuple(config.data.window)
        prepare.prepare_table(
            folder / "slices.csv", folder / "shards", png_window=window, size=config.data.size
        )
    return f"data.path={folder / 'shards'}"


def pretrain(folder: pathlib.Path, *, seed: int, settings: dict[str, Any]) -> pathlib.Path:
    """Trains on the key slices of a phantom, labelled by their height; returns the workdir."""
    arguments = settings["phantom"] | {"seed": seed}
    paths = phantom.open_phantom(folder / "phantom", **arguments)
    with paths["info"].open(newline="", encoding="utf-8") as file:
        keys = {row["File_name"]: row for row in csv.DictReader(file)}
    heights = {
        name: float(row["Normalized_lesion_location"].rpartition(",")[2])
        for name, row in keys.items()
    }
    keys = {name: row for name, row in keys.items() if HEIGHTS[0] < heights[name] < HEIGHTS[1]}
    rows: list[Row] = []
    order = places([heights[name] for name in keys])
    for row, place in zip(keys.values(), order, strict=True):
        series, _, file_name = row["File_name"].rpartition("_")
        path = (paths["images"] / series / file_name).absolute()
        rows.append((str(path), cumulative_labels(place), "train", "", row["Patient_index"]))
    changes = (*settings["changes"], *settings["pretraining"], f"seed={seed}")
    data = _prepare(rows, folder, configs.load(CONFIG, changes))
    train.train(configs.load(CONFIG, (*changes, data)), folder / "run")
    return folder / "run"


def pretrain_on_organs(
    folder: pathlib.Path, *, seed: int, settings: dict[str, Any], openkbp: str | pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
    """Trains on the organs of OpenKBP's patients; returns (workdir, prepared data)."""
    config = configs.load(CONFIG, settings["changes"])
    data = patients.prepare_data(openkbp, folder / "shards", config.data.size)
    changes = (*settings["changes"], *settings["openkbp"], f"seed={seed}", f"data.path={data}")
    train.train(configs.load(CONFIG, changes), folder / "run")
    return folder / "run", data


def train_student(
    changes: Sequence[str],
    folder: pathlib.Path,
    teacher: pathlib.Path,
    unlabelled: pathlib.Path | None = None,
) -> pathlib.Path:
    """Trains a student in `folder` on pseudo-labels of `teacher`; returns the workdir.

    Args:
      changes: of the config.
      folder: of the pseudo-labels and the run.
      teacher: its workdir.
      unlabelled: a data set whose split `train` is labelled; None takes the split `unlabelled` of
        the student's own data.
    """
    config = configs.load(CONFIG, changes)
    pseudo_label.pseudo_label(
        teacher,
        unlabelled or config.data.path,
        folder / "pseudo",
        split="train" if unlabelled else "unlabelled",
        top=THRESHOLDS,
        checkpoint="last",
    )
    student_changes = (*changes, f"pseudo.path={folder / 'pseudo'}")
    train.train(configs.load(CONFIG, student_changes), folder / "run")
    return folder / "run"


def place_slices(
    folder: pathlib.Path, paths: Sequence[pathlib.Path]
) -> tuple[dict[pathlib.Path, float], list[tuple[str, str]]]:
    """Positions of slices by a trained network.

    Args:
      folder: its workdir.
      paths: PNGs.

    Returns:
      (positions, failures): path -> 0 to 1, and (path, reason) of the rejected files.
    """
    run = workdir.open_run(folder, checkpoint_name="last")
    window = run.window
    positions: dict[pathlib.Path, float] = {}
    failures: list[tuple[str, str]] = []
    for path in paths:
        try:
            volume, centre = volumes.load_series_of(path, png_window=window)
        except Rejected as error:
            failures.append((str(path), str(error)))
            continue
        scores = predict.score_volume(run, volume, 1, window)
        positions[path] = float(scores[centre].mean())
    return positions, failures


def cross_validate(
    slices: Sequence[Slice],
    unlabelled: Sequence[Row],
    folder: pathlib.Path,
    *,
    seed: int,
    settings: dict[str, Any],
    networks: Sequence[str] = tuple(TITLES),
    openkbp: str | pathlib.Path = patients.PATIENTS,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Positions of slices by networks trained on other patients; skips finished runs.

    Args:
      slices: see `read_slices`.
      unlabelled: rows of unlabelled slices of other patients.
      folder: folder of all runs.
      seed: of the folds, the phantom and all runs.
      settings: `FULL`, `QUICK` or a variant.
      networks: names in `TITLES`.
      openkbp: OpenKBP's folder.

    Returns:
      (folds `[N]`, network -> positions `[N]`).
    """
    folds = make_folds(slices, settings["folds"], seed)
    positions = {name: np.full(len(slices), np.nan) for name in networks}
    pretrained = None
    if set(networks) & {"phantom", "student"}:
        pretrained = pretrain(folder / "phantom", seed=seed, settings=settings)
    on_organs = neck = None
    if set(networks) & set(PRETRAINED_ON_OPENKBP):
        on_organs, neck = pretrain_on_organs(
            folder / "openkbp", seed=seed, settings=settings, openkbp=openkbp
        )
    for fold in range(settings["folds"]):
        held_out = [one for one, number in zip(slices, folds, strict=True) if number == fold]
        training = [one for one, number in zip(slices, folds, strict=True) if number != fold]
        part = folder / f"fold-{fold}"
        changes = (*settings["changes"], f"seed={seed}")
        data = _prepare(
            [*labelled_rows(training), *unlabelled], part, configs.load(CONFIG, changes)
        )
        for name in networks:
            run, network_changes = part / name, (*changes, data)
            if name in ("phantom", "student"):
                init = (f"init.path={pretrained}", "init.head=True")
                network_changes = (*network_changes, *init)
            if name in PRETRAINED_ON_OPENKBP:
                network_changes = (*network_changes, f"init.path={on_organs}")
            if name == "student":
                run = train_student(network_changes, run, part / "phantom")
            elif name == "openkbp-student":
                run = train_student(network_changes, run, part / "openkbp", neck)
            else:
                train.train(configs.load(CONFIG, network_changes), run)
            placed, _ = place_slices(run, [one.path for one in held_out])
            positions[name][folds == fold] = [placed[one.path] for one in held_out]
    return folds, positions


def benchmark(chosen: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Runs all folds, prints the table and writes the JSON."""
    settings = QUICK if chosen.quick else FULL
    slices = read_slices(chosen.slices)
    unlabelled = unlabelled_rows(chosen.unlabelled, {one.patient for one in slices})
    ranks = np.array([one.rank for one in slices])
    with harness.run_folder(chosen.workdir) as folder:
        folds, positions_by_network = cross_validate(
            slices,
            unlabelled,
            folder,
            seed=chosen.seed,
            settings=settings,
            networks=chosen.networks,
            openkbp=chosen.patients,
        )
    rows: list[list[str]] = []
    results: dict[str, dict[str, Any]] = {}
    for name, positions in positions_by_network.items():
        by_fold = [correlation(positions[folds == k], ranks[folds == k]) for k in set(folds)]
        defined = [value for value in by_fold if value is not None]
        results[name] = {
            "pooled": correlation(positions, ranks),
            "interval": correlation_interval(positions, ranks),
            "folds": by_fold,
            "positions": [round(float(value), 4) for value in positions],
        }
        pooled = results[name]["pooled"]
        mean = f"{statistics.mean(defined):.3f} ({min(defined):.3f} to {max(defined):.3f})"
        low, high = results[name]["interval"]
        all_slices = "-" if pooled is None else f"{pooled:.3f} ({low:.3f} to {high:.3f})"
        rows.append([TITLES[name], all_slices, mean])
    harness.report(
        __file__,
        argv,
        chosen,
        ["MAKNet", "Spearman, all held-out slices", "mean of folds"],
        rows,
        [
            f"{len(slices)} slices, {len({one.patient for one in slices})} patients, "
            f"{settings['folds']} folds by patient, seed {chosen.seed}; "
            f"{len(unlabelled)} unlabelled slices of other patients",
            *(["QUICK FORM: few epochs, two folds: the numbers are meaningless"] * chosen.quick),
        ],
        {
            "recipe": settings,
            "slices": [one.path.name for one in slices],
            "folds": folds.tolist(),
            "networks": results,
        },
    )


def train_and_predict(chosen: argparse.Namespace) -> int:
    """Trains on the slices of one folder, writes the positions of another's; returns an exit code.

    Starts from random weights, because pre-training on the phantom brings no gain in the folds.
    """
    changes, out = (QUICK if chosen.quick else FULL)["changes"], pathlib.Path(chosen.out)
    slices, targets = read_slices(chosen.train), png_files(chosen.predict)
    log = console.Log()
    with harness.run_folder(chosen.workdir) as folder:
        log.say(f"1/2 train on {len(slices)} slices of {chosen.train}")
        changes = (*changes, f"seed={chosen.seed}")
        data = _prepare(labelled_rows(slices), folder, configs.load(CONFIG, changes))
        train.train(configs.load(CONFIG, (*changes, data)), folder / "run")
        log.say(f"2/2 place {len(targets)} slices of {chosen.predict}")
        placed, failures = place_slices(folder / "run", targets)
    if not placed:
        raise InputError(f"no slice in {chosen.predict} can be read: {failures[0][1]}")
    table = [(path.name, round(position, 6)) for path, position in placed.items()]
    console.write_table(out, ("file", "position"), table)
    console.write_failures(out.with_suffix(".failures.csv"), failures)
    matches = [NAME.fullmatch(path.name) for path in placed]
    print(f"{len(placed)} positions, {len(failures)} slices rejected: {out}")
    ranks = [int(match[1]) for match in matches if match]
    value = correlation(list(placed.values()), ranks) if len(ranks) == len(placed) > 2 else None
    if value is not None:
        print(f"Spearman correlation with the ranks in the names: {value:.4f}")
    return options.SOME_REJECTED if failures else options.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one form; returns the exit code."""
    parser = harness.command_parser(__file__, __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two folds, few epochs, only to see it run"
    )
    parser.add_argument("--slices", default=str(DATA / "body_part_ordinal"), help="ranked slices")
    parser.add_argument(
        "--unlabelled",
        nargs="*",
        default=[str(DATA / path) for path in UNLABELLED],
        help="files or folders of CT for the student",
    )
    parser.add_argument(
        "--table", nargs=2, metavar=("FOLDER", "CSV"), help="only write the CSV for `prepare table`"
    )
    parser.add_argument(
        "--networks",
        type=harness.words,
        help=f"any of {','.join(TITLES)} (default: all)",
    )
    parser.add_argument("--patients", default=str(patients.PATIENTS), help="OpenKBP's folder")
    parser.add_argument("--train", metavar="FOLDER", help="ranked slices to train on")
    parser.add_argument(
        "--predict", metavar="FOLDER", help="slices to place after --train; --out is their CSV"
    )
    harness.add_output_options(parser)
    parser.add_argument("--workdir", help="keep the runs and resume there (default: temporary)")
    parser.add_argument(
        "--seed", type=int, default=5, help="default: 5; the recipe was chosen on 0 to 4"
    )
    chosen = harness.parse(parser, argv, full={"networks": list(TITLES)}, quick={})
    for name in chosen.networks:
        if name not in TITLES:
            parser.error(f"network {name!r} is unknown: choose from {', '.join(TITLES)}")
    if chosen.seed < 0:
        parser.error(f"--seed {chosen.seed} should be 0 or above")
    if bool(chosen.train) != bool(chosen.predict) or (chosen.train and not chosen.out):
        parser.error("--train, --predict and --out CSV need each other: pass all three")
    if chosen.table:
        console.write_table(chosen.table[1], COLUMNS, labelled_rows(read_slices(chosen.table[0])))
    elif chosen.train:
        return train_and_predict(chosen)
    else:
        benchmark(chosen, argv)
    return options.DONE


if __name__ == "__main__":
    harness.run(main)
