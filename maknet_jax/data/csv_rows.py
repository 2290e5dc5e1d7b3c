"""CSV tables that users write: of labels, of splits, of the names of a label map."""

import csv
import io
import os
from typing import NamedTuple

from maknet_jax.errors import InputError


class Rows(NamedTuple):
    """The content of a table.

    Attributes:
      columns: the names in its header, in lower case.
      cells: (line, column -> cell) of each row.
      empty: lines of the rows whose cells are all empty.
    """

    columns: list[str]
    cells: list[tuple[int, dict[str, str]]]
    empty: list[int]


def read_rows(name: str | os.PathLike[str], content: bytes) -> Rows:
    """Reads a table with a header, separated by commas or semicolons.

    Spaces around cells and a byte order mark are ignored.

    Args:
      name: of the table, for the messages.
      content: of the file.

    Raises:
      InputError: it is not UTF-8 or not CSV, a column is named twice, or a row has more cells than
        the header.
    """
    try:
        text = content.decode("utf-8-sig")
        header = next(filter(str.strip, text.splitlines()), "")
        delimiter = ";" if header.count(";") > header.count(",") else ","
        # Strict: a quote that is never closed would join the rest of the table into one cell.
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
        )
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{name} is not a CSV table in UTF-8: {error}") from None
    empty = [line for line, row in lines if row and not any(row)]
    lines = [(line, row) for line, row in lines if any(row)]
    columns = [column.lower() for column in lines[0][1]] if lines else []
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice is not None:
        raise InputError(f"{name} has two columns {twice!r}: remove one")
    for line, row in lines[1:]:
        if any(row[len(columns) :]):
            raise InputError(
                f"{name} line {line} has {len(row)} cells, the header {len(columns)}: put quotes "
                f"around cells that contain {delimiter!r}"
            )
        row += [""] * (len(columns) - len(row))
    cells = [(line, dict(zip(columns, row, strict=False))) for line, row in lines[1:]]
    return Rows(columns, cells, empty)
