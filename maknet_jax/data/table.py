"""The CSV table of `maknet prepare table`: labelled slices from any source.

    path,labels,split,slice,patient
    scans/a.nii.gz,liver|spleen,train,57,p1
    scans/series-3,lung,val,IM0042.dcm,p2
    pngs/000001_01_01_109.png,,test,,p3

`path` is a DICOM, NIfTI or PNG file, or a folder with one series, relative to the table. `labels`
are separated by `|`; an empty cell means that all labels are absent. `slice` selects a slice of a
volume: in a NIfTI file by its stored index along z, in a folder by file name or by index from the
head, counted from 0. `patient` is optional, but without it a patient in two splits is not detected.
"""

import csv
import dataclasses
import os
import pathlib

from maknet_jax.ct import volumes
from maknet_jax.data import labels
from maknet_jax.errors import InputError

SPLITS = ("train", "val", "test", "hand", "unlabelled")

_COLUMNS = ("path", "labels", "split")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table; `line` is its line number in the file, the header being line 1."""

    line: int
    path: str
    labels: tuple[str, ...]
    split: str
    slice: str
    patient: str

    @property
    def where(self) -> str:
        """The name of this row in `failures.csv`."""
        return f"line {self.line}: {self.path}" + (f" slice {self.slice}" if self.slice else "")


def read_table(path: str | os.PathLike) -> tuple[list[Row], labels.Vocabulary]:
    """Reads and checks the table.

    Returns:
      (rows, vocabulary): the labels in alphabetical order.

    Raises:
      InputError: a column or cell is missing, a split is unknown, a patient is in two splits, a
        slice is listed twice, or no row has a label.
    """
    path = pathlib.Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise InputError(
                    f"{path} has no column {missing[0]!r}: path, labels and split are required"
                )
            rows = [_row(path, reader.line_num, cells) for cells in reader]
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            f"{path} is not a file: pass a CSV table with the columns path, labels, split"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV table: {error}") from None
    names = sorted({name for row in rows for name in row.labels})
    if not names:
        raise InputError(f"{path} contains no label: use `maknet prepare dicom` for unlabelled CT")
    split_of: dict[str, str] = {}
    lines: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.patient and split_of.setdefault(row.patient, row.split) != row.split:
            raise InputError(
                f"{path} line {row.line}: patient {row.patient} is in {split_of[row.patient]} and "
                f"{row.split}: put each patient into one split"
            )
        if (first := lines.setdefault((row.path, row.slice), row.line)) != row.line:
            raise InputError(
                f"{path} line {row.line} repeats the slice of line {first}: remove one"
            )
    return rows, labels.Vocabulary.from_names(names)


def _row(path: pathlib.Path, line: int, record: dict[str, str | None]) -> Row:
    cells = {key: (value or "").strip() for key, value in record.items() if isinstance(key, str)}
    if not cells["path"] or cells["split"] not in SPLITS:
        raise InputError(
            f"{path} line {line}: path {cells['path']!r}, split {cells['split']!r}: both are "
            f"required, and the split is one of {', '.join(SPLITS)}"
        )
    names = tuple(dict.fromkeys(n for n in map(str.strip, cells["labels"].split("|")) if n))
    file = str(path.parent / cells["path"])
    return Row(line, file, names, cells["split"], cells.get("slice", ""), cells.get("patient", ""))


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
    if row.slice and (row.slice in volume.slices or not row.slice.isdigit()):
        return volumes.slice_of(volume, row.slice)
    if row.slice:
        if int(row.slice) < len(volume.hu) and not volume.slices[0].isdigit():
            return int(row.slice)
        raise InputError(
            f"slice {row.slice} is not among the {len(volume.hu)} slices of {row.path}"
        )
    if len(volume.hu) == 1:
        return 0
    raise InputError(f"{row.path} has {len(volume.hu)} slices: name one in the column slice")
