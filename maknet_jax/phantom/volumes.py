"""Writes a generated CT data set in the formats of the real ones: DeepLesion, LesaNet, DICOM.

The demo and the tests run the code of the real data on it. A slice is labelled with what it
contains; the text-mined labels then lose and gain some, as reports do, and the hand labels are
complete (see `phantom.labels`). The organ maps are kept beside the images.
"""

import csv
import math
import os
import pathlib
import shutil
import tempfile

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import generate_uid
from scipy import ndimage

from maknet_jax.errors import InputError
from maknet_jax.files import read_json, write_json
from maknet_jax.phantom import anatomy, torso
from maknet_jax.phantom import labels as phantom_labels

INFO_COLUMNS = (
    "File_name",
    "Patient_index",
    "Study_index",
    "Series_ID",
    "Key_slice_index",
    "Measurement_coordinates",
    "Bounding_boxes",
    "Lesion_diameters_Pixel_",
    "Normalized_lesion_location",
    "Coarse_lesion_type",
    "Possibly_noisy",
    "Slice_range",
    "Spacing_mm_px_",
    "Image_size",
    "DICOM_windows",
    "Patient_gender",
    "Patient_age",
    "Train_Val_Test",
)
# DeepLesion's coarse types: 1 bone, 2 abdomen, 3 mediastinum, 4 liver, 5 lung, 6 kidney, 7 soft
# tissue, 8 pelvis. The organs that a lesion may sit in:
_COARSE = {
    "right lung": 5,
    "left lung": 5,
    "mediastinum": 3,
    "cardiac": 3,
    "liver": 4,
    "spleen": 2,
    "intestine": 2,
    "right kidney": 6,
    "left kidney": 6,
    "urinary bladder": 8,
    "sacrum": 1,
    "pelvic bone": 1,
    "thoracic spine": 1,
    "lumbar": 1,
    "soft tissue": 7,
    "thigh": 7,
}
SYNTAXES = (
    pydicom.uid.ExplicitVRLittleEndian,
    pydicom.uid.RLELossless,
    pydicom.uid.ImplicitVRLittleEndian,
    pydicom.uid.DeflatedExplicitVRLittleEndian,
)
_MANUFACTURERS = ("GE MEDICAL SYSTEMS", "SIEMENS", "Philips", "TOSHIBA")


