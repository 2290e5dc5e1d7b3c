"""DICOM CT slices: Hounsfield units in the standard orientation, or a reason why not.

The standard orientation of this project: slices run head to feet, rows anterior to posterior,
columns from the patient's right to the left (as DeepLesion and as radiologists look at CT).
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import pathlib
import struct
import tempfile
import threading
import zlib

import numpy as np
import pydicom
from pydicom import uid as dicom_uid
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder

from maknet_jax.ct.nifti import LARGEST_MATRIX, axial_turns, quiet
from maknet_jax.errors import Rejected

LARGEST_FILE = 256 << 20  # bytes, as stored and inflated: a slice of 4096 x 4096 takes 32 MiB

NATIVE = (
    dicom_uid.ImplicitVRLittleEndian,
    dicom_uid.ExplicitVRLittleEndian,
    dicom_uid.ExplicitVRBigEndian,
    dicom_uid.DeflatedExplicitVRLittleEndian,
)
# One decoder each: which of several installed ones runs must not decide the result.
DECODERS = {
    dicom_uid.RLELossless: "pydicom",
    dicom_uid.JPEG2000Lossless: "gdcm",
    dicom_uid.JPEG2000: "gdcm",
    dicom_uid.JPEGLSLossless: "gdcm",
    dicom_uid.JPEGLSNearLossless: "gdcm",
    dicom_uid.JPEGLossless: "gdcm",
    dicom_uid.JPEGLosslessSV1: "gdcm",
}
JPEG_LOSSLESS = (dicom_uid.JPEGLossless, dicom_uid.JPEGLosslessSV1)
LOSSY_JPEG = {f"1.2.840.10008.1.2.4.{k}" for k in (50, 51, 53, 55)}
_stderr_lock = threading.Lock()
NOT_A_SLICE = {"LOCALIZER", "SCREEN SAVE", "MIP", "PROJECTION IMAGE"}
TAGS = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel "
    "PhotometricInterpretation NumberOfFrames BitsAllocated BitsStored HighBit "
    "PixelRepresentation RescaleSlope RescaleIntercept RescaleType"
).split()


@dataclasses.dataclass(frozen=True)
class Header:
    """What one DICOM file says about its slice. `problem` is empty, or why it cannot be used.

    orientation: directions (unit vectors, LPS) of growing column and growing row number.
    position: mm (LPS) of the first pixel, or None. spacing: mm between rows and between columns.
    """

    path: str
    series: str
    uid: str
    problem: str = ""
    frame: str = ""
    orientation: tuple = ()
    position: tuple | None = None
    shape: tuple = ()
    spacing: tuple = (math.nan, math.nan)
    slope: float = 1.0
    intercept: float = 0.0
    bits: int = 16
    signed: bool = False
    syntax: str = ""


def looks_like_dicom(path):
    """Whether a file claims to be DICOM: by its content, or by a name such as `.dcm`."""
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    # Without a preamble a data set begins with group 0002 or 0008, little or (rarely) big endian.
    begins = start[:2] in (b"\x02\x00", b"\x08\x00") or start[:3] == b"\x00\x08\x00"
    return begins or pathlib.Path(path).suffix.lower() in (".dcm", ".ima", ".dicom")


def _inflated(path):
    """The content of a deflated file as explicit little endian, or None for any other file."""
    with open(path, "rb") as file:
        start = file.read(4096)
        if str(dicom_uid.DeflatedExplicitVRLittleEndian).encode() not in start:
            return None
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") != dicom_uid.DeflatedExplicitVRLittleEndian:
            return None
        # preamble, "DICM", the group length element, and the group whose length it gives
        file.seek(132 + 12 + meta.FileMetaInformationGroupLength)
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        content = stream.decompress(file.read(), LARGEST_FILE)
    if not stream.eof:
        if len(content) >= LARGEST_FILE:
            raise Rejected(f"the deflated file takes more than {LARGEST_FILE >> 20} MiB inflated")
        raise Rejected("truncated: the deflated data end too early")
    syntax = str(dicom_uid.ExplicitVRLittleEndian).encode() + b"\0"
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(syntax)) + syntax
    return io.BytesIO(bytes(128) + b"DICM" + meta + content)


def _read(path, pixels):
    """The data set of a file: the elements in TAGS, and the pixel data if `pixels`."""
    if os.path.getsize(path) > LARGEST_FILE:
        raise Rejected(f"the file is larger than {LARGEST_FILE >> 20} MiB: not a single CT slice")
    return pydicom.dcmread(
        _inflated(path) or path,
        force=True,
        stop_before_pixels=not pixels,
        specific_tags=[*TAGS, "PixelData"] if pixels else list(TAGS),
    )


def _one_line(error):
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_header(path):
    """Reads the header of a DICOM file; returns a Header, or None for what is no image at all.

    A DICOMDIR, a report, a structure set are no images; neither is a file that only looks like
    DICOM. Whatever else is wrong stands in `problem`; nothing is raised.
    """
    path = str(path)
    try:
        with quiet():
            return _header(_read(path, pixels=False), path)
    except Rejected as error:
        return Header(path, "", "", str(error))
    except Exception as error:  # pydicom raises anything on broken files, RecursionError included
        return Header(path, "", "", f"broken DICOM file ({_one_line(error)})")


def _header(data, path):
    meta = data.file_meta if hasattr(data, "file_meta") else {}
    storage = data.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""
    modality = data.get("Modality") or ""
    if not storage and not modality:
        claims = meta or pathlib.Path(path).suffix.lower() in (".dcm", ".ima", ".dicom")
        return Header(path, "", "", "broken DICOM file: no SOPClassUID") if claims else None
    if "Rows" not in data and modality != "CT" and storage != dicom_uid.CTImageStorage:
        return None
    uid = data.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID")
    if not uid:
        uid = "sha256:" + hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:32]
    names = {"path": path, "series": str(data.get("SeriesInstanceUID") or ""), "uid": str(uid)}
    # Without file meta information the transfer syntax is what pydicom recognised.
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None:
        _, little = data.original_encoding
        syntax = dicom_uid.ImplicitVRLittleEndian if little else dicom_uid.ExplicitVRBigEndian
    try:
        problem = _problem(data, modality, storage, syntax)
        if problem:
            return Header(**names, problem=problem)
        orientation = _numbers(data, "ImageOrientationPatient", 6)
        if orientation is None:
            problem = "no ImageOrientationPatient: left and right are unknown"
        else:
            problem = _orientation_problem(orientation)
        return Header(
            **names,
            problem=problem,
            frame=str(data.get("FrameOfReferenceUID") or ""),
            orientation=orientation or (),
            position=_numbers(data, "ImagePositionPatient", 3),
            shape=(data.Rows, data.Columns),
            spacing=_numbers(data, "PixelSpacing", 2) or (math.nan, math.nan),
            slope=float(data.RescaleSlope),
            intercept=float(data.RescaleIntercept),
            bits=data.BitsStored,
            signed=data.PixelRepresentation == 1,
            syntax=str(syntax),
        )
    except Exception as error:
        return Header(**names, problem=f"broken DICOM header ({_one_line(error)})")


def _numbers(data, name, count):
    """`count` finite numbers of an element, or None where it is absent or empty."""
    values = data.get(name)
    if values is None or values == "":
        return None
    numbers = tuple(float(value) for value in values)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise Rejected(f"{name} is {values}, not {count} numbers")
    return numbers


def _problem(data, modality, storage, syntax):
    """The first reason why the pixels of a file are not Hounsfield units that we understand."""
    name = dicom_uid.UID(storage).name
    types = {str(item).strip().upper() for item in np.atleast_1d(data.get("ImageType") or [])}
    bits = [data.get(key) for key in ("BitsAllocated", "BitsStored", "HighBit")]
    signed = data.get("PixelRepresentation")
    shape = (data.get("Rows"), data.get("Columns"))
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    units = str(data.get("RescaleType") or "").strip()
    grey = (data.get("SamplesPerPixel"), data.get("PhotometricInterpretation"))
    syntax = dicom_uid.UID(syntax)
    if modality != "CT":
        return f"modality {modality}, not CT" if modality else "no Modality in the header"
    if storage and storage != dicom_uid.CTImageStorage:
        return f"{name}: only single-slice CT Image Storage is understood"
    if int(data.get("NumberOfFrames") or 1) != 1:
        return f"{data.NumberOfFrames} frames in one file: only single slices are understood"
    if types & NOT_A_SLICE:
        return f"ImageType {sorted(types & NOT_A_SLICE)[0]}: not an axial slice"
    if grey != (1, "MONOCHROME2"):
        return f"{grey[0]} samples of {grey[1]}: only one of MONOCHROME2 is understood"
    if syntax in LOSSY_JPEG:
        return f"{syntax.name} ({syntax}): lossy JPEG, its HU cannot be trusted"
    if syntax not in NATIVE and syntax not in DECODERS:
        return f"transfer syntax {syntax.name} ({syntax}) is not understood"
    if not all(isinstance(n, int) and 1 <= n <= LARGEST_MATRIX for n in shape):
        return f"a matrix of {shape[0]} x {shape[1]}: 1 to {LARGEST_MATRIX} is understood"
    if bits[0] != 16 or not 10 <= (bits[1] or 0) <= 16 or bits[2] != bits[1] - 1:
        return "BitsAllocated {}, BitsStored {}, HighBit {}: not a CT pixel".format(*bits)
    if signed not in (0, 1):
        return f"PixelRepresentation {signed}: 0 or 1 is understood"
    if slope is None or intercept is None:
        return "no RescaleSlope or RescaleIntercept: the values are not HU"
    if not (math.isfinite(slope) and slope > 0 and math.isfinite(intercept)):
        return f"RescaleSlope {slope} and RescaleIntercept {intercept}: the values are not HU"
    if units not in ("", "HU"):
        return f"RescaleType {units}: the values are not HU"
    return ""


def _orientation_problem(orientation):
    along_columns, along_rows = np.reshape(orientation, (2, 3))
    lengths = np.linalg.norm([along_columns, along_rows], axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(along_columns @ along_rows) > 0.01:
        return f"ImageOrientationPatient {orientation} is no pair of directions"
    normal = np.cross(along_columns, along_rows)
    try:
        turns = axial_turns([normal, along_rows, along_columns])
    except Rejected as error:
        return str(error)
    return "" if turns[0][0] == 0 else "not axial: a sagittal or coronal image"


def read_slice(path):
    """Reads one file; returns (Header, int16 [rows, columns] HU in the standard orientation).

    HU = stored value x slope + intercept, exact where both are integers, else rounded to the
    nearest (halves to even), and clipped to int16. Padding stays what it is.

    Raises:
      Rejected: with the reason.
    """
    path = str(path)
    try:
        with quiet():
            data = _read(path, pixels=True)
            header = _header(data, path)
            if header is None:
                raise Rejected("not a CT image")
            if header.problem:
                raise Rejected(header.problem)
            stored = _stored_values(data, header)
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"broken DICOM pixel data ({_one_line(error)})") from error
    if header.slope.is_integer() and header.intercept.is_integer():
        hu = stored.astype(np.int64) * int(header.slope) + int(header.intercept)
    else:
        hu = np.rint(stored * header.slope + header.intercept)
    hu = np.clip(hu, -32768, 32767).astype(np.int16)
    directions = np.reshape(header.orientation, (2, 3))[::-1]
    turns = axial_turns([np.cross(directions[1], directions[0]), *directions])
    (y_axis, y_flip), (_, x_flip) = turns[1:]
    hu = hu if y_axis == 1 else hu.T
    return header, np.ascontiguousarray(hu[:: -1 if y_flip else 1, :: -1 if x_flip else 1])


def spacing_of(header):
    """Millimetres between rows and between columns in the standard orientation."""
    transposed = abs(header.orientation[0]) < abs(header.orientation[1])
    return header.spacing[::-1] if transposed else header.spacing


def _stored_values(data, header):
    """The stored pixel values [rows, columns], checked to fit into BitsStored."""
    if "PixelData" not in data:
        raise Rejected("no pixel data")
    rows, columns = header.shape
    if header.syntax in NATIVE:
        size = rows * columns * 2
        if len(data.PixelData) != size:
            state = "truncated" if len(data.PixelData) < size else "oversized"
            raise Rejected(f"{state} pixel data: {len(data.PixelData)} bytes, expected {size}")
        order_of_bytes = ">" if header.syntax == dicom_uid.ExplicitVRBigEndian else "<"
        kind = f"{order_of_bytes}{'i' if header.signed else 'u'}2"
        values = np.frombuffer(data.PixelData, kind).reshape(rows, columns)
    else:
        _check_encoded(data.PixelData, header)
        with _complaints_refused() if header.syntax in JPEG_LOSSLESS else contextlib.nullcontext():
            values, _ = get_decoder(header.syntax).as_array(
                data, decoding_plugin=DECODERS[header.syntax], correct_unused_bits=False
            )
        if values.shape != header.shape:
            raise Rejected(f"the decoded matrix is {values.shape}, expected {header.shape}")
    values = values.astype(np.int32)
    low = -(1 << (header.bits - 1)) if header.signed else 0
    if values.min() < low or values.max() >= low + (1 << header.bits):
        raise Rejected(
            f"stored values from {values.min()} to {values.max()} do not fit into "
            f"BitsStored {header.bits}"
        )
    return values


@contextlib.contextmanager
def _complaints_refused():
    """Refuses an image about which libjpeg complains.

    It writes "Corrupt JPEG data" to the process's stderr, invents the rest of the image and
    reports success, so that line is the only sign. What else was written there is passed on.
    """
    with _stderr_lock, tempfile.TemporaryFile() as heard:
        stderr = os.dup(2)
        try:
            os.dup2(heard.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            heard.seek(0)
            lines = heard.read().splitlines(keepends=True)
            os.write(stderr, b"".join(line for line in lines if b"JPEG" not in line))
            os.close(stderr)
    for line in lines:
        if b"JPEG" in line:
            raise Rejected(f"broken pixel data: {line.decode(errors='replace').strip()}")


def _check_encoded(pixel_data, header):
    """Refuses an encoded image that is cut off or that would decode to something huge."""
    frames = list(generate_frames(pixel_data, number_of_frames=1))
    if len(frames) != 1:
        raise Rejected(f"{len(frames)} encoded frames, expected 1")
    frame = frames[0]
    rows, columns = header.shape
    if len(frame) > 4 * rows * columns + 4096:
        raise Rejected("the encoded image is larger than the decoded one")
    if header.syntax == dicom_uid.RLELossless:
        return
    if frame.rstrip(b"\0")[-2:] != b"\xff\xd9":
        raise Rejected("truncated pixel data: the encoded image has no end marker")
    if _encoded_shape(frame) != header.shape:
        raise Rejected(f"the encoded matrix is {_encoded_shape(frame)}, expected {header.shape}")


def _encoded_shape(frame):
    """(rows, columns) that the header of a JPEG, JPEG-LS or JPEG 2000 stream states, or None."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if 0 <= start < 1024:  # JPEG 2000: SIZ holds the right, lower, left and upper edges
        right, lower, left, upper = struct.unpack_from(">4I", frame, start + 8)
        return (lower - upper, right - left)
    place = 2
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        marker, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">2H", frame, place + 5)
        place += 2 + length
    return None
