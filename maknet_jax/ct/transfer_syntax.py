"""The encoding of a DICOM file by its content, where the header names another one.

Archives convert files and leave the old transfer syntax in the header. The content is used where it
is unambiguous: byte order and compression of the data set by its first element, and the encoding of
the pixels by their first bytes.
"""

import io
import struct
import zlib
from typing import IO, BinaryIO, cast

import pydicom
from pydicom import uid as dicom_uid
from pydicom.encaps import generate_frames

from maknet_jax.ct.elements import value
from maknet_jax.ct.reading import Bounded
from maknet_jax.errors import Rejected

_GROUPS = range(0x0002, 0x0030)  # a data set of an image starts with one of these
_RLE_SEGMENTS = 2  # of 16 bits per pixel
_BY_FRAME_HEADER = {  # the marker of the frame header -> (encoding, the syntaxes that have it)
    0xC0: (dicom_uid.JPEGBaseline8Bit, {dicom_uid.JPEGBaseline8Bit}),
    0xC1: (dicom_uid.JPEGExtended12Bit, {dicom_uid.JPEGExtended12Bit}),
    0xC3: (dicom_uid.JPEGLossless, {dicom_uid.JPEGLossless, dicom_uid.JPEGLosslessSV1}),
    0xF7: (dicom_uid.JPEGLSNearLossless, {dicom_uid.JPEGLSLossless, dicom_uid.JPEGLSNearLossless}),
}
_JPEG_2000 = {dicom_uid.JPEG2000Lossless, dicom_uid.JPEG2000}


def file_meta(file: IO[bytes]) -> pydicom.Dataset:
    """The file meta information, empty without a preamble; leaves the file at the data set."""
    bounded = cast("BinaryIO", Bounded(file))
    bounded.seek(128)
    if bounded.read(4) != b"DICM":
        return pydicom.Dataset()
    return pydicom.filereader.read_dataset(
        bounded,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, vr, length: tag.group != 2,
    )


def as_encoded(file: IO[bytes], limit: int) -> io.BytesIO | None:
    """What pydicom should read instead of a file that is deflated or misstates its encoding.

    Args:
      file: the file; its position changes.
      limit: the largest size of an inflated file in bytes.

    Returns:
      The content with a header that states its encoding; None if the file can be read as it is.

    Raises:
      Rejected: the deflated data are damaged, or too large.
    """
    syntax = str(value(file_meta(file), "TransferSyntaxUID") or "")
    if not syntax:
        return None
    end = file.tell()
    actual = _of_data_set(file.read(4096), syntax)
    deflated = actual == dicom_uid.DeflatedExplicitVRLittleEndian
    if actual == syntax and not deflated:
        return None
    uid = (str(dicom_uid.ExplicitVRLittleEndian) if deflated else actual).encode()
    uid += b"\0" * (len(uid) % 2)
    element = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid
    content = io.BytesIO()
    content.write(bytes(128) + b"DICM" + element)
    file.seek(end)
    if deflated:
        _inflate(file, content, limit)
    else:
        content.write(file.read())
    content.seek(0)
    return content


def bounded(file: IO[bytes]) -> BinaryIO:
    """What pydicom should read of a file with many items: a SEG or a DICOMDIR.

    Raises:
      Rejected: it inflates to more than 1 GiB, or is damaged. Reading it raises it beyond 20 times
        the elements of a CT slice.
    """
    content = as_encoded(file, 1 << 30)
    file.seek(0)
    return cast("BinaryIO", Bounded(content or file, 20))


def _inflate(file: IO[bytes], content: io.BytesIO, limit: int) -> None:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        while not stream.eof and (packed := stream.unconsumed_tail or file.read(1 << 20)):
            content.write(stream.decompress(packed, 1 << 20))
            if content.tell() > limit:
                raise Rejected(f"the deflated file inflates to more than {limit >> 20} MiB")
    except zlib.error as error:
        raise Rejected(f"the transfer syntax is deflated, but the data are not ({error})") from None
    if not stream.eof:
        raise Rejected("truncated: the deflated data end early")