def write_phantom(
    out,
    *,
    patients=60,
    unlabelled_volumes=6,
    seed=0,
    size=128,
    slices=60,
    lesions_per_patient=6,
    absent=None,
):
    """Writes the whole data set, or nothing; the same arguments give the same bytes.

    Args:
      out: a folder that does not exist yet (or is empty).
      patients: labelled patients, at least 4; about 70, 12 and 18 % train, val and test.
      unlabelled_volumes: DICOM series.
      seed: of everything.
      size: rows and columns of every slice.
      slices: per DICOM series; the last series has only two thirds, so that with the default of
        60 a rule of "more than 50 slices" leaves one out.
      lesions_per_patient: on average.
      absent: the probability that a patient lacks the spleen, stomach, bladder, a lung or a kidney
        (the left one of a pair only where the right one is there); near 0.5 the organs around one
        say little about it (default: 0.15 to 0.25).

    Returns:
      A dict of paths (images, info, labels, hand_labels, ontology, dicom, masks) and `counts`.

    Raises:
      InputError: an argument is out of range, or `out` holds something.
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
            raise InputError(f"{name} is {value}; the phantom needs at least {least}: raise it")
    if not (absent is None or 0 <= absent <= 1):
        raise InputError(f"absent is {absent}; it is a probability: give 0 to 1, or None")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; the phantom is written whole: name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        lesions = []
        split = _split_patients(patients, seed)
        for patient in range(1, patients + 1):
            lesions += _write_patient(
                temporary, patient, split[patient], seed, size, lesions_per_patient, absent
            )
        rng = np.random.default_rng([seed, 1])
        _write_info(temporary / "deeplesion" / "DL_info.csv", lesions, rng)
        counts = phantom_labels.write_labels(temporary / "lesanet", lesions, rng)
        for volume in range(unlabelled_volumes):
            short = volume == unlabelled_volumes - 1
            count = slices * 2 // 3 if short else slices
            _write_volume(temporary, volume, seed, size, count, absent)
        write_json(temporary / "masks" / "organs.json", dict(enumerate(torso.ORGANS)))
        counts |= {
            "patients": patients,
            "lesions": len(lesions),
            "key_slices": len({lesion["File_name"] for lesion in lesions}),
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


def open_phantom(folder, **arguments):
    """`read_phantom` of a folder that was written before, else `write_phantom` with `arguments`.

    Raises:
      InputError: the folder was written with other arguments.
    """
    if not (pathlib.Path(folder) / "phantom.json").exists():
        return write_phantom(folder, **arguments)
    written = read_json(pathlib.Path(folder) / "phantom.json")["arguments"]
    for name, value in arguments.items():
        if written.get(name) != value:
            raise InputError(
                f"{folder} holds a phantom with {name} {written.get(name)}, not {value}: name a "
                "new folder"
            )
    return read_phantom(folder)


def read_phantom(folder):
    """What `write_phantom` returned for a folder that it has written.

    Raises:
      InputError: the folder holds no phantom.
    """
    folder = pathlib.Path(folder)
    try:
        counts = read_json(folder / "phantom.json")["counts"]
    except FileNotFoundError:
        raise InputError(f"{folder} holds no phantom: write one first") from None
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


def deeplesion_files(paths):
    """The files of `prepare.prepare_deeplesion`, by its arguments, of what `write_phantom` gave."""
    names = {"images": "images", "info": "info", "label_file": "labels"}
    names |= {"hand_labels": "hand_labels", "ontology": "ontology"}
    return {argument: paths[name] for argument, name in names.items()}


def _split_patients(patients, seed):
    order = np.random.default_rng([seed, 0]).permutation(patients) + 1
    val, test = max(1, round(0.12 * patients)), max(1, round(0.18 * patients))
    names = ["test"] * test + ["val"] * val + ["train"] * (patients - val - test)
    return dict(zip(order.tolist(), names, strict=True))


def _write_patient(root, patient, split, seed, size, lesions_per_patient, absent):
    """Writes the PNGs and organ maps of one patient; returns a dict per lesion."""
    rng = np.random.default_rng([seed, 2, patient])
    body = anatomy.make_patient(rng, absent)
    height = torso.LENGTH * body.height
    count = int(rng.integers(max(1, lesions_per_patient // 2), lesions_per_patient * 3 // 2 + 1))
    person = {
        "Patient_index": patient,
        "Patient_gender": rng.choice(["F", "M"]),
        "Patient_age": int(rng.integers(18, 88)),
        "split": split,
    }
    studies = np.sort(rng.integers(1, 3 if count > 3 else 2, count))
    rows = []
    for study in np.unique(studies):
        scan = anatomy.make_scan(rng, body)
        interval = float(rng.choice([1.0, 2.5, 5.0], p=[0.3, 0.3, 0.4]))
        first, last = rng.uniform(0, 0.04), rng.uniform(0.95, 1)
        number = int((last - first) * height / interval)
        levels = first + np.arange(-1, number + 1) * interval / height  # index 1 is the first slice
        keys = rng.integers(1, number + 1, (studies == study).sum())
        again = rng.random(keys.size) < 0.12  # several lesions on one slice
        keys = np.sort(np.where(again, np.roll(keys, 1), keys))
        wanted = np.unique(np.concatenate([keys - 1, keys, keys + 1]))
        lost = rng.random(wanted.size) < 0.04  # as at the ends of real series
        wanted = wanted[(wanted >= 1) & (wanted <= number) & ~(lost & ~np.isin(wanted, keys))]
        series = f"{patient:06d}_{study:02d}_01"
        found = []
        for key in keys.tolist():
            noise = np.random.default_rng([seed, 3, patient, int(study), key])
            hu, organs = anatomy.draw_slice(body, scan, levels[key], size, noise)
            blob, terms, row = _make_lesion(rng, hu, organs, scan.fov / size, levels[key] * height)
            found.append(blob)
            low, high = (key - 1 if key - 1 in wanted else key), key + (key + 1 in wanted)
            spacing = scan.fov / size
            rows.append(
                person
                | row
                | {
                    "File_name": f"{series}_{key:03d}.png",
                    "Study_index": int(study),
                    "Series_ID": 1,
                    "Key_slice_index": key,
                    "Slice_range": f"{low}, {high}",
                    "Spacing_mm_px_": f"{spacing:.6g}, {spacing:.6g}, {interval:g}",
                    "Image_size": f"{size}, {size}",
                    # DeepLesion measures from head to feet: the neck is at about a quarter.
                    "Normalized_lesion_location": (
                        f"{blob.column / size:.6f}, {blob.row / size:.6f}, "
                        f"{0.25 + 0.7 * levels[key]:.6f}"
                    ),
                    "terms": terms | phantom_labels.visible_terms(organs, spacing * spacing),
                }
            )
        folder = root / "deeplesion" / "Images_png" / series
        folder.mkdir(parents=True)
        maps = {}
        for index in wanted.tolist():
            noise = np.random.default_rng([seed, 3, patient, int(study), index])
            hu, organs = anatomy.draw_slice(body, scan, levels[index], size, noise, found)
            pixels = (hu.astype(np.int32) + 32768).astype(np.uint16)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png", compress_level=3)
            maps[f"{index:03d}"] = organs
        _write_masks(root / "masks" / "deeplesion" / f"{series}.npz", maps)
    return rows


def _make_lesion(rng, hu, organs, spacing, z):
    """Places a blob in one of the slice's organs: (`Lesion`, its terms, its columns)."""
    area = np.bincount(organs.ravel(), minlength=len(torso.ORGANS)) * spacing * spacing
    homes = [name for name in _COARSE if area[torso.VALUE[name]] > 4 * phantom_labels.VISIBLE_MM2]
    homes = homes or [max(_COARSE, key=lambda name: area[torso.VALUE[name]])]
    organ = str(rng.choice(homes))
    inside = organs == torso.VALUE[organ]
    depth = ndimage.distance_transform_edt(inside)
    rows, columns = np.nonzero(depth >= min(2.5, depth.max()))
    pick = rng.integers(rows.size)
    room = depth[rows[pick], columns[pick]] * spacing
    radius = float(np.clip(rng.choice([4.5, 9.0, 17.0, 24.0]) * rng.uniform(0.8, 1.2), 3, room + 5))
    base = float(np.median(hu[inside]))
    terms, texture, value = set(), "smooth", base + 45 * (1 if rng.random() < 0.4 else -1)
    size_term = "mass" if radius > 15 else "nodule"
    if "lung" in organ:
        value, texture = 25.0, str(rng.choice(["smooth", "mixed", "calcified", "cavitary"]))
        terms = {"lung nodule" if size_term == "nodule" else "mass"}
    elif "kidney" in organ or organ == "liver" and rng.random() < 0.4:
        value, terms = 6.0, {"kidney cyst" if "kidney" in organ else "cyst", "hypoattenuation"}
    else:
        texture = str(rng.choice(["smooth", "mixed", "calcified"], p=[0.4, 0.45, 0.15]))
        terms = {"liver mass" if organ == "liver" and radius > 15 else size_term}
        terms.add("hyperattenuation" if value > base else "hypoattenuation")
    terms |= {texture} & {"calcified", "cavitary"}
    terms |= {"large"} if radius > 18 else {"subcentimeter"} if radius < 5 else set()
    blob = anatomy.Lesion(
        z=z,
        row=float(rows[pick]),
        column=float(columns[pick]),
        radius=radius / spacing,
        ratio=float(rng.uniform(0.6, 1)),
        angle=float(rng.uniform(0, math.pi)),
        depth=max(radius, 6.0),
        hu=value,
        texture=texture,
    )
    # Long axis, then short axis, as the radiologist draws them; the box is 5 pixels of 512 wider.
    long = blob.radius * np.array([math.cos(blob.angle), math.sin(blob.angle)])
    short = blob.ratio * np.array([-long[1], long[0]])
    ends = np.array([blob.column, blob.row]) + np.stack([-long, long, -short, short])
    edge = 5 * hu.shape[0] / 512
    box = np.concatenate([ends.min(0) - edge, ends.max(0) + edge]).clip(0, hu.shape[0] - 1)
    return (
        blob,
        phantom_labels.with_parents(terms),
        {
            "Measurement_coordinates": ", ".join(f"{v:.6g}" for v in ends.ravel()),
            "Bounding_boxes": ", ".join(f"{v:.6g}" for v in box),
            "Lesion_diameters_Pixel_": f"{2 * blob.radius:.6g}, {2 * blob.radius * blob.ratio:.6g}",
            "Coarse_lesion_type": _COARSE[organ],
            "DICOM_windows": "-1500, 500" if "lung" in organ else "-175, 275",
        },
    )


