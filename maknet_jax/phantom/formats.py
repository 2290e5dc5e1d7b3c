"""Writes the files of the real data sets: DL_info.csv, PNG slices, DICOM series, organ maps."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import generate_uid

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
SYNTAXES = (
    pydicom.uid.ExplicitVRLittleEndian,
    pydicom.uid.RLELossless,
    pydicom.uid.ImplicitVRLittleEndian,
    pydicom.uid.DeflatedExplicitVRLittleEndian,
)


def write_png(path: pathlib.Path, hu: np.ndarray) -> None:
    """Writes int16 HU `[rows, columns]` as in DeepLesion: 16 bits, HU + 32768."""
    pixels = (hu.astype(np.int32) + 32768).astype(np.uint16)
    Image.fromarray(pixels).save(path, compress_level=3)


def write_masks(path: pathlib.Path, maps: dict[str, Any]) -> None:
    """Writes arrays by name as NPZ: organ maps (uint8, values of `reference.ORGANS`), UIDs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **maps)


def write_info(
    path: pathlib.Path,
    lesions: Sequence[phantom_labels.LabelledLesion],
    rng: np.random.Generator,
) -> None:
    """Writes DL_info.csv; `rng` chooses the rows marked as noisy."""
    noisy = set(rng.choice(len(lesions), max(1, len(lesions) // 60), replace=False).tolist())
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, INFO_COLUMNS)
        writer.writeheader()
        for position, lesion in enumerate(lesions):
            # DeepLesion has coarse types only in the official val and test splits.
            known = {"Coarse_lesion_type": -1} if lesion.split == "train" else {}
            split = phantom_labels.SPLITS.index(lesion.split) + 1
            fields = {"Possibly_noisy": int(position in noisy), "Train_Val_Test": split}
            writer.writerow(lesion.info | known | fields)


def write_series(
    folder: pathlib.Path,
    hu: np.ndarray,
    spacing: tuple[float, float, float],
    name: str,
    rng: np.random.Generator,
    *,
    syntax: pydicom.uid.UID,
    intercept: int = 0,
    manufacturer: str = "",
    upwards: bool = False,
) -> np.ndarray:
    """Writes a CT series as DICOM files with random names, unrelated to their order.

    Args:
      folder: a new folder.
      hu: int16 `[slices, rows, columns]` from head to feet.
      spacing: (slice, row, column) in mm.
      name: the PatientID, from which all UIDs are derived.
      rng: a `numpy.random.Generator` for the file names.
      syntax: a transfer syntax that pydicom can write.
      intercept: rescale intercept; stored values are signed only if necessary.
      manufacturer: of the scanner.
      upwards: whether instance numbers increase from feet to head.

    Returns:
      The SOP instance UIDs from head to feet, as an array of str.
    """
    folder.mkdir(parents=True)
    stored = hu.astype(np.int32) - intercept
    signed = bool(np.min(stored) < 0)
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
        height = -index * spacing[0]  # DICOM's z increases towards the head
        data.ImagePositionPatient = [f"{v:.6g}" for v in (*corner, height)]
        data.PixelSpacing = [f"{v:.8g}" for v in spacing[1:]]
        data.SliceThickness = f"{spacing[0]:.4g}"
        data.Rows, data.Columns = frame.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = int(signed)
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = intercept, 1, "HU"
        data.KVP, data.AcquisitionNumber = 120, 1
        if np.min(hu) < -1024:
            data.PixelPaddingValue = int(np.min(stored))
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
