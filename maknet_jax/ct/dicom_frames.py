"""The frames of enhanced multi-frame CT, each as a data set like that of a single slice.

An enhanced object keeps the geometry and the rescale parameters of its frames in functional groups:
one item that all frames share, and one item per frame (PS3.3, C.7.6.16). Flattened, a frame passes
the same checks as a single slice and is decoded by the same code.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pydicom
from pydicom import uid as dicom_uid
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.encaps import encapsulate, generate_frames

from maknet_jax.ct import containers
from maknet_jax.ct.elements import value
from maknet_jax.errors import Rejected

ENHANCED = (dicom_uid.EnhancedCTImageStorage, dicom_uid.LegacyConvertedEnhancedCTImageStorage)
TAGS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")

# Elements of functional groups and the elements of a single slice with the same meaning.
_NAMES = {
    "FrameType": "ImageType",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
}


def frame_path(path: str, number: int) -> str:
    """The name of a frame of a file; frames are counted from 1, as in DICOM."""
    return f"{path}#frame={number}"


def split_path(path: str) -> tuple[str, int | None]:
    """(file, number of the frame) of a name; None for a file."""
    match = re.fullmatch(r"(.+)#frame=(\d+)", path)
    return (match[1], int(match[2])) if match else (path, None)


def in_order(paths: Iterable[str]) -> list[str]:
    """`containers.in_order` of files and frames."""
    return sorted(paths, key=lambda path: containers.reading_order(split_path(path)[0]))


def is_enhanced(data: pydicom.Dataset) -> bool:
    """Whether a data set is enhanced multi-frame CT."""
    return value(data, "SOPClassUID") in ENHANCED


def flatten(
    data: pydicom.Dataset, *, native: bool, only: Sequence[int] = ()
) -> Iterator[tuple[int, pydicom.Dataset]]:
    """Yields (number, data set) of the frames, each with its pixels if `data` has pixels.

    Args:
      data: an enhanced CT image.
      native: whether its pixels are not encapsulated.
      only: the numbers of the wanted frames, counted from 1; empty for all.

    Raises:
      Rejected: the functional groups or the frames of pixels do not match NumberOfFrames.
    """
    count = int(data.get("NumberOfFrames") or 1)
    groups = data.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count:
        raise Rejected(f"{len(groups)} per-frame functional groups for {count} frames")
    common = pydicom.Dataset()
    for element in data:
        if element.keyword not in (*TAGS, "PixelData", "NumberOfFrames"):
            common.add(element)
    _set(common, "SOPClassUID", dicom_uid.CTImageStorage)
    for item in data.get("SharedFunctionalGroupsSequence") or []:
        _add_group(common, item)
    frames = _pixels(data, count, native)
    if only and not set(only) <= set(range(1, count + 1)):
        raise Rejected(f"frame {max(only)} of a file of {count} frames")
    for number, (item, pixels) in enumerate(zip(groups, frames, strict=True), start=1):
        if only and number not in only:
            continue
        frame = pydicom.Dataset()
        frame.update(common)
        frame.file_meta = getattr(data, "file_meta", pydicom.dataset.FileMetaDataset())
        _add_group(frame, item)
        _set(frame, "InstanceNumber", number)
        if pixels is not None:
            frame.add_new("PixelData", "OB" if not native else "OW", pixels)
            frame["PixelData"].is_undefined_length = not native
        yield number, frame


def _add_group(frame: pydicom.Dataset, groups: pydicom.Dataset) -> None:
    """Copies the elements of all functional groups of an item."""
    for group in groups:
        if group.VR != "SQ" or not group.value:
            continue
        for element in group.value[0]:
            if element.VR != "SQ" and element.keyword:
                _set(frame, _NAMES.get(element.keyword, element.keyword), element.value)


def _set(frame: pydicom.Dataset, keyword: str, content: Any) -> None:
    # Assigning an attribute would change the element that the frames share.
    tag = tag_for_keyword(keyword)
    if tag is not None:
        frame.add(pydicom.DataElement(tag, dictionary_VR(tag), content))


def _pixels(data: pydicom.Dataset, count: int, native: bool) -> list[bytes] | list[None]:
    """The pixels of each frame, as those of a single slice; None for a header alone."""
    if "PixelData" not in data:
        return [None] * count
    content = data.PixelData
    if not native:
        frames = list(generate_frames(content, number_of_frames=count))
        if len(frames) != count:
            raise Rejected(f"{len(frames)} encoded frames, expected {count}")
        return [encapsulate([frame]) for frame in frames]
    size = int(data.Rows) * int(data.Columns) * int(data.BitsAllocated) // 8
    if len(content) < size * count:
        raise Rejected(f"truncated pixel data: {len(content)} bytes, expected {size * count}")
    return [content[k * size : (k + 1) * size] for k in range(count)]
