"""DICOM CT slices in Hounsfield units and the standard orientation of `geometry`."""

import io
import itertools
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, BinaryIO, cast

import numpy as np
import pydicom
from pydicom.tag import BaseTag, Tag

from maknet_jax.ct import (
    containers,
    dicom_frames,
    dicom_pixels,
    geometry,
    reading,
    transfer_syntax,
    units,
)
from maknet_jax.ct.dicom_header import NAMES, TAGS, Header, header_of, syntax_of
from maknet_jax.ct.dicom_header import stack_affine as stack_affine
from maknet_jax.ct.dicom_header import stored_axes as stored_axes
from maknet_jax.ct.reading import LARGEST_SERIES, one_line, quiet
from maknet_jax.errors import Rejected

_WITHOUT_PIXELS: list[BaseTag | int] = list(map(Tag, TAGS))  # parsed once, not for each file
_WITH_PIXELS = [*_WITHOUT_PIXELS, Tag("PixelData")]
LARGEST_FILE = 256 << 20  # bytes
SMALL = 16 << 20  # bytes of a file that is read at once
LARGEST_INFLATED = 64 << 20  # bytes of a deflated file: a slice of 4096 x 4096 takes 32 MiB


def looks_like_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file claims to be DICOM: by its content, or by a name such as `.dcm`."""
    with containers.open_file(path) as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    # Without a preamble a data set starts with group 0002 or 0008, little or (rarely) big endian.
    begins = start[:2] in (b"\x02\x00", b"\x08\x00") or start[:3] == b"\x00\x08\x00"
    return begins or pathlib.Path(path).suffix.lower() in NAMES


def _read(path: str, *, pixels: bool) -> pydicom.Dataset:
    """The data set of a file: the elements in TAGS, and the pixel data if `pixels`."""
    size = _checked_size(path)
    with containers.open_file(path) as file:
        source: IO[bytes] = file
        if pixels and (size <= SMALL or not isinstance(file, io.BufferedReader)):
            source = io.BytesIO(file.read())  # at once: faster, and verifies the checksum of a zip
        content = transfer_syntax.as_encoded(source, LARGEST_INFLATED)
        source.seek(0)
        return pydicom.dcmread(
            cast("BinaryIO", reading.bounded(content or source)),
            force=True,
            stop_before_pixels=not pixels,
            specific_tags=_WITH_PIXELS if pixels else _WITHOUT_PIXELS,
        )


def _checked_size(path: str) -> int:
    """The size of a file in bytes; rejects one that is too large."""
    size, limit, kind = containers.size(path), LARGEST_FILE, "a CT slice"
    if size > limit:
        with containers.open_file(path) as file:
            storage = transfer_syntax.file_meta(file).get("MediaStorageSOPClassUID")
        if storage in dicom_frames.ENHANCED:
            limit, kind = LARGEST_SERIES, "a multi-frame CT"
    if size > limit:
        raise Rejected(f"the file is larger than {limit >> 20} MiB, the limit for {kind}")
    return size


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
    native = syntax_of(data) in dicom_pixels.NATIVE
    for number, frame in dicom_frames.flatten(data, native=native, only=only):
        yield dicom_frames.frame_path(path, number), frame


def read_headers(
    path: str | os.PathLike[str], overrides: reading.Overrides = reading.STRICT
) -> list[Header]:
    """Reads the headers of the slices in a DICOM file; a broken file raises nothing.

    Args:
      path: a file, or the `dicom_frames.frame_path` of one frame.
      overrides: whether lossy compression is allowed.

    Returns:
      One Header per slice, whose `problem` says what is wrong with it: one for a single slice, one
      per frame for enhanced multi-frame CT, none for a file that is not an image (a DICOMDIR, a
      report, a structure set) or that only looks like DICOM.
    """
    file, frame = dicom_frames.split_path(str(path))
    try:
        with quiet():
            slices = _slices(file, (frame,) if frame else (), pixels=False)
            return [header for name, data in slices if (header := header_of(data, name, overrides))]
    except Rejected as error:
        return [Header(file, "", "", str(error))]
    except Exception as error:  # pydicom raises any exception on broken files, even RecursionError
        return [Header(file, "", "", f"broken DICOM file ({one_line(error)})")]


def read_header(
    path: str | os.PathLike[str], overrides: reading.Overrides = reading.STRICT
) -> Header | None:
    """The only header of `read_headers`, or None for a file that is not an image."""
    headers = read_headers(path, overrides)
    return headers[0] if headers else None


def read_slice(
    path: str | os.PathLike[str], overrides: reading.Overrides = reading.STRICT
) -> tuple[Header, np.ndarray]:
    """The only slice of `read_slices`."""
    ((_, content),) = read_slices([path], overrides=overrides)
    return content


def read_slices(
    paths: Iterable[str | os.PathLike[str]],
    values: units.Values | None = None,
    overrides: reading.Overrides = reading.STRICT,
) -> Iterator[tuple[str, tuple[Header, np.ndarray]]]:
    """Reads slices; the frames of one file that follow each other are read at once.

    HU = stored value x slope + intercept, exact where both are integers, else rounded to the
    nearest (halves to even), and clipped to int16. Declared padding becomes air.

    Args:
      paths: files, or `dicom_frames.frame_path` of frames.
      values: counts the HU, for the unit check of the series.
      overrides: whether lossy compression is allowed.

    Yields:
      (path, (header, hu)): hu is int16 [rows, columns] in the standard orientation.

    Raises:
      Rejected: a file cannot be used; the message is the reason.
    """
    names = (dicom_frames.split_path(str(path)) for path in paths)
    for file, group in itertools.groupby(names, key=operator.itemgetter(0)):
        wanted = [frame for _, frame in group]
        only = [frame for frame in wanted if frame is not None]
        data_sets: dict[str, pydicom.Dataset] = {}
        try:
            for number, frame in enumerate(wanted):
                name = file if frame is None else dicom_frames.frame_path(file, frame)
                with quiet():
                    if number == 0:
                        data_sets = dict(_slices(file, only, pixels=True))
                    if name not in data_sets:
                        count = len(data_sets)
                        raise Rejected(f"{count} frames in one file: expected a single slice")
                    header, stored = _stored_values(data_sets.pop(name), name, overrides)
                hu = _to_hu(header, stored, units.Values() if values is None else values)
                yield name, (header, hu)
        except Rejected:
            raise
        except Exception as error:
            raise Rejected(f"broken DICOM pixel data ({one_line(error)})") from error


def _stored_values(
    data: pydicom.Dataset, path: str, overrides: reading.Overrides
) -> tuple[Header, np.ndarray]:
    """The header of a slice and its stored values, which may have any bits above BitsStored."""
    header = header_of(data, path, overrides)
    if header is None:
        raise Rejected("not a CT image")
    if header.problem:
        raise Rejected(header.problem)
    stored = dicom_pixels.stored_values(
        data,
        shape=header.shape,
        signed=header.signed,
        syntax=transfer_syntax.correct(data, header.syntax),
        lossy=overrides.allow_lossy,
    )
    return header, stored


def _to_hu(header: Header, stored: np.ndarray, values: units.Values) -> np.ndarray:
    """Int16 HU in the standard orientation from stored values; `values` counts them."""
    padded = dicom_pixels.padded_pixels(stored, header.padding, header.bits, header.signed)
    stored = dicom_pixels.significant_bits(stored, header.bits, header.signed)
    hu = values.add(_rescaled(stored, header), padded)
    return np.ascontiguousarray(geometry.to_standard(hu[None], stored_axes(header.orientation))[0])


def _rescaled(stored: np.ndarray, header: Header) -> np.ndarray:
    """Stored values x slope + intercept: integers where both are, of 16 bits where they fit."""
    slope, intercept = header.slope, header.intercept
    exact = slope.is_integer() and intercept.is_integer() and max(slope, abs(intercept)) < 1 << 32
    if not exact:
        return stored * slope + intercept
    step, shift = int(slope), int(intercept)
    low = shift - (header.signed << (header.bits - 1))
    fits = units.LOWEST <= low and low + (1 << header.bits) - 1 <= units.HIGHEST
    if step == 1 and stored.itemsize == 2 and fits:
        values = stored.view(np.int16)
        return values + np.int16(shift) if shift else values
    small = 65536 * slope + abs(intercept) < 1 << 31
    return stored.astype(np.int32 if small else np.int64) * step + shift
