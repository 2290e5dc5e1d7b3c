"""Writes a generated CT data set in the formats of DeepLesion, LesaNet and DICOM.

The demo and the tests process it like real data. Labels are computed from the organs in a slice
(see `phantom.labels`), and the organ maps are stored beside the images.
"""

import os
import pathlib
import shutil
import tempfile
from typing import Any, TypedDict

import numpy as np

from maknet_jax.errors import InputError
from maknet_jax.files import read_json, write_json
from maknet_jax.phantom import anatomy, drawing, formats, reference
from maknet_jax.phantom import labels as phantom_labels
from maknet_jax.phantom import lesions as phantom_lesions

_MANUFACTURERS = ("GE MEDICAL SYSTEMS", "SIEMENS", "Philips", "TOSHIBA")


class PhantomPaths(TypedDict):
    """The files of a phantom, and the counts of patients, lesions, slices and labels."""

    images: pathlib.Path
    info: pathlib.Path
    labels: pathlib.Path
    hand_labels: pathlib.Path
    ontology: pathlib.Path
    dicom: pathlib.Path
    masks: pathlib.Path
    counts: dict[str, int]


def write_phantom(
    out: str | os.PathLike,
    *,
    patients: int = 60,
    unlabelled_volumes: int = 6,
    seed: int = 0,
    size: int = 128,
    slices: int = 60,
    lesions_per_patient: int = 6,
    absent: float | None = None,
) -> PhantomPaths:
    """Writes a phantom atomically; equal arguments give equal bytes.

    Args:
      out: a folder that is empty or does not exist.
      patients: labelled patients, at least 4; about 70 %, 12 % and 18 % in train, val and test.
      unlabelled_volumes: number of DICOM series.
      seed: random seed of the whole phantom.
      size: rows and columns of each slice.
      slices: per DICOM series. The last series has two thirds of them: with the default of 60 the
        rule "more than 50 slices" drops one series.
      lesions_per_patient: on average.
      absent: the probability that a patient lacks the spleen, the stomach, the bladder, a lung or
        a kidney (never both of a pair); near 0.5 an organ can hardly be predicted from the others
        in a slice. Default: 0.15 to 0.25, by organ.

    Returns:
      The paths of its files, and counts.

    Raises:
      InputError: an argument is out of range, or `out` is not empty.
    """
    out = pathlib.Path(out)
    for name, value, least in (
        ("patients", patients, 4),
        ("unlabelled_volumes", unlabelled_volumes, 0),
        ("size", size, 32),
        ("slices", slices, 3),
        ("lesions_per_patient", lesions_per_patient, 1),
    ):
        if value < least:
            raise InputError(f"{name} {value} is too small for a phantom: use at least {least}")
    if not (absent is None or 0 <= absent <= 1):
        raise InputError(f"absent {absent} is not a probability: use 0 to 1, or None")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty: choose a new folder for the phantom")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        lesions: list[phantom_labels.LabelledLesion] = []
        split = _split_patients(patients, seed)
        for patient in range(1, patients + 1):
            lesions += _write_patient(
                temporary, patient, split[patient], seed, size, lesions_per_patient, absent
            )
        rng = np.random.default_rng([seed, 1])
        formats.write_info(temporary / "deeplesion" / "DL_info.csv", lesions, rng)
        counts = phantom_labels.write_labels(temporary / "lesanet", lesions, rng)
        for volume in range(unlabelled_volumes):
            short = volume == unlabelled_volumes - 1
            count = slices * 2 // 3 if short else slices
            _write_volume(temporary, volume, seed, size, count, absent)
        write_json(temporary / "masks" / "organs.json", dict(enumerate(reference.ORGANS)))
        counts |= {
            "patients": patients,
            "lesions": len(lesions),
            "key_slices": len({lesion.info["File_name"] for lesion in lesions}),
            "png_slices": len(list(temporary.glob("deeplesion/Images_png/*/*.png"))),
            "dicom_series": unlabelled_volumes,
            "dicom_slices": len(list(temporary.glob("dicom/*/*.dcm"))),
        }
        arguments = {
            "patients": patients,
            "unlabelled_volumes": unlabelled_volumes,
            "seed": seed,
            "size": size,
            "slices": slices,
            "lesions_per_patient": lesions_per_patient,
            "absent": absent,
        }
        write_json(temporary / "phantom.json", {"arguments": arguments, "counts": counts})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return read_phantom(out)


