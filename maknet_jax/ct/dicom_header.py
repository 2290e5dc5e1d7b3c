"""The header of a DICOM CT slice: its geometry and scale, and why it cannot be used."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import pydicom
from pydicom import uid as dicom_uid

from maknet_jax.ct import acquisition, containers, dicom_frames, dicom_pixels, geometry, reading
from maknet_jax.ct.elements import value
from maknet_jax.ct.reading import LARGEST_MATRIX, content_id, one_line
from maknet_jax.errors import Rejected

NAMES = (".dcm", ".ima", ".dicom")
TAGS = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel "
    "BodyPartExamined PhotometricInterpretation NumberOfFrames BitsAllocated BitsStored HighBit "
    "PixelRepresentation RescaleSlope RescaleIntercept RescaleType PixelPaddingValue "
    "PixelPaddingRangeLimit LossyImageCompression"
).split()
TAGS += [tag for tag in (*acquisition.TAGS, *dicom_frames.TAGS) if tag not in TAGS]


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of one DICOM slice.

    Attributes:
      path: the file; for a frame of an enhanced file its `dicom_frames.frame_path`.
      series: SeriesInstanceUID, or "".
      uid: SOPInstanceUID, or an id computed from the content.
      problem: why the file cannot be used; "" if it can.
      frame_of_reference: FrameOfReferenceUID, or "".
      orientation: six numbers: the directions (unit vectors, LPS) of increasing column number and
        of increasing row number.
      position: mm (LPS) of the first pixel, or None.
      shape: (rows, columns).
      spacing: mm between rows and between columns, as stored; nan where unknown.
      slope: RescaleSlope.
      intercept: RescaleIntercept.
      bits: BitsStored.
      signed: whether stored values are two's complement.
      syntax: UID of the transfer syntax.
      person: the values of `acquisition.PERSON`.
      marks: the values of `acquisition.MARKS`.
      times: the values of `acquisition.TIMES`.
      padding: PixelPaddingValue and PixelPaddingRangeLimit, equal without the latter; None if
        absent.
      body_part: BodyPartExamined, or "".
    """

    path: str
    series: str
    uid: str
    problem: str = ""
    frame_of_reference: str = ""
    orientation: tuple[float, ...] = ()
    position: tuple[float, ...] | None = None
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = (math.nan, math.nan)
    slope: float = 1.0
    intercept: float = 0.0
    bits: int = 16
    signed: bool = False
    syntax: str = ""
    person: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    padding: tuple[int, int] | None = None
    body_part: str = ""

    @property
    def standard_spacing(self) -> tuple[float, float]:
        """Mm between rows and between columns in the standard orientation."""
        rows, columns = self.spacing
        transposed = abs(self.orientation[0]) < abs(self.orientation[1])
        return (columns, rows) if transposed else (rows, columns)


def syntax_of(data: pydicom.Dataset) -> str:
    """The UID of the transfer syntax; without file meta information pydicom detects it."""
    if (syntax := value(_file_meta(data), "TransferSyntaxUID")) is not None:
        return str(syntax)
    _, little = data.original_encoding
    little = little is not False
    return dicom_uid.ImplicitVRLittleEndian if little else dicom_uid.ExplicitVRBigEndian


def _file_meta(data: pydicom.Dataset) -> pydicom.Dataset:
    """The file meta information; empty for a file without it."""
    return getattr(data, "file_meta", pydicom.dataset.FileMetaDataset())


