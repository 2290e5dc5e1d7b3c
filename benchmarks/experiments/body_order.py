"""Body order: where in the body a slice lies, learned from real slices whose order is known.

    python benchmarks/experiments/body_order.py                   # five folds, three networks
    python benchmarks/experiments/body_order.py --quick  # two folds, few epochs: only that it runs
    python benchmarks/experiments/body_order.py --table FOLDER slices.csv  # a CSV
    python benchmarks/experiments/body_order.py --train FOLDER --predict OTHER --out positions.csv

Slices are 8-bit PNGs called RANK_score_SCORE_PATIENT_STUDY_SERIES_SLICE.png, from neck to thigh.
Label k says that a slice lies beyond threshold k; the mean of the confidences is its position, 0 to
1. The last form trains on one folder and writes the positions of another, whatever its names. All
of it keeps to the recipe of configs/body_order.py.
"""

import argparse
import csv
import dataclasses
import pathlib
import re
import statistics

import numpy as np
from scipy import stats

from benchmarks import harness
from benchmarks.real_data import DATA
from maknet_jax import console, phantom, predict, prepare, pseudo_label, train
from maknet_jax.cli import options
from maknet_jax.ct import search, volumes
from maknet_jax.errors import InputError, Rejected
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir

PAGE = "body_order"
THRESHOLDS = 19  # labels: beyond 5 %, 10 % .. 95 % of the body
NAME = re.compile(r"(\d+)_score_-?\d+(?:\.\d+)?_(\d+)_.*\.png", re.IGNORECASE)
PATIENT = re.compile(r"(\d{6})_\d{2}_\d{2}")  # of DeepLesion's files and folders
COLUMNS = ("path", "labels", "split", "slice", "patient")
UNLABELLED = ("nifti/torso_112/example_ct.nii.gz", "dicom/liver_j2k_20", "deeplesion")
# The phantom, and what its training changes in the page: its images are many and all alike in
# their tissues' HU, real ones are not.
PHANTOM = {"patients": 200, "unlabelled_volumes": 0}
SHOWN = (0.25 + 0.7 * 0.08, 0.25 + 0.7 * 0.92)  # shoulders to thighs
PRETRAINING = ("epochs=16.0", "data.batch_size=32", "augment.contrast_probability=0.5")
FULL = {"folds": 5, "phantom": PHANTOM, "pretraining": PRETRAINING, "changes": ()}
QUICK = {
    "folds": 2,
    "phantom": PHANTOM | {"patients": 20},
    "pretraining": (*PRETRAINING, "epochs=4.0"),
    "changes": ("epochs=10.0",),
}
TITLES = {
    "random": "random weights",
    "phantom": "pre-trained on the phantom",
    "student": "noisy student of that",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A picture whose place in the order of the body is known; `patient` is in its name too."""

    path: pathlib.Path
    rank: int
    patient: str


def pictures(folder):
    """The PNGs right in a folder, by name.

    Raises:
      InputError: there is none.
    """
    folder = pathlib.Path(folder).absolute()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in found if re.fullmatch(r"[^.].*\.png", path.name, re.IGNORECASE)]
    if not found:
        raise InputError(f"{folder} holds no PNG: give a folder of slices")
    return found


def read_slices(folder):
    """The slices of a folder from neck to thigh.

    Raises:
      InputError: a name tells no rank, or all tell the same.
    """
    found = []
    for path in pictures(folder):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise InputError(
                f"{path} tells no rank: call it RANK_score_SCORE_PATIENT_STUDY_SERIES_SLICE.png"
            )
        found.append(Slice(path, int(match[1]), match[2]))
    if len({one.rank for one in found}) < 2:
        raise InputError(f"{folder} has one rank only: an order needs slices of two ranks or more")
    return sorted(found, key=lambda one: one.rank)


def places(values):
    """The order of numbers as floats `[N]` from 0 (the lowest) to 1; equal ones share a place."""
    ranks = stats.rankdata(values)
    return (ranks - ranks.min()) / (ranks.max() - ranks.min())


def cumulative_labels(place):
    """The names of the thresholds that a place in 0..1 lies beyond, as a cell of the table."""
    marks = [number / (THRESHOLDS + 1) for number in range(1, THRESHOLDS + 1)]
    return "|".join(f"beyond {100 * mark:02.0f} %" for mark in marks if place > mark)


def labelled_rows(slices, split="train"):
    """Rows of `prepare table` for slices of known order."""
    names = [cumulative_labels(place) for place in places([one.rank for one in slices])]
    return [
        (str(one.path), name, split, "", one.patient)
        for one, name in zip(slices, names, strict=True)
    ]


def unlabelled_rows(paths, patients):
    """Rows of every slice of CT under `paths`, but for those of `patients`."""
    rows = []
    for path in paths:
        for ref in search.find_series(path)[0]:
            if ref.kind == "nifti":
                named = [(ref.paths[0], number) for number in range(ref.count)]
            else:
                named = [(file, "") for file in ref.paths]
            for file, number in named:
                match = PATIENT.search(file)
                if match is None or match[1] not in patients:
                    rows.append((str(pathlib.Path(file).absolute()), "", "unlabelled", number, ""))
    return rows


def make_folds(slices, count, seed):
    """The number of each slice's fold: every patient lies in one, every fold spans the body."""
    rng, fold_of, left = np.random.default_rng(seed), {}, []
    for one in slices:
        if one.patient not in fold_of:
            left = left or rng.permutation(count).tolist()
            fold_of[one.patient] = left.pop()
    return np.array([fold_of[one.patient] for one in slices])


def correlation(positions, ranks):
    """Spearman's rank correlation, or None where it is not defined."""
    value = stats.spearmanr(positions, ranks).statistic if len(set(positions)) > 1 else np.nan
    return None if np.isnan(value) else float(value)


def _prepare(rows, folder, page):
    """Prepares a table in `folder`, unless that was done; returns the page with its data."""
    if not (folder / "shards" / "dataset.json").exists():
        console.write_table(folder / "slices.csv", COLUMNS, rows)
        window = tuple(page.data.window)
        prepare.prepare_table(
            folder / "slices.csv", folder / "shards", png_window=window, size=page.data.size
        )
    return f"data.path={folder / 'shards'}"


def pretrain(folder, *, seed, settings):
    """Trains on the phantom, whose key slices tell how far down the body they lie; a workdir."""
    arguments = settings["phantom"] | {"seed": seed}
    paths = phantom.open_phantom(folder / "phantom", **arguments)
    with paths["info"].open(newline="", encoding="utf-8") as file:
        keys = {row["File_name"]: row for row in csv.DictReader(file)}
    heights = [row["Normalized_lesion_location"].rpartition(",")[2] for row in keys.values()]
    heights = dict(zip(keys, np.array(heights, float), strict=True))
    keys = {name: row for name, row in keys.items() if SHOWN[0] < heights[name] < SHOWN[1]}
    rows = []
    order = places([heights[name] for name in keys])
    for row, place in zip(keys.values(), order, strict=True):
        series, _, picture = row["File_name"].rpartition("_")
        path = (paths["images"] / series / picture).absolute()
        rows.append((path, cumulative_labels(place), "train", "", row["Patient_index"]))
    changes = (*settings["changes"], *settings["pretraining"], f"seed={seed}")
    data = _prepare(rows, folder, configs.load(PAGE, changes))
    train.train(configs.load(PAGE, (*changes, data)), folder / "run")
    return folder / "run"


def make_student(page_changes, folder, teacher):
    """A student in `folder` from the pseudo-labels of `teacher`, on the teacher's data."""
    page = configs.load(PAGE, page_changes)
    pseudo_label.pseudo_label(
        teacher, page.data.path, folder / "pseudo", top=THRESHOLDS, checkpoint="last"
    )
    changes = (*page_changes, f"pseudo.path={folder / 'pseudo'}")
    train.train(configs.load(PAGE, changes), folder / "run")
    return folder / "run"


def place_slices(folder, paths):
    """Positions of slices by a trained network.

    Args:
      folder: its workdir.
      paths: of PNGs.

    Returns:
      (positions, failures): path -> 0 to 1, and (path, reason) of what cannot be read.
    """
    run = workdir.open_run(folder, checkpoint_name="last")
    window, found, failures = run.window, {}, []
    for path in paths:
        try:
            volume, centre = volumes.load_series_of(path, png_window=window)
        except Rejected as error:
            failures.append((str(path), str(error)))
            continue
        scores = predict.score_volume(run, volume, 1, window)
        found[path] = float(scores[centre].mean())
    return found, failures


def cross_validate(slices, others, folder, *, seed, settings, networks=tuple(TITLES)):
    """Positions of slices by networks that saw neither them nor their patients.

    Args:
      slices: as `read_slices` gives them.
      others: rows of unlabelled slices, of other patients.
      folder: where all runs lie; what is finished there is not repeated.
      seed: of the folds, the phantom and all trainings.
      settings: `FULL`, or some like it.
      networks: which of `TITLES`.

    Returns:
      (fold of each slice, name of the network -> positions `[N]`).
    """
    folds = make_folds(slices, settings["folds"], seed)
    found = {name: np.full(len(slices), np.nan) for name in networks}
    pretrained = None
    if set(networks) - {"random"}:
        pretrained = pretrain(folder / "phantom", seed=seed, settings=settings)
    for fold in range(settings["folds"]):
        held_out = [one for one, number in zip(slices, folds, strict=True) if number == fold]
        seen = [one for one, number in zip(slices, folds, strict=True) if number != fold]
        part = folder / f"fold-{fold}"
        changes = (*settings["changes"], f"seed={seed}")
        data = _prepare([*labelled_rows(seen), *others], part, configs.load(PAGE, changes))
        for name in networks:
            run, own = part / name, (*changes, data)
            if name != "random":
                own = (*own, f"init.path={pretrained}", "init.head=True")
            if name == "student":
                run = make_student(own, run, part / "phantom")
            else:
                train.train(configs.load(PAGE, own), run)
            placed, _ = place_slices(run, [one.path for one in held_out])
            found[name][folds == fold] = [placed[one.path] for one in held_out]
    return folds, found


def benchmark(chosen, argv):
    """All folds, the table and the JSON."""
    settings = QUICK if chosen.quick else FULL
    slices = read_slices(chosen.slices)
    others = unlabelled_rows(chosen.unlabelled, {one.patient for one in slices})
    ranks = np.array([one.rank for one in slices])
    with harness.kept(chosen.workdir) as folder:
        folds, found = cross_validate(slices, others, folder, seed=chosen.seed, settings=settings)
    rows, results = [], {}
    for name, positions in found.items():
        by_fold = [correlation(positions[folds == k], ranks[folds == k]) for k in set(folds)]
        known = [value for value in by_fold if value is not None]
        results[name] = {
            "pooled": correlation(positions, ranks),
            "folds": by_fold,
            "positions": [round(float(value), 4) for value in positions],
        }
        pooled = results[name]["pooled"]
        mean = f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})"
        rows.append([TITLES[name], "-" if pooled is None else f"{pooled:.3f}", mean])
    harness.report(
        __file__,
        argv,
        chosen,
        ["MAKNet", "Spearman, all held-out slices", "mean of the folds"],
        rows,
        [
            f"{len(slices)} slices, {len({one.patient for one in slices})} patients, "
            f"{settings['folds']} folds of patients, seed {chosen.seed}; "
            f"{len(others)} unlabelled slices of other patients",
            *(["QUICK FORM: few epochs, two folds: the numbers mean nothing"] * chosen.quick),
        ],
        {
            "recipe": {key: value for key, value in settings.items()},
            "slices": [one.path.name for one in slices],
            "folds": folds.tolist(),
            "networks": results,
        },
    )


