"""Logging, progress bars and tables of the commands."""

import contextlib
import csv
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from maknet_jax import files
from maknet_jax.errors import InputError, NothingUsable

NOTICE = "Research software, not a diagnosis."
INTERVAL_HEADER = ("label", "patients", "AUC (95 %)", "F1 (95 %)")  # of `interval_rows`
_FEW = 10  # patients or series: below, the bootstrap gives intervals that are too narrow
_WIDE = 10_000  # columns of output that is not a terminal, so that nothing wraps
# Of the eight lines of a rich box, only the rule under the header; ASCII works in every encoding.
_RULE = box.Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)

_FORMULA = ("=", "+", "-", "@")  # first characters of a formula

_console = Console(stderr=True, highlight=False)


class Log:
    """Prints lines on standard error and appends the same events to a JSONL file."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        """Args: path: the JSONL file; None only prints."""
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def say(self, text: str, **event: object) -> None:
        """Prints one line and appends it to the JSONL file, with the fields of `event`."""
        _console.print(files.printable(text), markup=False, soft_wrap=True)
        self.event(message=text, **event)

    def event(self, **event: object) -> None:
        """Appends one JSONL line without printing it."""
        if self._file is not None:
            line = json.dumps({"time": round(time.time(), 3), **event}, default=str)
            with files.naming(self._file.name):
                self._file.write(line + "\n")
                self._file.flush()

    def close(self) -> None:
        """Closes the JSONL file."""
        file, self._file = self._file, None
        if file is not None:
            with files.naming(file.name):
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say_from_signal(text: str) -> None:
    """Prints one line from a signal handler, which may have interrupted rich itself."""
    clear = "\r\x1b[2K" if _console.is_terminal else ""  # erases a progress bar
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{files.printable(text)}\n".encode())


def say_off_terminal(text: str) -> None:
    """Prints one line on standard error if it is not a terminal, where no bar shows progress."""
    if not sys.stderr.isatty():
        Log().say(text)


@contextlib.contextmanager
def progress(
    description: str, total: int | None, *, done: int = 0
) -> Iterator[Callable[..., None]]:
    """Shows a progress bar if standard error is a terminal; a total of None is unknown.

    Yields:
      advance(count=1, note=None): `note` (a rate, a loss) is shown at the end of the bar until
        another replaces it.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(count: int = 1, note: str | None = None) -> None:
            bar.update(task, advance=count)
            if note is not None:
                bar.update(task, note=note)

        yield advance


def write_failures(path: pathlib.Path, failures: Sequence[tuple[str, str]]) -> None:
    """Writes `failures.csv` (input, reason); without failures, removes an existing one."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    write_table(path, ("input", "reason"), failures)


class Pseudonymizer(Protocol):
    """`ct.pseudonym.Pseudonyms`."""

    def failures(self, failures: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(input, reason) pairs without names."""


@contextlib.contextmanager
def list_failures(path: pathlib.Path, hidden: Pseudonymizer | None = None) -> Iterator[None]:
    """If the block can use no input, lists the reasons in `path` and names it in the error.

    Args:
      path: the CSV to write.
      hidden: replaces the names in the failures.
    """
    try:
        yield
    except NothingUsable as error:
        if not error.failures:
            raise
        if hidden:
            error = NothingUsable(error.problem, hidden.failures(error.failures))
        write_failures(path, error.failures)
        raise InputError(f"{error}; see {path}") from None


def write_table(
    path: pathlib.Path, header: Sequence[str], rows: Iterable[Iterable[object]]
) -> None:
    """Writes a CSV atomically.

    Control characters in text are escaped (`files.printable`), and text that a spreadsheet would
    take for a formula begins with an apostrophe.
    """
    with files.write_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = files.printable(value)
    return f"'{text}" if text[:1] in _FORMULA and len(text) > 1 and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def format_table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table as text for standard output, all columns but the first aligned to the right.

    On a terminal the header is bold and long cells fold to fit the width. Elsewhere the text is
    plain, each row is one line, and two spaces or more separate the columns.
    """
    terminal = sys.stdout.isatty()
    console = Console(
        force_terminal=terminal,
        width=None if terminal else _WIDE,
        markup=False,
        highlight=False,
        emoji=False,
    )
    table = Table(box=_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(files.printable(str(cell)) for cell in row))
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 image", "12,000 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def shortened(names: Sequence[str], most: int = 10) -> str:
    """Names, separated by commas; of many the first and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def format_interval(values: Sequence[float], digits: int = 3, *, signed: bool = False) -> str:
    """Formats (mean, low, high); the mean alone where low equals high: there is no interval.

    Args:
      values: mean, low and high.
      digits: after the decimal point.
      signed: write the sign of positive numbers, too, as for differences.
    """
    sign = "+" if signed else ""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})" if values[1] < values[2] else mean


def interval_rows(intervals: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `INTERVAL_HEADER`: the macro average first, then the labels.

    Args:
      intervals: see `evaluation.bootstrap.summarize`.
    """
    return [
        [
            name,
            str(entry["patients"]),
            *(format_interval(entry[m]) if m in entry else "-" for m in ("auc", "f1")),
        ]
        for name, entry in {"macro average": intervals, **intervals["labels"]}.items()
    ]


def describe_groups(*groups: int) -> str:
    """Says what intervals mean, and whether some are unreliable.

    Args:
      *groups: the patients or series of each interval.
    """
    most = max(groups, default=0)
    if most < 2:
        return "No intervals: all images are of one patient or series."
    few = f" Intervals over fewer than {_FEW} are unreliable." * (min(groups) < _FEW)
    return f"Intervals are 95 %, by resampling the {most} patients or series.{few}"


def describe_intervals(intervals: Mapping[str, Any]) -> str:
    """`describe_groups` of the intervals of a split, see `evaluation.bootstrap.summarize`."""
    if "auc" not in intervals:
        return "No intervals: no label has positives and negatives."
    text = describe_groups(intervals["patients"])
    entries = (intervals, *intervals["labels"].values())
    if intervals["patients"] > 1 and any(
        entry[metric][1] >= entry[metric][2]
        for entry in entries
        for metric in ("auc", "f1")
        if metric in entry
    ):
        text += " A number without an interval is the same in every resample."
    labels = [entry["patients"] for entry in intervals["labels"].values() if "auc" in entry]
    if intervals["patients"] < _FEW or min(labels, default=_FEW) >= _FEW:
        return text
    return f"{text} Those of labels that fewer than {_FEW} patients have are unreliable."


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown, all columns but the first aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)
