"""DICOM Segmentation objects (SEG) as masks of their CT series.

Frames are matched with CT slices by the SOPInstanceUIDs that they reference, never by their order.
Reading needs highdicom, the extra `dicom-seg`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom import uid as dicom_uid

from maknet_jax import files
from maknet_jax.ct import containers, dicom, geometry, transfer_syntax
from maknet_jax.ct.reading import one_line, quiet
from maknet_jax.errors import InputError, Rejected, installing

# pydicom 3.0 has no name for the second, Label Map Segmentation Storage.
SEGMENTATIONS = (dicom_uid.SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")
_TAGS = (
    "SOPClassUID PatientID SeriesInstanceUID SegmentationType SegmentSequence "
    "ReferencedSeriesSequence"
).split()
_SAME = 1e-3  # of direction cosines and pixel spacing
_SAME_POSITION = 0.1  # mm


@dataclasses.dataclass(frozen=True)
class SegHeader:
    """The header of a SEG file.

    Attributes:
      path: the file.
      patient: PatientID, or "".
      series: the SeriesInstanceUID of the CT series that it segments.
      segments: (segment number, segment label) pairs.
    """

    path: str
    patient: str
    series: str
    segments: tuple[tuple[int, str], ...]


def is_segmentation(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a DICOM SEG, by its file meta information."""
    try:
        with quiet(), containers.open_file(path) as file:
            meta = transfer_syntax.file_meta(file)
            return meta.get("MediaStorageSOPClassUID") in SEGMENTATIONS
    except OSError:
        raise
    except Exception:  # pydicom raises any exception on broken files; a CT reader reports them
        return False


def read_header(path: str | os.PathLike[str]) -> SegHeader:
    """Reads the header of a SEG file; does not need highdicom.

    Raises:
      Rejected: the file is broken, of several series, or its segments are fractional, unnamed or
        share a name or number.
    """
    try:
        with quiet(), containers.open_file(path) as file:
            data = pydicom.dcmread(
                transfer_syntax.bounded(file), stop_before_pixels=True, specific_tags=list(_TAGS)
            )
            kind = str(data.get("SegmentationType") or "")
            series = [
                str(item.SeriesInstanceUID) for item in data.get("ReferencedSeriesSequence", [])
            ]
            segments = tuple(
                (int(item.SegmentNumber), files.printable(str(item.SegmentLabel).strip()))
                for item in data.SegmentSequence
                if int(item.SegmentNumber) != 0  # the background of a label map
            )
            patient = str(data.get("PatientID") or "")
    except Exception as error:  # pydicom raises any exception on broken files
        raise Rejected(f"broken DICOM SEG header ({one_line(error)})") from error
    if kind not in ("BINARY", "LABELMAP"):
        raise Rejected(f"SegmentationType {kind}: only BINARY and LABELMAP are supported")
    if len(set(series)) != 1:
        raise Rejected(f"references {len(set(series))} series: expected one CT series")
    names = [name for _, name in segments if name]
    if len({number for number, _ in segments}) < len(segments):
        raise Rejected("two segments have the same number: numbers must be unique")
    if len(set(names)) < len(segments):
        raise Rejected("two segments have the same label, or one has none: labels must be unique")
    return SegHeader(str(path), patient, series[0], segments)


def require_highdicom(what: str = "DICOM SEG", extra: str = "dicom-seg") -> Any:
    """Imports highdicom.

    Args:
      what: what needs it, for the message.
      extra: the extra of this package that installs it.

    Raises:
      InputError: it is not installed.
    """
    try:
        import highdicom
    except ImportError:
        raise InputError(f"{what} needs highdicom: {installing(extra)}") from None
    return highdicom