def train_and_predict(chosen):
    """Trains on all slices of one folder and writes the positions of another's; an exit code.

    From random weights: the phantom's brought nothing in the folds.
    """
    changes, out = (QUICK if chosen.quick else FULL)["changes"], pathlib.Path(chosen.out)
    slices, wanted = read_slices(chosen.train), pictures(chosen.predict)
    log = console.Log()
    with harness.kept(chosen.workdir) as folder:
        log.say(f"1/2 train on {len(slices)} slices of {chosen.train}")
        changes = (*changes, f"seed={chosen.seed}")
        data = _prepare(labelled_rows(slices), folder, configs.load(PAGE, changes))
        train.train(configs.load(PAGE, (*changes, data)), folder / "run")
        log.say(f"2/2 place {len(wanted)} slices of {chosen.predict}")
        placed, failures = place_slices(folder / "run", wanted)
    if not placed:
        raise InputError(f"no slice in {chosen.predict} could be read: {failures[0][1]}")
    table = [(path.name, round(position, 6)) for path, position in placed.items()]
    console.write_table(out, ("file", "position"), table)
    console.write_failures(out.with_suffix(".failures.csv"), failures)
    named = {path: NAME.fullmatch(path.name) for path in placed}
    print(f"{len(placed)} positions, {len(failures)} slices rejected: {out}")
    if all(named.values()) and len(placed) > 2:
        value = correlation(list(placed.values()), [int(match[1]) for match in named.values()])
        print(f"Spearman correlation with the ranks of the names: {value:.4f}")
    return options.SOME_REJECTED if failures else options.DONE


