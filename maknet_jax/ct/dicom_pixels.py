"""The stored pixel values of a DICOM slice in all supported transfer syntaxes."""

import io
import struct
from typing import BinaryIO, cast

import numpy as np
import pydicom
from pydicom import uid as dicom_uid
from pydicom.encaps import generate_frames

from maknet_jax.ct import decoding
from maknet_jax.ct.reading import Bounded
from maknet_jax.errors import Rejected

NATIVE = (
    dicom_uid.ImplicitVRLittleEndian,
    dicom_uid.ExplicitVRLittleEndian,
    dicom_uid.ExplicitVRBigEndian,
    dicom_uid.DeflatedExplicitVRLittleEndian,
)
# One decoder each, so that the result does not depend on which decoders are installed. GDCM aborts
# the process on some damaged streams and runs in a child process; the others raise exceptions.
DECODERS: dict[str, str] = {
    dicom_uid.RLELossless: "pydicom",
    dicom_uid.JPEG2000Lossless: "pylibjpeg",
    dicom_uid.JPEG2000: "pylibjpeg",
    dicom_uid.JPEGLSLossless: "pyjpegls",
    dicom_uid.JPEGLSNearLossless: "pyjpegls",
    dicom_uid.JPEGLossless: "gdcm",
    dicom_uid.JPEGLosslessSV1: "gdcm",
}
LOSSY_JPEG = {f"1.2.840.10008.1.2.4.{k}" for k in (50, 51, 53, 55)}


def stored_values(
    data: pydicom.Dataset, *, shape: tuple[int, ...], bits: int, signed: bool, syntax: str
) -> np.ndarray:
    """Decodes the pixels of a slice.

    Args:
      data: the data set with its pixel data.
      shape: (rows, columns) of the header.
      bits: BitsStored.
      signed: whether the values are two's complement.
      syntax: the UID of the transfer syntax, one of NATIVE or DECODERS.

    Returns:
      int32 [rows, columns], before slope and intercept.

    Raises:
      Rejected: the data are missing, truncated, of another size or damaged, or exceed `bits`.
    """
    if "PixelData" not in data:
        raise Rejected("no pixel data")
    if syntax in NATIVE:
        values = _native_values(data.PixelData, shape, signed, syntax)
    else:
        _check_encoded(data.PixelData, shape, syntax)
        values = decoding.decode(data, syntax, DECODERS[syntax])
        if values.shape != shape:
            raise Rejected(f"the decoded matrix is {values.shape}, expected {shape}")
    values = values.astype(np.int32)
    low = -(1 << (bits - 1)) if signed else 0
    if values.min() < low or values.max() >= low + (1 << bits):
        raise Rejected(
            f"stored values from {values.min()} to {values.max()} do not fit into BitsStored {bits}"
        )
    return values


def _native_values(
    pixel_data: bytes, shape: tuple[int, ...], signed: bool, syntax: str
) -> np.ndarray:
    rows, columns = shape
    size = rows * columns * 2
    if len(pixel_data) != size:
        state = "truncated" if len(pixel_data) < size else "oversized"
        raise Rejected(f"{state} pixel data: {len(pixel_data)} bytes, expected {size}")
    byte_order = ">" if syntax == dicom_uid.ExplicitVRBigEndian else "<"
    return np.frombuffer(pixel_data, f"{byte_order}{'i' if signed else 'u'}2").reshape(shape)


def _check_encoded(pixel_data: bytes, shape: tuple[int, ...], syntax: str) -> None:
    """Rejects an encoded image that is truncated or whose decoded size would be too large."""
    buffer = cast("BinaryIO", Bounded(io.BytesIO(pixel_data)))
    frames = list(generate_frames(buffer, number_of_frames=1))
    if len(frames) != 1:
        raise Rejected(f"{len(frames)} encoded frames, expected 1")
    frame = frames[0]
    rows, columns = shape
    if len(frame) > 4 * rows * columns + 4096:
        raise Rejected("the encoded image is larger than the decoded one")
    if syntax == dicom_uid.RLELossless:
        return
    if frame.rstrip(b"\0")[-2:] != b"\xff\xd9":
        raise Rejected("truncated pixel data: the encoded image has no end marker")
    if _encoded_shape(frame) != shape:
        raise Rejected(f"the encoded matrix is {_encoded_shape(frame)}, expected {shape}")


def _encoded_shape(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the header of a JPEG, JPEG-LS or JPEG 2000 stream, or None."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if 0 <= start < 1024:  # JPEG 2000: SIZ holds the right, lower, left and upper edges
        right, lower, left, upper = struct.unpack_from(">4I", frame, start + 8)
        return lower - upper, right - left
    offset = 2
    while offset + 9 <= len(frame) and frame[offset] == 0xFF:
        marker, length = frame[offset + 1], int.from_bytes(frame[offset + 2 : offset + 4], "big")
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack_from(">2H", frame, offset + 5)
            return rows, columns
        offset += 2 + length
    return None
