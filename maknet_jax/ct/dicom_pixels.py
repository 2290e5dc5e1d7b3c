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

LOSSY_JPEG = (dicom_uid.JPEGBaseline8Bit, dicom_uid.JPEGExtended12Bit)
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
    **dict.fromkeys(LOSSY_JPEG, "gdcm"),
}

_JPEG_2000 = (dicom_uid.JPEG2000Lossless, dicom_uid.JPEG2000)
_JPEG_LS = (dicom_uid.JPEGLSLossless, dicom_uid.JPEGLSNearLossless)
LOSSY = "lossy compression does not preserve HU; add --allow-lossy (allow_lossy=True) to read it"


def stored_values(
    data: pydicom.Dataset, *, shape: tuple[int, ...], signed: bool, syntax: str, lossy: bool
) -> np.ndarray:
    """Decodes the pixels of a slice.

    Args:
      data: the data set with its pixel data.
      shape: (rows, columns) of the header.
      signed: whether the values are two's complement.
      syntax: the UID of the transfer syntax, one of NATIVE or DECODERS.
      lossy: whether lossy compression is allowed.

    Returns:
      [rows, columns], before slope and intercept, with the bits above BitsStored: int16 or uint16,
      or int32 where a decoder returns another type.

    Raises:
      Rejected: the data are missing, truncated, of another size, damaged, or lossy.
    """
    if "PixelData" not in data:
        raise Rejected("no pixel data")
    if syntax in NATIVE:
        values = _native_values(data.PixelData, shape, signed, syntax)
    else:
        frame = _encoded_frame(data.PixelData, shape, syntax)
        loss = "" if lossy else _loss(frame, syntax)
        if loss:
            raise Rejected(f"{loss}: {LOSSY}")
        values = decoding.decode(data, syntax, DECODERS[syntax])
        if values.shape != shape:
            raise Rejected(f"the decoded matrix is {values.shape}, expected {shape}")
    usual = values.itemsize == 2 and values.dtype.kind == ("i" if signed else "u")
    return values.astype(values.dtype.newbyteorder("=") if usual else np.int32, copy=False)


def significant_bits(values: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Drops the bits above BitsStored, which may hold anything (PS3.5, 8.1.1).

    Args:
      values: the result of `stored_values`.
      bits: BitsStored.
      signed: whether the values are two's complement; the sign is extended.
    """
    if bits == 16:
        return values
    values = values & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return (values ^ sign) - sign if signed else values


def padded_pixels(
    stored: np.ndarray, padding: tuple[int, int] | None, bits: int, signed: bool
) -> np.ndarray | None:
    """The pixels that PixelPaddingValue and PixelPaddingRangeLimit declare as padding.

    Args:
      stored: the result of `stored_values`.
      padding: the two elements (PS3.3, C.7.5.1.1.2) as written; equal for a single value.
      bits: BitsStored.
      signed: whether the values are two's complement. Writers disagree on the sign of padding, so
        the elements are compared as 16-bit patterns of this kind.

    Returns:
      bool, of the shape of `stored`; None if there is no such pixel.
    """
    if padding is None:
        return None
    low, high = sorted(
        (value + 32768) % 65536 - 32768 if signed else value % 65536 for value in padding
    )
    inside = (stored >= low) & (stored <= high)
    lowest = -(1 << (bits - 1)) if signed else 0
    if bits < 16 and low >= lowest and high < lowest + (1 << bits):  # may be stored in `bits` only
        values = significant_bits(stored, bits, signed)
        inside |= (values >= low) & (values <= high)
    return inside if inside.any() else None


def _native_values(
    pixel_data: bytes, shape: tuple[int, ...], signed: bool, syntax: str
) -> np.ndarray:
    rows, columns = shape
    size = rows * columns * 2
    rest = pixel_data[size:]
    padding = len(rest) < size and rest[:1] in b"\0\xff" and not rest.strip(rest[:1])
    if len(pixel_data) < size or not padding:
        state = "truncated" if len(pixel_data) < size else "oversized"
        raise Rejected(f"{state} pixel data: {len(pixel_data)} bytes, expected {size}")
    byte_order = ">" if syntax == dicom_uid.ExplicitVRBigEndian else "<"
    kind = f"{byte_order}{'i' if signed else 'u'}2"
    return np.frombuffer(pixel_data, kind, count=rows * columns).reshape(shape)


def _encoded_frame(pixel_data: bytes, shape: tuple[int, ...], syntax: str) -> bytes:
    """The encoded image; rejects one that is truncated or whose decoded size would be too large."""
    buffer = cast("BinaryIO", Bounded(io.BytesIO(pixel_data)))
    frames = list(generate_frames(buffer, number_of_frames=1))
    if len(frames) != 1:
        raise Rejected(f"{len(frames)} encoded frames, expected 1")
    frame = frames[0]
    rows, columns = shape
    if len(frame) > 4 * rows * columns + 4096:
        raise Rejected("the encoded image is larger than the decoded one")
    if syntax == dicom_uid.RLELossless:
        return frame
    if frame.rstrip(b"\0\xff")[-2:] != b"\xff\xd9":
        raise Rejected("truncated pixel data: the encoded image has no end marker")
    if _encoded_shape(frame) != shape:
        raise Rejected(f"the encoded matrix is {_encoded_shape(frame)}, expected {shape}")
    return frame


def _loss(frame: bytes, syntax: str) -> str:
    """How the compression of an image is lossy; "" if it is not."""
    if syntax in LOSSY_JPEG:
        return f"lossy JPEG ({syntax})"
    if syntax in _JPEG_2000:
        return "" if _reversible(frame) else f"irreversible JPEG 2000 ({syntax})"
    if syntax in _JPEG_LS:
        # NEAR follows the component selectors of SOS (ISO 14495-1, C.2.3).
        start = frame.find(b"\xff\xda")
        near = frame[start + 5 + 2 * frame[start + 4]]
        return f"JPEG-LS with an error of up to {near} ({syntax})" if near else ""
    return ""


def _reversible(frame: bytes) -> bool:
    """Whether a JPEG 2000 stream uses the reversible wavelet (ISO 15444-1, A.6.1 and A.6.2)."""
    offset = frame.index(b"\xff\x4f\xff\x51") + 2
    wavelets = []
    while frame[offset + 1] != 0x90:  # the first tile part ends the main header
        if frame[offset + 1] in (0x52, 0x53):  # COD, COC
            wavelets.append(frame[offset + (13 if frame[offset + 1] == 0x52 else 10)])
        offset += 2 + int.from_bytes(frame[offset + 2 : offset + 4], "big")
    return all(wavelet == 1 for wavelet in wavelets)


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