def main(argv=None):
    """Runs one form; returns the exit code."""
    parser = options.Parser(
        prog="benchmarks/experiments/body_order.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two folds, few epochs: it runs")
    parser.add_argument("--slices", default=str(DATA / "body_part_ordinal"), help="ranked slices")
    parser.add_argument(
        "--unlabelled",
        nargs="*",
        default=[str(DATA / path) for path in UNLABELLED],
        help="files or folders of CT that the student may learn from",
    )
    parser.add_argument("--table", nargs=2, metavar=("FOLDER", "CSV"), help="write the table only")
    parser.add_argument("--train", metavar="FOLDER", help="ranked slices to train on")
    parser.add_argument("--predict", metavar="FOLDER", help="slices to place, after --train")
    parser.add_argument("--out", help="JSON of the folds, or CSV of the positions")
    parser.add_argument("--workdir", help="keep the runs there and go on from it (default: no)")
    parser.add_argument("--seed", type=int, default=5, help="default: 5; 0 to 4 chose the recipe")
    chosen = harness.parse(parser, argv, full={}, quick={})
    if chosen.seed < 0:
        parser.error(f"--seed {chosen.seed} should be 0 or above")
    if bool(chosen.train) != bool(chosen.predict) or (chosen.train and not chosen.out):
        parser.error("--train, --predict and --out CSV belong together")
    if chosen.table:
        console.write_table(chosen.table[1], COLUMNS, labelled_rows(read_slices(chosen.table[0])))
    elif chosen.train:
        return train_and_predict(chosen)
    else:
        chosen.out = pathlib.Path(chosen.out) if chosen.out else None
        benchmark(chosen, argv)
    return options.DONE


if __name__ == "__main__":
    harness.run(main)