def open_phantom(folder: str | os.PathLike, **arguments: Any) -> PhantomPaths:
    """Reads the phantom in `folder`, or writes it there.

    Args:
      folder: a phantom, or the folder to write.
      **arguments: see `write_phantom`.

    Raises:
      InputError: the folder holds a phantom with different arguments.
    """
    if not (pathlib.Path(folder) / "phantom.json").exists():
        return write_phantom(folder, **arguments)
    written = read_json(pathlib.Path(folder) / "phantom.json")["arguments"]
    for name, value in arguments.items():
        if written.get(name) != value:
            raise InputError(
                f"{folder} holds a phantom with {name} {written.get(name)}, not {value}: choose a "
                "new folder"
            )
    return read_phantom(folder)


def read_phantom(folder: str | os.PathLike) -> PhantomPaths:
    """The paths and counts of a phantom, as `write_phantom` returned them.

    Raises:
      InputError: the folder does not hold a phantom.
    """
    folder = pathlib.Path(folder)
    try:
        counts = read_json(folder / "phantom.json")["counts"]
    except FileNotFoundError:
        raise InputError(f"{folder} does not hold a phantom: write one first") from None
    return {
        "images": folder / "deeplesion" / "Images_png",
        "info": folder / "deeplesion" / "DL_info.csv",
        "labels": folder / "lesanet" / "text_mined_labels.json",
        "hand_labels": folder / "lesanet" / "hand_labeled.json",
        "ontology": folder / "lesanet" / "ontology.xlsx",
        "dicom": folder / "dicom",
        "masks": folder / "masks",
        "counts": counts,
    }


class DeepLesionFiles(TypedDict):
    """Keyword arguments of `prepare.prepare_deeplesion`."""

    images: pathlib.Path
    info: pathlib.Path
    label_file: pathlib.Path
    hand_labels: pathlib.Path
    ontology: pathlib.Path


def deeplesion_files(paths: PhantomPaths) -> DeepLesionFiles:
    """The paths as keyword arguments of `prepare.prepare_deeplesion`."""
    return {
        "images": paths["images"],
        "info": paths["info"],
        "label_file": paths["labels"],
        "hand_labels": paths["hand_labels"],
        "ontology": paths["ontology"],
    }


def _split_patients(patients: int, seed: int) -> dict[int, str]:
    """Patient number, from 1, -> split."""
    order = np.random.default_rng([seed, 0]).permutation(patients) + 1
    val, test = max(1, round(0.12 * patients)), max(1, round(0.18 * patients))
    names = ["test"] * test + ["val"] * val + ["train"] * (patients - val - test)
    return dict(zip(order.tolist(), names, strict=True))