def _write_masks(path, maps):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **maps)


def _write_info(path, lesions, rng):
    noisy = set(rng.choice(len(lesions), max(1, len(lesions) // 60), replace=False).tolist())
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, INFO_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for position, lesion in enumerate(lesions):
            # DeepLesion gives coarse types in the official val and test sets only.
            known = {"Coarse_lesion_type": -1} if lesion["split"] == "train" else {}
            split = phantom_labels.SPLITS.index(lesion["split"]) + 1
            fields = {"Possibly_noisy": int(position in noisy), "Train_Val_Test": split}
            writer.writerow(lesion | known | fields)


def _write_volume(root, volume, seed, size, slices, absent):
    """Writes one unlabelled DICOM series and its organ map."""
    rng = np.random.default_rng([seed, 4, volume])
    body = anatomy.make_patient(rng, absent)
    scan = anatomy.make_scan(rng, body)
    first = rng.uniform(0, 0.3)
    levels = np.linspace(first, min(1, first + rng.uniform(0.55, 0.8)), slices)
    drawn = [anatomy.draw_slice(body, scan, level, size, rng) for level in levels]
    interval = float(levels[1] - levels[0]) * torso.LENGTH * body.height
    spacing = (interval, scan.fov / size, scan.fov / size)
    name = f"phantom-{seed}-{volume}"
    uids = write_series(
        root / "dicom" / f"series_{volume:02d}",
        np.stack([hu for hu, _ in drawn]),
        spacing,
        name,
        rng,
        syntax=SYNTAXES[volume % 4],
        intercept=-1024 if volume % 3 else 0,
        manufacturer=_MANUFACTURERS[volume % 4],
        upwards=bool(volume % 2),
    )
    labels = np.stack([organs for _, organs in drawn])
    _write_masks(
        root / "masks" / "dicom" / f"series_{volume:02d}.npz", {"labels": labels, "uids": uids}
    )


def write_series(
    folder, hu, spacing, name, rng, *, syntax, intercept=0, manufacturer="", upwards=False
):
    """Writes a CT series as DICOM files whose names say nothing about their order.

    Args:
      folder: a new folder.
      hu: int16 [slices, rows, columns] from head to feet.
      spacing: (slice, row, column) in mm.
      name: what all UIDs are derived from.
      rng: a `numpy.random.Generator` for the file names.
      syntax: the transfer syntax, one that pydicom can write.
      intercept: rescale intercept; the stored numbers are signed only if they must be.
      manufacturer: written as it is.
      upwards: whether the instance numbers run from the feet to the head.

    Returns:
      The SOP instance UIDs from head to feet, as an array of str.
    """
    folder.mkdir(parents=True)
    stored = hu.astype(np.int32) - intercept
    signed = bool(stored.min() < 0)
    uids = []
    for index, frame in enumerate(stored):
        data = pydicom.Dataset()
        data.SOPClassUID = pydicom.uid.CTImageStorage
        data.SOPInstanceUID = generate_uid(entropy_srcs=[name, "instance", str(index)])
        data.StudyInstanceUID = generate_uid(entropy_srcs=[name, "study"])
        data.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
        data.FrameOfReferenceUID = generate_uid(entropy_srcs=[name, "frame"])
        data.Modality, data.Manufacturer = "CT", manufacturer
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.PatientName, data.PatientID, data.PatientPosition = "Phantom", name, "HFS"
        data.PatientBirthDate, data.PatientSex, data.StudyDate = "", "O", "20200101"
        data.StudyTime, data.AccessionNumber, data.ReferringPhysicianName = "", "", ""
        data.StudyID, data.SeriesNumber, data.PositionReferenceIndicator = "1", 1, ""
        data.InstanceNumber = len(stored) - index if upwards else index + 1
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        corner = [-half * n / 2 for half, n in zip(spacing[:0:-1], frame.shape[::-1], strict=True)]
        height = -index * spacing[0]  # DICOM's z runs to the head
        data.ImagePositionPatient = [f"{v:.6g}" for v in (*corner, height)]
        data.PixelSpacing = [f"{v:.8g}" for v in spacing[1:]]
        data.SliceThickness = f"{spacing[0]:.4g}"
        data.Rows, data.Columns = frame.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = int(signed)
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = intercept, 1, "HU"
        data.KVP, data.AcquisitionNumber = 120, 1
        if hu.min() < -1024:
            data.PixelPaddingValue = int(stored.min())
        data.PixelData = frame.astype("<i2" if signed else "<u2").tobytes()
        data["PixelData"].VR = "OW"
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = syntax
        if syntax == pydicom.uid.RLELossless:
            data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            data.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
        path = folder / f"{rng.integers(2**40):010x}.dcm"
        pydicom.dcmwrite(path, data, enforce_file_format=True)
        uids.append(data.SOPInstanceUID)
    return np.array(uids)
