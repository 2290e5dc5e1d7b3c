"""Values of DICOM elements, each converted once: most are equal in all slices of a series."""

import functools
from typing import Any

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import AMBIGUOUS_VR

_LONGEST = 1024  # bytes; longer values are not cached


def value(data: pydicom.Dataset, keyword: str) -> Any:
    """`data.get(keyword)`; a value may be shared, so it must not be changed.

    Converting the elements of a header takes longer than decoding native pixels.
    """
    tag, ambiguous = _tag(keyword)
    raw = data.get_item(tag)
    if raw is None:
        return None
    encodings = data.original_character_set
    if not isinstance(raw, RawDataElement) or not raw.value or len(raw.value) > _LONGEST:
        return data.get(keyword)
    if ambiguous or not encodings:
        return data.get(keyword)
    names = encodings if isinstance(encodings, str) else tuple(encodings)
    return _converted(keyword, raw.VR, raw.value, raw.is_implicit_VR, raw.is_little_endian, names)


@functools.lru_cache(maxsize=256)
def _tag(keyword: str) -> tuple[BaseTag, bool]:
    """The tag of an element, and whether its type depends on other elements (US or SS)."""
    return Tag(keyword), dictionary_VR(keyword) in AMBIGUOUS_VR


@functools.lru_cache(maxsize=4096)
def _converted(
    keyword: str,
    vr: str | None,
    content: bytes,
    implicit: bool,
    little_endian: bool,
    encodings: str | tuple[str, ...],
) -> Any:
    raw = RawDataElement(_tag(keyword)[0], vr, len(content), content, 0, implicit, little_endian)
    names = encodings if isinstance(encodings, str) else list(encodings)
    return convert_raw_data_element(raw, encoding=names).value
