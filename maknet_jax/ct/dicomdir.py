"""DICOMDIR: the table of contents of a DICOM medium, read instead of a folder."""

import os
from collections.abc import Iterator

import pydicom
from pydicom import uid as dicom_uid

from maknet_jax.ct import containers, transfer_syntax
from maknet_jax.ct.reading import one_line, quiet
from maknet_jax.errors import InputError


def is_dicomdir(path: str) -> bool:
    """Whether a file is a DICOMDIR, by its file meta information."""
    try:
        with quiet(), containers.open_file(path) as file:
            storage = transfer_syntax.file_meta(file).get("MediaStorageSOPClassUID")
    except Exception:  # pydicom raises any exception on broken files
        return False
    return storage == dicom_uid.MediaStorageDirectoryStorage


def listed_files(path: str, failures: list[tuple[str, str]]) -> Iterator[str]:
    """Yields the files of the images in a DICOMDIR, sorted.

    Args:
      path: the DICOMDIR.
      failures: (path, reason) of files that are not there is appended.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with quiet(), containers.open_file(path) as file:
            data = pydicom.dcmread(
                transfer_syntax.bounded(file), specific_tags=["DirectoryRecordSequence"], force=True
            )
            names = {
                _parts(record)
                for record in data.get("DirectoryRecordSequence") or []
                if str(record.get("DirectoryRecordType") or "") == "IMAGE"
            }
    except Exception as error:  # pydicom raises any exception on broken files
        raise InputError(
            f"{path} is a damaged DICOMDIR ({one_line(error)}): pass its folder instead"
        ) from error
    folder = os.path.dirname(path)
    for parts in sorted(names):
        file_path = _find(folder, parts)
        if file_path is None:
            listed = os.path.join(folder, *parts)
            failures.append((listed, f"listed in {os.path.basename(path)}, not found"))
        else:
            yield file_path


def _parts(record: pydicom.Dataset) -> tuple[str, ...]:
    """The components of ReferencedFileID, which may be a single string."""
    value = record.get("ReferencedFileID") or ()
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _find(folder: str, parts: tuple[str, ...]) -> str | None:
    """The file, whose name may be in lower case on a mounted disc."""
    if not parts or any(part in ("", ".", "..") or "/" in part for part in parts):
        return None
    for spelled in (parts, tuple(part.lower() for part in parts)):
        path = os.path.join(folder, *spelled)
        if containers.is_file(path):
            return path
    return None
