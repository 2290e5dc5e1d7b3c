"""The CSV table of `maknet prepare table`: labelled slices from any source.

    path,labels,split,slice,patient,unknown
    scans/a.nii.gz,liver|spleen,train,57,p1,lung
    scans/series-3,lung,val,IM0042.dcm,p2,
    pngs/000001_01_01_109.png,,test,,p3,

`path` is a DICOM, NIfTI or PNG file, or a folder with one series, relative to the table. `labels`
are separated by `|`; an empty cell means that all labels are absent. `slice` selects a slice of a
volume: in a NIfTI file by its stored index along z, in a folder by file name or by index from the
head, counted from 0. `patient` is optional; without it a volume in two splits is an error, but a
patient with two volumes is not detected. `unknown`, also optional, lists labels that were not
assessed: they count neither in the loss nor in a metric.
"""

import os
import pathlib
import re
from collections.abc import Callable

from maknet_jax.ct import volumes
from maknet_jax.data import csv_rows, labels, table_rows
from maknet_jax.data.table_rows import Row
from maknet_jax.errors import InputError

SPLITS = ("train", "val", "test", "hand", "unlabelled")

_COLUMNS = ("path", "labels", "split")


def read_table(
    path: str | os.PathLike, warn: Callable[[str], None] = lambda text: None
) -> tuple[list[Row], labels.Vocabulary]:
    """Reads and checks the table.

    Args:
      path: the CSV file.
      warn: called with a line for each doubt about the rows, see `table_rows.warnings`.

    Returns:
      (rows, vocabulary): the labels in alphabetical order.

    Raises:
      InputError: a column or cell is missing, a split is unknown, a patient or a volume is in two
        splits, a slice is listed twice, a label is both present and unknown, or no row has a label.
    """
    path = pathlib.Path(path)
    try:
        table = csv_rows.read_rows(path, path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            f"{path} is not a file: pass a CSV table with the columns path, labels, split"
        ) from None
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r}: path, labels and split are required"
        )
    if table.empty:
        warn(f"{len(table.empty)} empty rows are skipped, the first on line {table.empty[0]}")
    rows = [_row(path, line, cells) for line, cells in table.cells]
    names = sorted({name for row in rows for name in row.labels})
    if not names:
        raise InputError(f"{path} contains no label: use `maknet prepare dicom` for unlabelled CT")
    split_of: dict[str, str] = {}
    places: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.patient and split_of.setdefault(row.patient, row.split) != row.split:
            raise InputError(
                f"{path} line {row.line}: patient {row.patient} is in {split_of[row.patient]} and "
                f"{row.split}: put each patient into one split"
            )
        place = row.path, _whole(row.slice)
        if (first := places.setdefault(place, row.line)) != row.line:
            raise InputError(
                f"{path} line {row.line} repeats the slice of line {first}: remove one"
            )
        for name in row.unknown:
            if name in row.labels or name not in names:
                wrong = "is also in labels" if name in row.labels else "is a label of no row"
                raise InputError(f"{path} line {row.line}: the unknown label {name!r} {wrong}")
    if twice := table_rows.volume_in_two_splits(rows):
        one, other = twice
        raise InputError(
            f"{path} lines {one.line} and {other.line} put one volume into {one.split} and "
            f"{other.split}: put each volume into one split, or add a column patient"
        )
    for text in table_rows.warnings(rows):
        warn(text)
    return rows, labels.Vocabulary.from_names(names)


def _row(path: pathlib.Path, line: int, cells: dict[str, str]) -> Row:
    if not cells["path"] or cells["split"] not in SPLITS:
        raise InputError(
            f"{path} line {line}: path {cells['path']!r}, split {cells['split']!r}: both are "
            f"required, and the split is one of {', '.join(SPLITS)}"
        )
    names, unknown = (
        tuple(dict.fromkeys(name for name in map(str.strip, cell.split("|")) if name))
        for cell in (cells["labels"], cells.get("unknown", ""))
    )
    file = str(path.parent / cells["path"])
    place = cells.get("slice", ""), cells.get("patient", "")
    return Row(line, file, names, cells["split"], *place, unknown)


def _whole(name: str) -> str:
    """A slice without the fraction that pandas writes: 57.0 is 57."""
    return name.partition(".")[0] if re.fullmatch(r"\d+\.0+", name) else name


def slice_index(row: Row, volume: volumes.Volume, named: int | None) -> int:
    """The index, from head to feet, of the slice that a row selects.

    Args:
      row: the row.
      volume: the volume at its path.
      named: the index if the path is a single slice, None for a whole volume.

    Raises:
      InputError: the volume has several slices and the row selects none, or one that is missing.
    """
    if named is not None:
        return named
    name = row.slice if row.slice in volume.slices else _whole(row.slice)
    if name and (name in volume.slices or not name.isdigit()):
        return volumes.slice_of(volume, name)
    if name:
        if int(name) < len(volume.hu) and not volume.file:
            return int(name)
        raise InputError(
            f"slice {row.slice} is not among the {len(volume.hu)} slices of {row.path}"
        )
    if len(volume.hu) == 1:
        return 0
    raise InputError(f"{row.path} has {len(volume.hu)} slices: name one in the column slice")
