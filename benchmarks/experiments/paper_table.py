"""Shared by the experiments that print a table of the paper beside our numbers."""

import argparse
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import harness
from maknet_jax import console, files

METRICS = {"auc": "AUC", "f1": "F1", "precision": "precision", "recall": "recall"}
SETS = {"test": "text-mined", "hand": "hand-labelled"}
COLUMNS = [f"{split} {metric}" for split in SETS for metric in METRICS.values()]

Splits = Mapping[str, Mapping[str, Any]]  # split -> metric -> value or None
PaperRow = Mapping[str, tuple[float, ...]]  # split -> values in the order of METRICS


def our_values(splits: Splits) -> list[float | None]:
    """The metrics that `evaluate` returned, in the order of `COLUMNS`; None where undefined."""
    return [splits[split][metric] for split in SETS for metric in METRICS]


def paper_values(row: PaperRow) -> list[float]:
    """The numbers of a row of the paper, in the order of `COLUMNS`."""
    return [value for split in SETS for value in row[split]]


def parser(file: str, description: str | None, *, data_help: str) -> argparse.ArgumentParser:
    """Returns a parser with --data, --small or --quick, and --workdir.

    Args:
      file: the experiment's `__file__`.
      description: its docstring.
      data_help: help of --data.

    Returns:
      The parser; `form` of the result is "small", "quick" or, with --data, None.
    """
    name = pathlib.Path(file).stem
    result = harness.command_parser(file, description)
    form = result.add_mutually_exclusive_group(required=True)
    form.add_argument("--data", help=data_help)
    for option, text in {
        "--small": "on a generated phantom",
        "--quick": "on a tiny phantom, only to check that everything runs",
    }.items():
        const = option.removeprefix("--")
        form.add_argument(option, dest="form", action="store_const", const=const, help=text)
    result.add_argument(
        "--workdir", help=f"folder of the runs (default: runs/{name}, -small or -quick)"
    )
    return result


def workdir(file: str, chosen: argparse.Namespace) -> pathlib.Path:
    """The folder of the runs: --workdir or its default."""
    suffix = f"-{chosen.form}" if chosen.form else ""
    return pathlib.Path(chosen.workdir or f"runs/{pathlib.Path(file).stem}{suffix}")


def write(
    folder: pathlib.Path,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    document: Mapping[str, Any],
    *,
    format_int: Callable[[int], str] = str,
) -> None:
    """Writes FOLDER/NAME.csv, .md and .json, and prints the table and its notes.

    The JSON is written last: if it exists, the others do too.

    Args:
      folder: where to write.
      header: column titles.
      rows: text, numbers, or None for an undefined metric.
      document: content of the JSON; `benchmark` is NAME, `notes` are sentences for the table.
      format_int: formats integers in the Markdown and on the terminal.
    """
    rows, notes, path = list(rows), document["notes"], folder / document["benchmark"]

    def format_cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}"
        if isinstance(value, int):
            return format_int(value)
        return "-" if value is None else value

    cells = [[format_cell(value) for value in row] for row in rows]
    console.write_table(path.with_suffix(".csv"), header, rows)
    with files.write_whole(path.with_suffix(".md")) as file:
        file.write(console.markdown_table(header, cells))
        file.write("\n" + "".join(f"- {note}.\n" for note in notes))
    files.write_json(path.with_suffix(".json"), dict(document))
    print(console.format_table(header, cells))
    print("\n" + "".join(f"{note}.\n" for note in notes) + f"\nwritten: {path}.md, .csv, .json")
