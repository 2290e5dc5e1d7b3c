"""What a verb says while it works: a line for a person, a line for a program, a progress bar."""

import contextlib
import csv
import json
import os
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from maknet_jax import files

_console = Console(stderr=True, highlight=False)


class Log:
    """Says lines on standard error and writes the same events to `path` as JSONL."""

    def __init__(self, path=None):
        """Args: path: the JSONL file, appended to; None only speaks."""
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def say(self, text, **event):
        """One line for a person; `event` goes to the JSONL line beside it."""
        _console.print(text, markup=False, soft_wrap=True)
        self.event(message=text, **event)

    def event(self, **event):
        """One JSONL line only."""
        if self._file is not None:
            line = json.dumps({"time": round(time.time(), 3), **event}, default=str)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self):
        """Closes the JSONL file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def say_from_signal(text):
    """One line from a signal's handler, which may have come in the middle of rich's own work."""
    clear = "\r\x1b[2K" if _console.is_terminal else ""  # of a progress bar
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{text}\n".encode())


@contextlib.contextmanager
def progress(description, total, *, done=0):
    """A progress bar on a terminal, nothing elsewhere.

    Yields:
      advance(count=1, note=None): `note` is shown at the end of the bar (a rate, a loss) until
        another one comes.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(count=1, note=None):
            bar.update(task, advance=count, **({} if note is None else {"note": note}))

        yield advance


def write_failures(path, failures):
    """Writes `failures.csv` (input, reason), or removes an old one where nothing failed."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    write_table(path, ("input", "reason"), failures)


def write_table(path, header, rows):
    """Writes a CSV, whole or not at all."""
    with files.write_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def format_table(header, rows):
    """A table in plain text, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_interval(values, digits=3):
    """A (mean, low, high) as text; low equals high where there is no interval."""
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})" if values[1] < values[2] else f"{mean} (no interval)"


def markdown_table(header, rows):
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)
