"""The index of the Imaging Data Commons (IDC): a parquet file with a row per series.

It is inside the wheel of the package `idc-index-data`, so reading it needs no network.
"""

import difflib
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from maknet_jax.errors import InputError, installing

_INSTALL = f"{installing('idc')}; or pass --index FILE"
_COLUMNS = {
    "uid": "SeriesInstanceUID",
    "study": "StudyInstanceUID",
    "patient": "PatientID",
    "collection": "collection_id",
    "analysis": "analysis_result_id",
    "modality": "Modality",
    "sop_class": "SOPClassUID",
    "transfer_syntax": "TransferSyntaxUID",
    "body_part": "BodyPartExamined",
    "number": "SeriesNumber",
    "description": "SeriesDescription",
    "slices": "instanceCount",
    "licence": "license_short_name",
    "doi": "source_DOI",
    "url": "series_aws_url",
    "megabytes": "series_size_MB",
}


class Series(NamedTuple):
    """One row of the index; text is "" where the index has none.

    Attributes:
      uid: SeriesInstanceUID.
      study: StudyInstanceUID.
      patient: PatientID, unique within its collection.
      collection: the id of the collection.
      analysis: the id of the analysis result that the series belongs to.
      modality: CT or SEG.
      sop_class: SOPClassUID.
      transfer_syntax: one or several TransferSyntaxUIDs, separated by commas.
      body_part: BodyPartExamined.
      number: SeriesNumber.
      description: SeriesDescription.
      slices: number of instances.
      licence: its short name, such as "CC BY 4.0".
      doi: of the data to cite.
      url: of its files, s3://BUCKET/UUID/*.
      megabytes: size in units of 10**6 bytes.
    """

    uid: str
    study: str
    patient: str
    collection: str
    analysis: str
    modality: str
    sop_class: str
    transfer_syntax: str
    body_part: str
    number: str
    description: str
    slices: int
    licence: str
    doi: str
    url: str
    megabytes: float


def find_index(path: str | os.PathLike[str] | None = None) -> tuple[pathlib.Path, str]:
    """The index file and its version.

    Args:
      path: a parquet file of the same schema; None means the one of `idc-index-data`.

    Raises:
      InputError: the file or the package is missing.
    """
    if path is not None:
        path = pathlib.Path(path)
        if not path.is_file():
            raise InputError(f"--index {path} is not a file: pass a parquet file of IDC's index")
        return path, path.name
    try:
        import idc_index_data
    except ModuleNotFoundError:
        raise InputError(f"the index of IDC is not installed: {_INSTALL}") from None
    version = f"idc-index-data {idc_index_data.__version__}"
    return pathlib.Path(str(idc_index_data.IDC_INDEX_PARQUET_FILEPATH)), version


def read_index(path: str | os.PathLike[str], analysis: str | None = None) -> list[Series]:
    """Reads the CT series of an index, and the DICOM SEG of an analysis result.

    Args:
      path: the parquet file.
      analysis: the id of the analysis result; None reads CT only.

    Raises:
      InputError: the file is not such an index, or has no segmentations of this analysis result.
    """
    numbers = {"instanceCount", "series_size_MB"}
    names = ", ".join(
        f"coalesce({name}, {0 if name in numbers else repr('')})" for name in _COLUMNS.values()
    )
    rows = _query(
        path,
        f"SELECT {names} FROM read_parquet(?) "
        "WHERE Modality = 'CT' OR (Modality = 'SEG' AND analysis_result_id = ?)",
        analysis or "",
    )
    series = list(map(Series._make, rows))
    if analysis is not None and not any(row.modality == "SEG" for row in series):
        known = _query(
            path,
            "SELECT DISTINCT analysis_result_id FROM read_parquet(?) "
            "WHERE Modality = 'SEG' AND analysis_result_id IS NOT NULL",
        )
        raise InputError(unknown("--with", analysis, [name for (name,) in known]))
    return series


def read_nonhuman(path: str | os.PathLike[str]) -> set[str]:
    """The collections of phantoms and animals, from `collections_index.parquet` beside an index.

    Without that file the set is empty.
    """
    collections_index = pathlib.Path(path).with_name("collections_index.parquet")
    if not collections_index.is_file():
        return set()
    sql = "SELECT collection_id FROM read_parquet(?) WHERE species NOT LIKE '%Human%'"
    return {name for (name,) in _query(collections_index, sql)}


def read_references(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads IDC's `seg_index`: SeriesInstanceUID of a segmentation -> that of its image series.

    Raises:
      InputError: the file is not such an index.
    """
    rows = _query(
        path,
        "SELECT SeriesInstanceUID, segmented_SeriesInstanceUID FROM read_parquet(?) "
        "WHERE segmented_SeriesInstanceUID IS NOT NULL",
    )
    return dict(rows)


def _query(path: str | os.PathLike[str], sql: str, *values: str) -> list[tuple[Any, ...]]:
    """Rows of a query whose first parameter is a parquet file."""
    try:
        import duckdb
    except ModuleNotFoundError:
        raise InputError(f"duckdb is not installed: {installing('idc')}") from None
    if not pathlib.Path(path).is_file():
        raise InputError(f"{path} is not a file: pass a parquet file of IDC")
    try:
        with duckdb.connect() as database:
            return database.execute(sql, [str(path), *values]).fetchall()
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not an index of IDC as parquet: {reason}") from None


def unknown(option: str, value: str, known: Iterable[str]) -> str:
    """The error message for a value that the index does not have."""
    names = sorted(known)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(value.lower(), by_lower, n=3, cutoff=0.5)
    listed = ", ".join([by_lower[name] for name in near] or names[:8])
    listed += ", ..." * (not near and len(names) > 8)
    return f"{option} {value!r} matches none of {len(names)} values in the index: try {listed}"