def _of_data_set(first: bytes, syntax: str) -> str:
    """The UID of the byte order and compression of a data set, by its first bytes.

    It is `syntax`, the UID that the file declares, unless the bytes contradict it. pydicom tells
    explicit and implicit VR apart by itself.
    """
    little = int.from_bytes(first[:2], "little") in _GROUPS
    big = int.from_bytes(first[:2], "big") in _GROUPS
    explicit = first[4:6].isalpha()
    if _inflates(first):
        return dicom_uid.DeflatedExplicitVRLittleEndian
    if syntax == dicom_uid.DeflatedExplicitVRLittleEndian and not explicit:
        return syntax  # damaged
    if syntax in (dicom_uid.ExplicitVRBigEndian, dicom_uid.DeflatedExplicitVRLittleEndian):
        if little:
            return (
                dicom_uid.ExplicitVRLittleEndian if explicit else dicom_uid.ImplicitVRLittleEndian
            )
        return dicom_uid.ExplicitVRBigEndian if big else syntax
    return dicom_uid.ExplicitVRBigEndian if big and explicit else syntax


def _inflates(first: bytes) -> bool:
    """Whether bytes are the start of a deflated data set."""
    try:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(first, 64)
    except zlib.error:
        return False
    return int.from_bytes(content[:2], "little") in _GROUPS


def correct(data: pydicom.Dataset, syntax: str) -> str:
    """The encoding of the pixels of a single slice; also written into its file meta information.

    Args:
      data: the data set with its pixel data.
      syntax: the UID that the file declares.

    Returns:
      `syntax`, or the UID of the encoding that the pixels have instead.

    Raises:
      Rejected: the pixels are encapsulated although the syntax is not, in an unknown encoding.
    """
    actual = _of_pixels(data, syntax)
    if actual != syntax:
        data.file_meta.TransferSyntaxUID = dicom_uid.UID(actual)
    return actual


def _of_pixels(data: pydicom.Dataset, syntax: str) -> str:
    element = data.get_item("PixelData")
    if element is None or not element.value:
        return syntax
    undefined = getattr(element, "length", 0) == 0xFFFFFFFF  # before pydicom converts the element
    encapsulated = undefined or bool(getattr(element, "is_undefined_length", False))
    native = not dicom_uid.UID(syntax).is_encapsulated
    if not encapsulated:
        # Decoded by an archive that left the old transfer syntax in the header.
        return syntax if native else dicom_uid.ExplicitVRLittleEndian
    buffer = cast("BinaryIO", Bounded(io.BytesIO(element.value)))
    frame = next(generate_frames(buffer, number_of_frames=1), b"")
    encoding, possible = _of_frame(frame)
    if encoding is not None:
        return syntax if syntax in possible else encoding
    if native:
        raise Rejected(
            f"the transfer syntax is {dicom_uid.UID(syntax).name}, but the pixels are encapsulated "
            "in an unknown encoding"
        )
    return syntax  # damaged: the decoder says how


def _of_frame(frame: bytes) -> tuple[dicom_uid.UID | None, set[dicom_uid.UID]]:
    """(encoding, all syntaxes that have it) of an encoded frame; None if it is unknown."""
    if b"\xff\x4f\xff\x51" in frame[:1024]:
        return dicom_uid.JPEG2000, _JPEG_2000
    if int.from_bytes(frame[:4], "little") == _RLE_SEGMENTS and frame[4:8] == b"\x40\0\0\0":
        return dicom_uid.RLELossless, {dicom_uid.RLELossless}
    offset = 2
    while frame[:2] == b"\xff\xd8" and offset + 4 <= len(frame) and frame[offset] == 0xFF:
        if (marker := frame[offset + 1]) in _BY_FRAME_HEADER:
            return _BY_FRAME_HEADER[marker]
        offset += 2 + int.from_bytes(frame[offset + 2 : offset + 4], "big")
    return None, set()