class Segmentation:
    """A SEG file and its CT series; their geometry is compared slice by slice."""

    def __init__(self, path: str | os.PathLike[str], slices: Sequence[dicom.Header]) -> None:
        """Opens the file.

        Args:
          path: the SEG file.
          slices: the headers of its CT series, head to feet.

        Raises:
          InputError: highdicom is not installed.
          Rejected: the file is broken, or its grid differs from that of the CT.
        """
        highdicom = require_highdicom()
        self._slices = slices
        try:
            with quiet(), containers.open_file(path) as file:
                self._seg = highdicom.seg.segread(file)
                self._check_grid()
        except Rejected:
            raise
        except Exception as error:  # highdicom raises any exception on broken files
            raise Rejected(f"broken DICOM SEG ({one_line(error)})") from error

    def mask(self, number: int) -> np.ndarray:
        """The mask of a segment: bool [Z, Y, X], head to feet. Slices without a frame are empty.

        Raises:
          Rejected: the frames cannot be decoded.
        """
        try:
            with quiet():
                frames = self._seg.get_pixels_by_source_instance(
                    [header.uid for header in self._slices],
                    segment_numbers=[number],
                    ignore_spatial_locations=True,  # compared in _check_grid instead
                    assert_missing_frames_are_empty=True,
                    skip_overlap_checks=True,
                )
        except Exception as error:
            raise Rejected(f"broken DICOM SEG frames ({one_line(error)})") from error
        axes = dicom.stored_axes(self._slices[0].orientation)
        # Slices are already in order: only rows and columns are converted to the standard order.
        planes = [geometry.to_standard(frame[None, ..., 0] > 0, axes)[0] for frame in frames]
        return np.stack(planes)

    def _check_grid(self) -> None:
        first = self._slices[0]
        shape = (self._seg.Rows, self._seg.Columns)
        if shape != first.shape:
            raise Rejected(f"frames of {shape} pixels, but the CT has {first.shape}")
        by_uid = {header.uid: header for header in self._slices}
        shared = self._seg.SharedFunctionalGroupsSequence[0]
        frames = self._seg.PerFrameFunctionalGroupsSequence
        if len(frames) != int(self._seg.NumberOfFrames):
            raise Rejected(
                f"NumberOfFrames is {self._seg.NumberOfFrames}, but "
                f"PerFrameFunctionalGroupsSequence has {len(frames)} items"
            )
        segments = {int(item.SegmentNumber) for item in self._seg.SegmentSequence}
        for number, frame in enumerate(frames, start=1):
            if self._seg.SegmentationType == "BINARY":
                item = _group("SegmentIdentificationSequence", frame, shared)
                if int(item.ReferencedSegmentNumber) not in segments:
                    raise Rejected(
                        f"frame {number} references segment {item.ReferencedSegmentNumber}, which "
                        "is not in SegmentSequence"
                    )
            sources = {
                str(source.ReferencedSOPInstanceUID)
                for derivation in frame.get("DerivationImageSequence", [])
                for source in derivation.get("SourceImageSequence", [])
            }
            if len(sources) != 1 or not sources <= by_uid.keys():
                other = "another slice" if len(sources) == 1 else f"{len(sources)} slices"
                raise Rejected(
                    f"frame {number} references {other}: expected one slice of the CT series"
                )
            header = by_uid[sources.pop()]
            measures = _group("PixelMeasuresSequence", frame, shared)
            orientation = _group("PlaneOrientationSequence", frame, shared)
            position = _group("PlanePositionSequence", frame, shared)
            for name, values, expected, tolerance in (
                ("pixel spacing", measures.PixelSpacing, header.spacing, _SAME),
                ("orientation", orientation.ImageOrientationPatient, header.orientation, _SAME),
                ("position", position.ImagePositionPatient, header.position, _SAME_POSITION),
            ):
                if not np.allclose(np.asarray(values, float), expected, rtol=0, atol=tolerance):
                    raise Rejected(
                        f"another grid than the CT: {name} of frame {number} is "
                        f"{[float(value) for value in values]}, that of its slice "
                        f"{[float(value) for value in expected or ()]}"
                    )


def _group(name: str, frame: pydicom.Dataset, shared: pydicom.Dataset) -> pydicom.Dataset:
    """The item of a functional group, of the frame or shared by all frames."""
    return (frame if name in frame else shared)[name].value[0]
