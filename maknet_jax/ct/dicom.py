"""DICOM CT slices in Hounsfield units and the standard orientation of `geometry`."""

import dataclasses
import io
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence
from typing import IO, BinaryIO, cast

import numpy as np
import pydicom
from pydicom import uid as dicom_uid

from maknet_jax.ct import containers, dicom_pixels, geometry, reading, units
from maknet_jax.ct.reading import LARGEST_MATRIX, content_id, one_line, quiet
from maknet_jax.errors import Rejected

LARGEST_FILE = 256 << 20  # bytes
LARGEST_INFLATED = 64 << 20  # bytes of a deflated file: a slice of 4096 x 4096 takes 32 MiB

_NAMES = (".dcm", ".ima", ".dicom")
_NOT_A_SLICE = {"LOCALIZER", "SCREEN SAVE", "MIP", "PROJECTION IMAGE"}
_TAGS = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel "
    "BodyPartExamined PhotometricInterpretation NumberOfFrames BitsAllocated BitsStored HighBit "
    "PixelRepresentation RescaleSlope RescaleIntercept RescaleType PixelPaddingValue "
    "PixelPaddingRangeLimit LossyImageCompression"
).split()


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of one DICOM slice.

    Attributes:
      path: the file.
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
    padding: tuple[int, int] | None = None
    body_part: str = ""

    @property
    def standard_spacing(self) -> tuple[float, float]:
        """Mm between rows and between columns in the standard orientation."""
        rows, columns = self.spacing
        transposed = abs(self.orientation[0]) < abs(self.orientation[1])
        return (columns, rows) if transposed else (rows, columns)


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file claims to be DICOM: by its content, or by a name such as `.dcm`."""
    with containers.open_file(path) as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    # Without a preamble a data set starts with group 0002 or 0008, little or (rarely) big endian.
    begins = start[:2] in (b"\x02\x00", b"\x08\x00") or start[:3] == b"\x00\x08\x00"
    return begins or pathlib.Path(path).suffix.lower() in _NAMES


def file_meta(file: IO[bytes]) -> pydicom.Dataset:
    """The file meta information, empty without a preamble; leaves the file at the data set."""
    bounded = cast("BinaryIO", reading.Bounded(file))
    bounded.seek(128)
    if bounded.read(4) != b"DICM":
        return pydicom.Dataset()
    return pydicom.filereader.read_dataset(
        bounded,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, vr, length: tag.group != 2,
    )


def _inflated(file: IO[bytes]) -> io.BytesIO | None:
    """The content of a deflated file as explicit little endian, or None for any other file."""
    syntax = file_meta(file).get("TransferSyntaxUID")
    if syntax != dicom_uid.DeflatedExplicitVRLittleEndian:
        return None
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    uid = str(dicom_uid.ExplicitVRLittleEndian).encode() + b"\0"
    element = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    content = io.BytesIO()
    content.write(bytes(128) + b"DICM" + element)
    while not stream.eof and (packed := stream.unconsumed_tail or file.read(1 << 20)):
        content.write(stream.decompress(packed, 1 << 20))
        if content.tell() > LARGEST_INFLATED:
            raise Rejected(f"the deflated file inflates to more than {LARGEST_INFLATED >> 20} MiB")
    if not stream.eof:
        raise Rejected("truncated: the deflated data end early")
    content.seek(0)
    return content


def _read(path: str, *, pixels: bool) -> pydicom.Dataset:
    """The data set of a file: the elements in _TAGS, and the pixel data if `pixels`."""
    if containers.size(path) > LARGEST_FILE:
        raise Rejected(
            f"the file is larger than {LARGEST_FILE >> 20} MiB, the limit for a CT slice"
        )
    with containers.open_file(path) as file:
        content = _inflated(file)
        file.seek(0)
        if content is None and pixels and not isinstance(file, io.BufferedReader):
            content = io.BytesIO(file.read())  # verifies the checksum of a member of a zip
        return pydicom.dcmread(
            cast("BinaryIO", reading.Bounded(content or file)),
            force=True,
            stop_before_pixels=not pixels,
            specific_tags=[*_TAGS, "PixelData"] if pixels else list(_TAGS),
        )


def read_header(
    path: str | os.PathLike[str], overrides: reading.Overrides = reading.STRICT
) -> Header | None:
    """Reads the header of a DICOM file; a broken file raises nothing.

    Args:
      path: the file.
      overrides: whether lossy compression is allowed.

    Returns:
      A Header, whose `problem` says what is wrong with the file; None for a file that is not an
      image (a DICOMDIR, a report, a structure set) or that only looks like DICOM.
    """
    path = str(path)
    try:
        with quiet():
            return _header(_read(path, pixels=False), path, overrides)
    except Rejected as error:
        return Header(path, "", "", str(error))
    except Exception as error:  # pydicom raises any exception on broken files, even RecursionError
        return Header(path, "", "", f"broken DICOM file ({one_line(error)})")


def _header(data: pydicom.Dataset, path: str, overrides: reading.Overrides) -> Header | None:
    meta = data.file_meta if hasattr(data, "file_meta") else pydicom.dataset.FileMetaDataset()
    storage = data.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""
    modality = data.get("Modality") or ""
    if not storage and not modality:
        claims = meta or pathlib.Path(path).suffix.lower() in _NAMES
        return Header(path, "", "", "broken DICOM file: no SOPClassUID") if claims else None
    if "Rows" not in data and modality != "CT" and storage != dicom_uid.CTImageStorage:
        return None
    uid = data.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID")
    if not uid:
        uid = content_id(containers.read_file(path))
    header = Header(path, str(data.get("SeriesInstanceUID") or ""), str(uid))
    # Without file meta information pydicom detects the encoding.
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None:
        _, little = data.original_encoding
        syntax = dicom_uid.ImplicitVRLittleEndian if little else dicom_uid.ExplicitVRBigEndian
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
            frame_of_reference=str(data.get("FrameOfReferenceUID") or ""),
            orientation=orientation or (),
            position=_numbers(data, "ImagePositionPatient", 3),
            shape=(data.Rows, data.Columns),
            spacing=_numbers(data, "PixelSpacing", 2) or (math.nan, math.nan),
            slope=float(data.RescaleSlope),
            intercept=float(data.RescaleIntercept),
            bits=data.BitsStored,
            signed=data.PixelRepresentation == 1,
            syntax=str(syntax),
            padding=_padding(data),
            body_part=str(data.get("BodyPartExamined") or "").strip(),
        )
    except Exception as error:
        return dataclasses.replace(header, problem=f"broken DICOM header ({one_line(error)})")


def _numbers(data: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """The `count` finite numbers of an element, or None if it is absent or empty."""
    values = data.get(name)
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
    name = dicom_uid.UID(storage).name
    types = {str(item).strip().upper() for item in np.atleast_1d(data.get("ImageType") or [])}
    bits = [data.get(key) for key in ("BitsAllocated", "BitsStored", "HighBit")]
    signed = data.get("PixelRepresentation")
    shape = (data.get("Rows"), data.get("Columns"))
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    unit = str(data.get("RescaleType") or "").strip()
    grey = (data.get("SamplesPerPixel"), data.get("PhotometricInterpretation"))
    transfer = dicom_uid.UID(syntax)
    if modality != "CT":
        return f"modality {modality}, not CT" if modality else "no Modality in the header"
    if storage and storage != dicom_uid.CTImageStorage:
        return f"{name}: only single-slice CT Image Storage is supported"
    if int(data.get("NumberOfFrames") or 1) != 1:
        return f"{data.NumberOfFrames} frames in one file: only single slices are supported"
    if types & _NOT_A_SLICE:
        return f"ImageType {sorted(types & _NOT_A_SLICE)[0]}: not an axial slice"
    if grey != (1, "MONOCHROME2"):
        return f"{grey[0]} samples per pixel, {grey[1]}: only 1 sample of MONOCHROME2 is supported"
    if syntax not in dicom_pixels.NATIVE and syntax not in dicom_pixels.DECODERS:
        return f"transfer syntax {transfer.name} ({syntax}) is not supported"
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
    if str(data.get("LossyImageCompression") or "").strip() == "01":
        return f"LossyImageCompression 01 ({syntax}): {dicom_pixels.LOSSY}"
    return ""


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


def read_slice(
    path: str | os.PathLike[str],
    values: units.Values | None = None,
    overrides: reading.Overrides = reading.STRICT,
) -> tuple[Header, np.ndarray]:
    """Reads one file.

    HU = stored value x slope + intercept, exact where both are integers, else rounded to the
    nearest (halves to even), and clipped to int16. Declared padding becomes air.

    Args:
      path: the file.
      values: counts the HU, for the unit check of the series.
      overrides: whether lossy compression is allowed.

    Returns:
      (header, hu): hu is int16 [rows, columns] in the standard orientation.

    Raises:
      Rejected: the file cannot be used; the message is the reason.
    """
    path = str(path)
    try:
        with quiet():
            data = _read(path, pixels=True)
            header = _header(data, path, overrides)
            if header is None:
                raise Rejected("not a CT image")
            if header.problem:
                raise Rejected(header.problem)
            stored = dicom_pixels.stored_values(
                data,
                shape=header.shape,
                signed=header.signed,
                syntax=header.syntax,
                lossy=overrides.allow_lossy,
            )
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"broken DICOM pixel data ({one_line(error)})") from error
    padded = dicom_pixels.padded_pixels(stored, header.padding, header.bits, header.signed)
    stored = dicom_pixels.significant_bits(stored, header.bits, header.signed)
    slope, intercept = header.slope, header.intercept
    exact = slope.is_integer() and intercept.is_integer() and max(slope, abs(intercept)) < 1 << 32
    if exact:
        small = 65536 * slope + abs(intercept) < 1 << 31
        stored = stored.astype(np.int32 if small else np.int64, copy=False)
        slope, intercept = int(slope), int(intercept)
    plane = stored * slope + intercept
    hu = (units.Values() if values is None else values).add(plane, padded)
    return header, np.ascontiguousarray(
        geometry.to_standard(hu[None], stored_axes(header.orientation))[0]
    )
