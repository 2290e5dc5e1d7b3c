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

LARGEST_FILE = 256 << 20  # bytes
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
    _check_size(path)
    with containers.open_file(path) as file:
        source: IO[bytes] = file
        if pixels and not isinstance(file, io.BufferedReader):
            source = io.BytesIO(file.read())  # at once, which verifies the checksum of a zip
        content = transfer_syntax.as_encoded(source, LARGEST_INFLATED)
        source.seek(0)
        return pydicom.dcmread(
            cast("BinaryIO", reading.Bounded(content or source)),
            force=True,
            stop_before_pixels=not pixels,
            specific_tags=[*TAGS, "PixelData"] if pixels else list(TAGS),
        )


def _check_size(path: str) -> None:
    size, limit, what = containers.size(path), LARGEST_FILE, "a CT slice"
    if size > limit:
        with containers.open_file(path) as file:
            if (
                transfer_syntax.file_meta(file).get("MediaStorageSOPClassUID")
                in dicom_frames.ENHANCED
            ):
                limit, what = LARGEST_SERIES, "a multi-frame CT"
    if size > limit:
        raise Rejected(f"the file is larger than {limit >> 20} MiB, the limit for {what}")


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
        try:
            with quiet():
                found = dict(_slices(file, only, pixels=True))
            for frame in wanted:
                name = file if frame is None else dicom_frames.frame_path(file, frame)
                if name not in found:
                    raise Rejected(f"{len(found)} frames in one file: expected a single slice")
                yield name, _read_slice(found.pop(name), name, values, overrides)
        except Rejected:
            raise
        except Exception as error:
            raise Rejected(f"broken DICOM pixel data ({one_line(error)})") from error


def _read_slice(
    data: pydicom.Dataset,
    path: str,
    values: units.Values | None,
    overrides: reading.Overrides,
) -> tuple[Header, np.ndarray]:
    with quiet():
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