def header_of(data: pydicom.Dataset, path: str, overrides: reading.Overrides) -> Header | None:
    """The header of the data set of a slice; None if it is not an image.

    Args:
      data: the elements in TAGS.
      path: the file or frame.
      overrides: whether lossy compression is allowed.
    """
    meta = _file_meta(data)
    storage = value(data, "SOPClassUID") or value(meta, "MediaStorageSOPClassUID") or ""
    modality = value(data, "Modality") or ""
    if not storage and not modality:
        claims = meta or pathlib.Path(path).suffix.lower() in NAMES
        return Header(path, "", "", "broken DICOM file: no SOPClassUID") if claims else None
    if "Rows" not in data and modality != "CT" and storage != dicom_uid.CTImageStorage:
        return None
    uid = value(data, "SOPInstanceUID") or value(meta, "MediaStorageSOPInstanceUID")
    if not uid:
        uid = content_id(containers.read_file(dicom_frames.split_path(path)[0]))
    if frame := dicom_frames.split_path(path)[1]:
        uid = f"{uid}:{frame}"
    header = Header(path, str(value(data, "SeriesInstanceUID") or ""), str(uid))
    syntax = syntax_of(data)
    if not modality and storage == dicom_uid.CTImageStorage and "Rows" in data:
        modality = "CT"
    try:
        problem = _problem(data, modality, storage, syntax)
        if not problem and not overrides.allow_lossy:
            problem = _lossy(data, syntax)
        if problem:
            return dataclasses.replace(header, problem=problem)
        orientation = _numbers(data, "ImageOrientationPatient", 6)
        if orientation is None:
            problem = "no ImageOrientationPatient: left and right are unknown"
        else:
            problem = _orientation_problem(orientation)
        return dataclasses.replace(
            header,
            problem=problem,
            frame_of_reference=str(value(data, "FrameOfReferenceUID") or ""),
            orientation=orientation or (),
            position=_numbers(data, "ImagePositionPatient", 3),
            shape=(value(data, "Rows"), value(data, "Columns")),
            spacing=_numbers(data, "PixelSpacing", 2) or (math.nan, math.nan),
            slope=float(value(data, "RescaleSlope")),
            intercept=float(value(data, "RescaleIntercept")),
            bits=value(data, "BitsStored"),
            signed=value(data, "PixelRepresentation") == 1,
            syntax=syntax,
            person=acquisition.marks(data, acquisition.PERSON),
            marks=acquisition.marks(data, acquisition.MARKS),
            times=acquisition.marks(data, acquisition.TIMES),
            padding=_padding(data),
            body_part=str(value(data, "BodyPartExamined") or "").strip(),
        )
    except Exception as error:
        return dataclasses.replace(header, problem=f"broken DICOM header ({one_line(error)})")