def _write_patient(
    root: pathlib.Path,
    patient: int,
    split: str,
    seed: int,
    size: int,
    lesions_per_patient: int,
    absent: float | None,
) -> list[phantom_labels.LabelledLesion]:
    """Writes the PNGs and organ maps of one patient; returns the patient's lesions."""
    rng = np.random.default_rng([seed, 2, patient])
    body = anatomy.make_patient(rng, absent)
    height = reference.LENGTH * body.height
    count = int(rng.integers(max(1, lesions_per_patient // 2), lesions_per_patient * 3 // 2 + 1))
    person: dict[str, str | int] = {
        "Patient_index": patient,
        "Patient_gender": str(rng.choice(["F", "M"])),
        "Patient_age": int(rng.integers(18, 88)),
    }
    studies = np.sort(rng.integers(1, 3 if count > 3 else 2, count))
    lesions = []
    for study in np.unique(studies):
        scan = anatomy.make_scan(rng, body)
        interval = float(rng.choice([1.0, 2.5, 5.0], p=[0.3, 0.3, 0.4]))
        first, last = rng.uniform(0, 0.04), rng.uniform(0.95, 1)
        number = int((last - first) * height / interval)
        levels = first + np.arange(-1, number + 1) * interval / height  # index 1 is the first slice
        keys = rng.integers(1, number + 1, (studies == study).sum())
        again = rng.random(keys.size) < 0.12  # several lesions on one slice
        keys = np.sort(np.where(again, np.roll(keys, 1), keys))
        stored = np.unique(np.concatenate([keys - 1, keys, keys + 1]))
        lost = rng.random(stored.size) < 0.04  # like the ends of real series
        stored = stored[(stored >= 1) & (stored <= number) & ~(lost & ~np.isin(stored, keys))]
        series = f"{patient:06d}_{study:02d}_01"
        blobs = []
        spacing = scan.fov / size
        for key in keys.tolist():
            noise = np.random.default_rng([seed, 3, patient, int(study), key])
            hu, organs = drawing.draw_slice(body, scan, levels[key], size, noise)
            blob, terms, columns = phantom_lesions.make_lesion(
                rng, hu, organs, spacing, levels[key] * height
            )
            blobs.append(blob)
            low, high = (key - 1 if key - 1 in stored else key), key + (key + 1 in stored)
            columns |= {
                "File_name": f"{series}_{key:03d}.png",
                "Study_index": int(study),
                "Series_ID": 1,
                "Key_slice_index": key,
                "Slice_range": f"{low}, {high}",
                "Spacing_mm_px_": f"{spacing:.6g}, {spacing:.6g}, {interval:g}",
                "Image_size": f"{size}, {size}",
                # DeepLesion normalises from head to feet: the neck is at about 0.25.
                "Normalized_lesion_location": (
                    f"{blob.column / size:.6f}, {blob.row / size:.6f}, "
                    f"{0.25 + 0.7 * levels[key]:.6f}"
                ),
            }
            terms |= phantom_labels.visible_terms(organs, spacing * spacing)
            lesions.append(phantom_labels.LabelledLesion(split, terms, person | columns))
        folder = root / "deeplesion" / "Images_png" / series
        folder.mkdir(parents=True)
        maps = {}
        for index in stored.tolist():
            noise = np.random.default_rng([seed, 3, patient, int(study), index])
            hu, organs = drawing.draw_slice(body, scan, levels[index], size, noise, blobs)
            formats.write_png(folder / f"{index:03d}.png", hu)
            maps[f"{index:03d}"] = organs
        formats.write_masks(root / "masks" / "deeplesion" / f"{series}.npz", maps)
    return lesions


def _write_volume(
    root: pathlib.Path, volume: int, seed: int, size: int, slices: int, absent: float | None
) -> None:
    """Writes one unlabelled DICOM series and its organ map."""
    rng = np.random.default_rng([seed, 4, volume])
    body = anatomy.make_patient(rng, absent)
    scan = anatomy.make_scan(rng, body)
    first = rng.uniform(0, 0.3)
    levels = np.linspace(first, min(1, first + rng.uniform(0.55, 0.8)), slices)
    drawn = [drawing.draw_slice(body, scan, level, size, rng) for level in levels]
    interval = float(levels[1] - levels[0]) * reference.LENGTH * body.height
    spacing = (interval, scan.fov / size, scan.fov / size)
    name = f"phantom-{seed}-{volume}"
    uids = formats.write_series(
        root / "dicom" / f"series_{volume:02d}",
        np.stack([hu for hu, _ in drawn]),
        spacing,
        name,
        rng,
        syntax=formats.SYNTAXES[volume % 4],
        intercept=-1024 if volume % 3 else 0,
        manufacturer=_MANUFACTURERS[volume % 4],
        upwards=bool(volume % 2),
    )
    labels = np.stack([organs for _, organs in drawn])
    formats.write_masks(
        root / "masks" / "dicom" / f"series_{volume:02d}.npz", {"labels": labels, "uids": uids}
    )
