"""The table of `maknet prepare table`: people's own labelled slices.

    path,labels,split,slice,patient
    scans/a.nii.gz,liver|spleen,train,57,p1
    scans/series-3,lung,val,IM0042.dcm,p2
    pngs/000001_01_01_109.png,,test,,p3

`path` is relative to the table: a DICOM, NIfTI or PNG file, or a folder with one series. `labels`
are separated by `|` and may be empty (nothing is there). `slice` names the slice of a volume: the
index along z as stored in a NIfTI file, the file name or the index from the head (from 0) in a
folder. `patient` is optional, but only with it can a patient in two splits be refused.
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
    """One line of the table; `line` counts as editors do, the header being 1."""

    line: int
    path: str
    labels: tuple[str, ...]
    split: str
    slice: str
    patient: str

    @property
    def where(self) -> str:
        """What `failures.csv` calls it."""
        return f"line {self.line}: {self.path}" + (f" slice {self.slice}" if self.slice else "")


def read_table(path: str | os.PathLike) -> tuple[list[Row], labels.Vocabulary]:
    """Reads and checks the table.

    Returns:
      (rows, vocabulary): the labels in alphabetical order.

    Raises:
      InputError: a column or cell is missing, a split has an odd name, a patient is in two splits,
        one slice is listed twice, or there is no label at all.
    """
    path = pathlib.Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise InputError(
                    f"{path} has no column {missing[0]!r}: path, labels and split are needed"
                )
            rows = [_row(path, reader.line_num, cells) for cells in reader]
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} is no file: give a CSV of path, labels, split") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV table: {error}") from None
    names = sorted({name for row in rows for name in row.labels})
    if not names:
        raise InputError(f"{path} names no label: prepare unlabelled CT with `prepare dicom`")
    split_of: dict[str, str] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.patient and split_of.setdefault(row.patient, row.split) != row.split:
            raise InputError(
                f"{path} line {row.line}: patient {row.patient} is in {split_of[row.patient]} and "
                f"{row.split}: a patient belongs to one split"
            )
        if (first := seen.setdefault((row.path, row.slice), row.line)) != row.line:
            raise InputError(f"{path} line {row.line} repeats the slice of line {first}")
    return rows, labels.Vocabulary.from_names(names)


def _row(path: pathlib.Path, line: int, record: dict[str, str | None]) -> Row:
    cells = {key: (value or "").strip() for key, value in record.items() if isinstance(key, str)}
    if not cells["path"] or cells["split"] not in SPLITS:
        raise InputError(
            f"{path} line {line}: path {cells['path']!r}, split {cells['split']!r}: both are "
            f"needed, the split one of {', '.join(SPLITS)}"
        )
    names = tuple(dict.fromkeys(n for n in map(str.strip, cells["labels"].split("|")) if n))
    file = str(path.parent / cells["path"])
    return Row(line, file, names, cells["split"], cells.get("slice", ""), cells.get("patient", ""))


def slice_index(row: Row, volume: volumes.Volume, named: int | None) -> int:
    """The index, head to feet, of the slice that a row means.

    Args:
      row: the row.
      volume: the `volumes.Volume` of its path.
      named: the index that the path itself names, or None for a whole volume.

    Raises:
      InputError: the volume has several slices and the row names none, or one that is not there.
    """
    if named is not None:
        return named
    if row.slice and (row.slice in volume.slices or not row.slice.isdigit()):
        return volumes.slice_of(volume, row.slice)
    if row.slice:
        if int(row.slice) < len(volume.hu) and not volume.slices[0].isdigit():
            return int(row.slice)
        raise InputError(f"slice {row.slice} is not among the {len(volume.hu)} of {row.path}")
    if len(volume.hu) == 1:
        return 0
    raise InputError(f"{row.path} has {len(volume.hu)} slices: name one in the column slice")