def _numbers(data: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """The `count` finite numbers of an element, or None if it is absent or empty."""
    values = value(data, name)
    if values is None or values == "":
        return None
    numbers = tuple(float(value) for value in values)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise Rejected(f"{name} {values}: expected {count} finite numbers")
    return numbers


def _padding(data: pydicom.Dataset) -> tuple[int, int] | None:
    """PixelPaddingValue and PixelPaddingRangeLimit as integers, whatever their VR."""
    little = data.original_encoding[1] is not False
    ends: list[int] = []
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = data.get(name)
        if isinstance(value, bytes) and len(value) >= 2:  # the VR is ambiguous: US or SS
            value = int.from_bytes(value[:2], "little" if little else "big")
        if not isinstance(value, int):
            break
        ends.append(value)
    return (ends[0], ends[-1]) if ends else None


def _problem(data: pydicom.Dataset, modality: str, storage: str, syntax: str) -> str:
    """The first reason why the pixels of a file cannot be converted to Hounsfield units, or ""."""
    not_hu = acquisition.not_hu(tuple(np.atleast_1d(value(data, "ImageType") or [])))
    bits = [value(data, key) for key in ("BitsAllocated", "BitsStored", "HighBit")]
    signed = value(data, "PixelRepresentation")
    shape = (value(data, "Rows"), value(data, "Columns"))
    slope, intercept = value(data, "RescaleSlope"), value(data, "RescaleIntercept")
    unit = str(value(data, "RescaleType") or "").strip()
    grey = (value(data, "SamplesPerPixel"), value(data, "PhotometricInterpretation"))
    frames = value(data, "NumberOfFrames")
    if modality != "CT":
        return f"modality {modality}, not CT" if modality else "no Modality in the header"
    if storage and storage != dicom_uid.CTImageStorage:
        return f"{dicom_uid.UID(storage).name}: only CT Image Storage and Enhanced CT are supported"
    if int(frames or 1) != 1:
        return f"{frames} frames in one file: only single slices are supported"
    if not_hu:
        return f"ImageType {not_hu}: not an axial slice of HU"
    if grey != (1, "MONOCHROME2"):
        return f"{grey[0]} samples per pixel, {grey[1]}: only 1 sample of MONOCHROME2 is supported"
    if syntax not in dicom_pixels.NATIVE and syntax not in dicom_pixels.DECODERS:
        return f"transfer syntax {dicom_uid.UID(syntax).name} ({syntax}) is not supported"
    if not all(isinstance(n, int) and 1 <= n <= LARGEST_MATRIX for n in shape):
        return f"matrix of {shape[0]} x {shape[1]} pixels: expected 1 to {LARGEST_MATRIX} each"
    eight = bits == [8, 8, 7] and syntax in dicom_pixels.LOSSY_JPEG
    if not eight and (bits[0] != 16 or not 10 <= (bits[1] or 0) <= 16 or bits[2] != bits[1] - 1):
        names = "BitsAllocated {}, BitsStored {}, HighBit {}".format(*bits)
        return f"{names}: expected 16, 10 to 16, BitsStored - 1"
    if signed not in (0, 1):
        return f"PixelRepresentation {signed}: expected 0 or 1"
    if slope is None or intercept is None:
        return "no RescaleSlope or RescaleIntercept: the values cannot be converted to HU"
    if not (0 < slope <= 1e6 and abs(intercept) <= 1e9):  # the rest overflows or is not finite
        return (
            f"RescaleSlope {slope} and RescaleIntercept {intercept}: expected a slope above 0 and "
            "at most 1e6, and an intercept of at most 1e9"
        )
    letters = "".join(filter(str.isalpha, unit.lower()))
    # GDCM and SimpleITK write US (unspecified), GE "Houndsfield Unit"; HU_MOD is another unit.
    if letters not in ("", "hu", "us", "unspecified") and not letters.startswith("houn"):
        return f"RescaleType {unit}: expected HU"
    return ""


def _lossy(data: pydicom.Dataset, syntax: str) -> str:
    """Why the header declares lossy compression, or ""."""
    if syntax in dicom_pixels.LOSSY_JPEG:
        return f"{dicom_uid.UID(syntax).name} ({syntax}): {dicom_pixels.LOSSY}"
    if str(value(data, "LossyImageCompression") or "").strip() == "01":
        return f"LossyImageCompression 01 ({syntax}): {dicom_pixels.LOSSY}"
    return ""


@functools.lru_cache(maxsize=64)
def _orientation_problem(orientation: tuple[float, ...]) -> str:
    along_columns, along_rows = np.reshape(orientation, (2, 3))
    lengths = np.linalg.norm([along_columns, along_rows], axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(along_columns @ along_rows) > 0.01:
        return f"ImageOrientationPatient {orientation}: expected two perpendicular unit vectors"
    try:
        z, _, _ = stored_axes(orientation)
    except Rejected as error:
        return str(error)
    return "" if z.axis == 0 else "sagittal or coronal slice: only axial slices are supported"


@functools.lru_cache(maxsize=64)
def stored_axes(orientation: tuple[float, ...]) -> tuple[geometry.StoredAxis, ...]:
    """`standard_axes` of a slice as a stored array [1, rows, columns]."""
    along_columns, along_rows = np.reshape(orientation, (2, 3))
    normal = np.cross(along_columns, along_rows)
    return geometry.standard_axes([normal, along_rows, along_columns])


def stack_affine(headers: Sequence[Header]) -> np.ndarray | None:
    """The affine of a stack of slices, head to feet: indices (x, y, z) to RAS in mm.

    The step from slice to slice is that of the positions, so that a tilted gantry gives a sheared
    affine. None for a single slice, or where spacing or positions are unknown.
    """
    first, last = headers[0], headers[-1]
    if len(headers) < 2 or first.position is None or last.position is None:
        return None
    along_columns, along_rows = np.reshape(first.orientation, (2, 3))
    stored = np.eye(4)  # indices (slice, row, column) to LPS
    stored[:3, 1] = along_rows * first.spacing[0]
    stored[:3, 2] = along_columns * first.spacing[1]
    stored[:3, 3] = first.position
    affine = geometry.standard_affine(stored, stored_axes(first.orientation), (1, *first.shape))
    affine[:3, 2] = np.subtract(last.position, first.position) / (len(headers) - 1)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine if np.isfinite(affine).all() else None
