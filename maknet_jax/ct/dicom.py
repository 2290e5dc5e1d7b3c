"""DICOM CT slices in Hounsfield units and the standard orientation of `geometry`."""

import dataclasses
import itertools
import math
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pydicom
from pydicom import uid as dicom_uid

from maknet_jax.ct import acquisition, dicom_frames, dicom_pixels, geometry, transfer_syntax
from maknet_jax.ct.reading import (
    LARGEST_MATRIX,
    LARGEST_SERIES,
    content_id,
    one_line,
    quiet,
)
from maknet_jax.errors import Rejected

LARGEST_FILE = 256 << 20  # bytes, as stored and inflated: a slice of 4096 x 4096 takes 32 MiB

_NAMES = (".dcm", ".ima", ".dicom")
_TAGS = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel "
    "BodyPartExamined PhotometricInterpretation NumberOfFrames BitsAllocated BitsStored HighBit "
    "PixelRepresentation RescaleSlope RescaleIntercept RescaleType"
).split()
_TAGS += [tag for tag in (*acquisition.TAGS, *dicom_frames.TAGS) if tag not in _TAGS]


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
    body_part: str = ""

    @property
    def standard_spacing(self) -> tuple[float, float]:
        """Mm between rows and between columns in the standard orientation."""
        rows, columns = self.spacing
        transposed = abs(self.orientation[0]) < abs(self.orientation[1])
        return (columns, rows) if transposed else (rows, columns)


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file claims to be DICOM: by its content, or by a name such as `.dcm`."""
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    # Without a preamble a data set starts with group 0002 or 0008, little or (rarely) big endian.
    begins = start[:2] in (b"\x02\x00", b"\x08\x00") or start[:3] == b"\x00\x08\x00"
    return begins or pathlib.Path(path).suffix.lower() in _NAMES


def _read(path: str, *, pixels: bool) -> pydicom.Dataset:
    """The data set of a file: the elements in _TAGS, and the pixel data if `pixels`."""
    limit, what = LARGEST_FILE, "a CT slice"
    if os.path.getsize(path) > limit:
        with open(path, "rb") as file:
            start = file.read(4096)
        if any(uid.encode() in start for uid in dicom_frames.ENHANCED):
            limit, what = LARGEST_SERIES, "a multi-frame CT"
    if os.path.getsize(path) > limit:
        raise Rejected(f"the file is larger than {limit >> 20} MiB, the limit for {what}")
    return pydicom.dcmread(
        transfer_syntax.open_as_encoded(path, LARGEST_FILE),
        force=True,
        stop_before_pixels=not pixels,
        specific_tags=[*_TAGS, "PixelData"] if pixels else list(_TAGS),
    )


def _slices(
    path: str, only: Sequence[int] = (), *, pixels: bool
) -> Iterator[tuple[str, pydicom.Dataset]]:
    """Yields (name, data set) of the slices in a file: one, or the frames of an enhanced file.

    Args:
      path: the file.
      only: the numbers of the wanted frames; empty for all.
      pixels: whether to read the pixel data.
    """
    data = _read(path, pixels=pixels)
    if not dicom_frames.is_enhanced(data):
        yield path, data
        return
    native = _syntax(data) in dicom_pixels.NATIVE
    for number, frame in dicom_frames.flatten(data, native=native, only=only):
        yield dicom_frames.frame_path(path, number), frame


def _syntax(data: pydicom.Dataset) -> str:
    """The UID of the transfer syntax; without file meta information pydicom detects it."""
    meta = data.file_meta if hasattr(data, "file_meta") else pydicom.dataset.FileMetaDataset()
    if (syntax := meta.get("TransferSyntaxUID")) is not None:
        return str(syntax)
    _, little = data.original_encoding
    little = little is not False
    return dicom_uid.ImplicitVRLittleEndian if little else dicom_uid.ExplicitVRBigEndian


def read_headers(path: str | os.PathLike[str]) -> list[Header]:
    """Reads the headers of the slices in a DICOM file; a broken file raises nothing.

    Args:
      path: a file, or the `dicom_frames.frame_path` of one frame.

    Returns:
      One Header per slice, whose `problem` says what is wrong with it: one for a single slice, one
      per frame for enhanced multi-frame CT, none for a file that is not an image (a DICOMDIR, a
      report, a structure set) or that only looks like DICOM.
    """
    file, frame = dicom_frames.split_path(str(path))
    try:
        with quiet():
            slices = _slices(file, (frame,) if frame else (), pixels=False)
            return [header for name, data in slices if (header := _header(data, name))]
    except Rejected as error:
        return [Header(file, "", "", str(error))]
    except Exception as error:  # pydicom raises any exception on broken files, even RecursionError
        return [Header(file, "", "", f"broken DICOM file ({one_line(error)})")]


def read_header(path: str | os.PathLike[str]) -> Header | None:
    """The only header of `read_headers`, or None for a file that is not an image."""
    headers = read_headers(path)
    return headers[0] if headers else None


def _header(data: pydicom.Dataset, path: str) -> Header | None:
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
        uid = content_id(pathlib.Path(path).read_bytes())
    if frame := dicom_frames.split_path(path)[1]:
        uid = f"{uid}:{frame}"
    header = Header(path, str(data.get("SeriesInstanceUID") or ""), str(uid))
    syntax = _syntax(data)
    if not modality and storage == dicom_uid.CTImageStorage and "Rows" in data:
        modality = "CT"
    try:
        problem = _problem(data, modality, storage, syntax)
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
            syntax=syntax,
            person=acquisition.marks(data, acquisition.PERSON),
            marks=acquisition.marks(data, acquisition.MARKS),
            times=acquisition.marks(data, acquisition.TIMES),
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


def _problem(data: pydicom.Dataset, modality: str, storage: str, syntax: str) -> str:
    """The first reason why the pixels of a file cannot be converted to Hounsfield units, or ""."""
    name = dicom_uid.UID(storage).name
    not_hu = acquisition.not_hu(np.atleast_1d(data.get("ImageType") or []))
    bits = [data.get(key) for key in ("BitsAllocated", "BitsStored", "HighBit")]
    signed = data.get("PixelRepresentation")
    shape = (data.get("Rows"), data.get("Columns"))
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    units = str(data.get("RescaleType") or "").strip()
    grey = (data.get("SamplesPerPixel"), data.get("PhotometricInterpretation"))
    transfer = dicom_uid.UID(syntax)
    if modality != "CT":
        return f"modality {modality}, not CT" if modality else "no Modality in the header"
    if storage and storage != dicom_uid.CTImageStorage:
        return f"{name}: only CT Image Storage and Enhanced CT are supported"
    if int(data.get("NumberOfFrames") or 1) != 1:
        return f"{data.NumberOfFrames} frames in one file: only single slices are supported"
    if not_hu:
        return f"ImageType {not_hu}: not an axial slice of HU"
    if grey != (1, "MONOCHROME2"):
        return f"{grey[0]} samples per pixel, {grey[1]}: only 1 sample of MONOCHROME2 is supported"
    if syntax in dicom_pixels.LOSSY_JPEG:
        return f"{transfer.name} ({syntax}): lossy JPEG does not preserve HU"
    if syntax not in dicom_pixels.NATIVE and syntax not in dicom_pixels.DECODERS:
        return f"transfer syntax {transfer.name} ({syntax}) is not supported"
    if not all(isinstance(n, int) and 1 <= n <= LARGEST_MATRIX for n in shape):
        return f"matrix of {shape[0]} x {shape[1]} pixels: expected 1 to {LARGEST_MATRIX} each"
    if bits[0] != 16 or not 10 <= (bits[1] or 0) <= 16 or bits[2] != bits[1] - 1:
        names = "BitsAllocated {}, BitsStored {}, HighBit {}".format(*bits)
        return f"{names}: expected 16, 10 to 16, BitsStored - 1"
    if signed not in (0, 1):
        return f"PixelRepresentation {signed}: expected 0 or 1"
    if slope is None or intercept is None:
        return "no RescaleSlope or RescaleIntercept: the values cannot be converted to HU"
    if not (math.isfinite(slope) and slope > 0 and math.isfinite(intercept)):
        return f"RescaleSlope {slope} and RescaleIntercept {intercept}: expected finite, slope > 0"
    if units not in ("", "HU"):
        return f"RescaleType {units}: expected HU"
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


def read_slice(path: str | os.PathLike[str]) -> tuple[Header, np.ndarray]:
    """The only slice of `read_slices`."""
    ((_, content),) = read_slices([path])
    return content


def read_slices(
    paths: Iterable[str | os.PathLike[str]],
) -> Iterator[tuple[str, tuple[Header, np.ndarray]]]:
    """Reads slices; the frames of one file that follow each other are read at once.

    HU = stored value x slope + intercept, exact where both are integers, else rounded to the
    nearest (halves to even), and clipped to int16. Padding values are not changed.

    Args:
      paths: files, or `dicom_frames.frame_path` of frames.

    Yields:
      (path, (header, hu)): hu is int16 [rows, columns] in the standard orientation.

    Raises:
      Rejected: a file cannot be used; the message is the reason.
    """
    names = (dicom_frames.split_path(str(path)) for path in paths)
    for file, group in itertools.groupby(names, key=operator.itemgetter(0)):
        wanted = [frame for _, frame in group]
        only = [frame for frame in wanted if frame is not None]
        try:
            with quiet():
                found = dict(_slices(file, only, pixels=True))
            for frame in wanted:
                name = file if frame is None else dicom_frames.frame_path(file, frame)
                if name not in found:
                    raise Rejected(f"{len(found)} frames in one file: expected a single slice")
                yield name, _read_slice(found.pop(name), name)
        except Rejected:
            raise
        except Exception as error:
            raise Rejected(f"broken DICOM pixel data ({one_line(error)})") from error


def _read_slice(data: pydicom.Dataset, path: str) -> tuple[Header, np.ndarray]:
    with quiet():
        header = _header(data, path)
        if header is None:
            raise Rejected("not a CT image")
        if header.problem:
            raise Rejected(header.problem)
        stored = dicom_pixels.stored_values(
            data,
            shape=header.shape,
            bits=header.bits,
            signed=header.signed,
            syntax=transfer_syntax.correct(data, header.syntax),
        )
    if header.slope.is_integer() and header.intercept.is_integer():
        hu = stored.astype(np.int64) * int(header.slope) + int(header.intercept)
    else:
        hu = np.rint(stored * header.slope + header.intercept)
    hu = np.clip(hu, -32768, 32767).astype(np.int16)
    return header, np.ascontiguousarray(
        geometry.to_standard(hu[None], stored_axes(header.orientation))[0]
    )
