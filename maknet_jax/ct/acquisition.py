"""What a DICOM header says about the acquisition and the kind of an image, beside its geometry."""

import functools
import re
import sys
from collections.abc import Iterable

import pydicom
from pydicom.tag import Tag

# Elements that tell acquisitions or reconstructions in one series apart. If they alternate from
# slice to slice, two are mixed.
DECISIVE = (
    "SeriesNumber",
    "AcquisitionNumber",
    "AcquisitionUID",
    "IrradiationEventUID",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "StackID",
    "NominalPercentageOfCardiacPhase",
    "ConvolutionKernel",
    "KVP",
)
# Elements that may differ for other reasons.
MARKS = (
    *DECISIVE,
    "ReconstructionAlgorithm",
    "FilterType",
    "ContrastBolusAgent",
    "SeriesDescription",
    "SeriesTime",
    "SliceThickness",
    "ImageType",
)
# Elements by which slices are ordered in time.
TIMES = ("AcquisitionDateTime", "AcquisitionTime", "ContentTime", "InstanceNumber")
PERSON = ("PatientID", "StudyInstanceUID")
TAGS = (*MARKS, *TIMES, *PERSON)
_NUMBERS = {name: Tag(name) for name in TAGS}

# Words of ImageType (with spaces for underscores) that say that an image is not a slice of HU:
# DICOM's terms (PS3.3, C.8.2.1.1.1 and C.8.16.1), and those that vendors write.
_NOT_HU = (
    "LOCALIZER",
    "TOP",
    "TOPO",
    "TOPOGRAM",
    "SCOUT",
    "SURVIEW",
    "SCANOGRAM",
    "SCREEN SAVE",
    "PROT",
    "DOSE",
    "DOSE INFO",
    "PROJECTION IMAGE",
    "MIP",
    "MINIP",
    "MAX IP",
    "MIN IP",
    "MAXIMUM",
    "MINIMUM",
    "VRT",
    "VOLUME RENDER",
    "SURFACE RENDER",
    "SSD",
    "SUBTRACTION",
    "SUBTRACTED",
    "MULTIPLICATION",
    "DIVISION",
    "STD DEVIATION",
    "QUANTITY",
    "MATERIAL",
    "MAT SPECIFIC",
    "MAT REMOVED",
    "MAT FRACTIONAL",
    "MAT VALUE BASED",
    "EFF ATOMIC NUM",
    "ELECTRON DENSITY",
    "PERFUSION",
)


def marks(data: pydicom.Dataset, names: Iterable[str]) -> tuple[str, ...]:
    """The values of some elements as text, to be compared; "" where one is absent."""
    return tuple(sys.intern(_text(data, name)) for name in names)


def _text(data: pydicom.Dataset, name: str) -> str:
    # As stored: the conversion of values takes a fifth of the time to read a header.
    element = data.get_item(_NUMBERS[name])
    value = None if element is None else element.value
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return "" if value is None else str(value).strip("\0 ")


@functools.lru_cache(maxsize=256)
def not_hu(image_type: tuple[str, ...]) -> str:
    """The first value of ImageType that says that an image is not a slice of HU, or ""."""
    for value in image_type:
        words = f" {re.sub(r'[^A-Z0-9]+', ' ', str(value).upper()).strip()} "
        if any(f" {word} " in words for word in _NOT_HU):
            return str(value).strip()
    return ""
