"""Measures what the out-of-domain flags of a network find, and their false alarms (OpenKBP).

    python benchmarks/experiments/out_of_domain.py --model runs/openkbp  # validation patients
    python benchmarks/experiments/out_of_domain.py --model runs/openkbp --patients tuning
    python benchmarks/experiments/out_of_domain.py --model runs/openkbp --quick  # two patients

Every change is applied to the CT of each patient, which `maknet predict` then labels. The first
rows should not be marked: the CT as it is, resampled to 512 x 512 pixels, with noise, with other
distances between slices. The others should: flipped, turned by 90 degrees, clipped to display
windows. Then a torso, whose label map tells which slices show abdomen or pelvis, and a series of
the liver: regions that the network has never seen.

The score and its thresholds were chosen with changes of the tuning patients, never with the torso
or the liver. Validation patients (the default) are for the final table only; tuning patients skip
the torso and the liver. Needs OpenKBP (data/README.md) and a network trained on it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks import harness
from benchmarks.real_data import DATA
from maknet_jax import console, predict
from maknet_jax.ct import nifti, search, volumes
from maknet_jax.ct.volumes import Volume
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation.domain import Verdict
from maknet_jax.runs import workdir

TORSO = "nifti/torso_112/example_ct.nii.gz"
TORSO_LABELS = "nifti/torso_112/example_seg_fast_force_split.nii.gz"
LIVER = "dicom/liver_j2k_20"
# Names in the torso's label map; a slice with any of them shows abdomen or pelvis.
ABDOMEN = (
    *("liver", "spleen", "stomach", "kidney_right", "kidney_left", "pancreas", "duodenum"),
    *("small_bowel", "colon", "urinary_bladder", "sacrum", "hip_left", "hip_right"),
)
MATRIX = 512  # pixels of the resampled slices
QUICK_PATIENTS = 2
FLIPS = ("head and feet swapped", "front and back swapped", "left and right swapped")
TURNS = ("turned by 90 degrees", "turned by 180 degrees", "turned by 270 degrees")


def _resampled(hu: np.ndarray) -> np.ndarray:
    """Slices with `MATRIX` pixels per side, bilinear."""
    scale = MATRIX / hu.shape[1], MATRIX / hu.shape[2]
    return np.stack([ndimage.zoom(plane.astype(np.float32), scale, order=1) for plane in hu])


def _noisy(hu: np.ndarray, deviation: float) -> np.ndarray:
    return hu + np.random.default_rng(0).normal(0, deviation, hu.shape)


def _at_distance(volume: Volume, mm: float) -> tuple[np.ndarray, float]:
    """(HU interpolated at slices `mm` apart, `mm`)."""
    count = math.floor((len(volume.hu) - 1) * volume.spacing[0] / mm) + 1
    place = np.arange(count) * mm / volume.spacing[0]
    low = np.minimum(place.astype(int), len(volume.hu) - 2)
    share = (place - low)[:, None, None]
    return volume.hu[low] * (1 - share) + volume.hu[low + 1] * share, mm


# Name -> HU [Z, Y, X] of a volume, or (HU, mm between its slices) where that changes.
CHANGES: dict[str, Callable[[Volume], Any]] = {
    "as they are": lambda volume: volume.hu,
    f"resampled to {MATRIX} x {MATRIX}": lambda volume: _resampled(volume.hu),
    "noise, 20 HU": lambda volume: _noisy(volume.hu, 20),
    "noise, 60 HU": lambda volume: _noisy(volume.hu, 60),
    f"{MATRIX} x {MATRIX}, then noise of 60 HU": lambda volume: _noisy(_resampled(volume.hu), 60),
    "every second slice": lambda volume: (volume.hu[::2], 2 * volume.spacing[0]),
    "slices 1 mm apart": lambda volume: _at_distance(volume, 1.0),
    "slices 5 mm apart": lambda volume: _at_distance(volume, 5.0),
    FLIPS[0]: lambda volume: volume.hu[::-1],
    FLIPS[1]: lambda volume: volume.hu[:, ::-1],
    FLIPS[2]: lambda volume: volume.hu[:, :, ::-1],
    TURNS[0]: lambda volume: np.rot90(volume.hu, 1, (1, 2)),
    TURNS[1]: lambda volume: np.rot90(volume.hu, 2, (1, 2)),
    TURNS[2]: lambda volume: np.rot90(volume.hu, 3, (1, 2)),
    "clipped to -175 to 275 HU": lambda volume: np.clip(volume.hu, -175, 275),
    "clipped to -1350 to 150 HU": lambda volume: np.clip(volume.hu, -1350, 150),
}
QUICK_CHANGES = ("as they are", "every second slice", *FLIPS)
KINDS = {"validation": "validation", "tuning": "train"}  # patients -> folder of OpenKBP


def main(argv: Sequence[str] | None = None) -> None:
    """Scores all changes, prints the table and writes the JSON."""
    parser = harness.parser(__file__, __doc__, size=False, repeats=False)
    parser.add_argument("--model", required=True, help="workdir or bundle, trained on OpenKBP")
    parser.add_argument("--openkbp", default=str(DATA / "openkbp"), help="folder of OpenKBP")
    parser.add_argument("--patients", choices=tuple(KINDS), help="default: validation")
    chosen = harness.parse(parser, argv, full={"patients": "validation"}, quick={})
    run = workdir.open_run(chosen.model)
    if run.domain is None:
        raise InputError(f"{chosen.model} has no out-of-domain statistics: train it again")
    paths = _paths(run, pathlib.Path(chosen.openkbp) / KINDS[chosen.patients], chosen.patients)
    changes = QUICK_CHANGES if chosen.quick else tuple(CHANGES)
    paths = paths[:QUICK_PATIENTS] if chosen.quick else paths
    verdicts: dict[str, list[Verdict]] = {name: [] for name in changes}
    with console.progress("patients", len(paths) * len(changes)) as advance:
        for path in paths:
            volume = _load(path)
            for name in changes:
                verdicts[name].append(_judge(run, _changed(volume, name)))
                advance()
    results: dict[str, Any] = {name: _summary(each) for name, each in verdicts.items()}
    regions = {} if chosen.patients == "tuning" else _regions(run)
    rows = [[name, *_cells(values)] for name, values in results.items()]
    rows += [[name, *_cells(values)] for name, values in regions.items()]
    harness.report(
        __file__,
        argv,
        chosen,
        ["CT", "slices", "slices outside", "series", "outside", "order", "either"],
        rows,
        [
            f"{len(paths)} {chosen.patients} patients; a series is marked as outside, as out of "
            "order, or as both",
            *(["QUICK FORM: few patients"] * chosen.quick),
        ],
        {"domain": run.domain.about, "step": run.step, "results": results | regions},
    )


def _paths(run: workdir.Run, folder: pathlib.Path, patients: str) -> list[pathlib.Path]:
    """The CT of each patient.

    Raises:
      InputError: there is none.
    """
    paths = sorted(folder.glob("*/ct.nii.gz"))
    if patients == "tuning":
        source = records.open_dataset(run.data_path).source(run.val_split)
        names = {str(source[number].meta["case"]) for number in range(len(source))}
        paths = [path for path in paths if path.parent.name in names]
    if not paths:
        raise InputError(f"{folder} holds no patient: data/README.md says how to get OpenKBP")
    return paths


def _load(path: pathlib.Path) -> Volume:
    (ref,) = search.find_series(path)[0]
    return volumes.load_series(ref)


def _changed(volume: Volume, name: str) -> Volume:
    """The volume after one of `CHANGES`."""
    values = CHANGES[name](volume)
    hu, mm = values if isinstance(values, tuple) else (values, volume.spacing[0])
    names = tuple(str(number) for number in range(len(hu)))
    return dataclasses.replace(
        volume,
        hu=np.ascontiguousarray(np.rint(np.clip(hu, -32768, 32767)), np.int16),
        spacing=(mm, *volume.spacing[1:]),
        slices=names,
        uids=names,
    )


def _judge(run: workdir.Run, volume: Volume) -> Verdict:
    verdict = predict.predict_volume(run, volume, batch_size=32).verdict
    assert verdict is not None  # the run has statistics
    return verdict


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts of marked slices and series."""
    return {
        "slices": sum(len(verdict.outside) for verdict in verdicts),
        "slices_outside": int(sum(verdict.outside.sum() for verdict in verdicts)),
        "series": len(verdicts),
        "outside": sum(verdict.series_outside for verdict in verdicts),
        "order": sum(verdict.out_of_order for verdict in verdicts),
        "either": sum(verdict.series_outside or verdict.out_of_order for verdict in verdicts),
    }


def _regions(run: workdir.Run) -> dict[str, Any]:
    """The torso, its slices of abdomen and pelvis, its other slices, and the liver series."""
    torso = _judge(run, _load(DATA / TORSO))
    names = nifti.read_label_names(DATA / TORSO_LABELS)
    values = [value for value, name in names.items() if name in ABDOMEN]
    inside = np.isin(nifti.load_label_map(DATA / TORSO_LABELS), values).any(axis=(1, 2))
    parts = {"abdomen and pelvis": inside, "other": ~inside}
    rows = {
        f"torso, slices of {part}": {
            "slices": int(chosen.sum()),
            "slices_outside": int(torso.outside[chosen].sum()),
        }
        for part, chosen in parts.items()
    }
    liver = _judge(run, _load(DATA / LIVER))
    return {"torso": _summary([torso])} | rows | {"liver": _summary([liver])}


def _cells(values: dict[str, Any]) -> list[str]:
    """Table cells of `_summary`."""
    share = values["slices_outside"] / max(values["slices"], 1)
    names = ("series", "outside", "order", "either")
    counts = [str(values.get(name, "-")) for name in names]
    return [f"{values['slices']:,}", f"{share:.1%}", *counts]


if __name__ == "__main__":
    harness.run(main)
