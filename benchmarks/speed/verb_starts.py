"""Starts of `predict`, `attribute` and `report` for startup.py, cold and warm."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pydicom
from pydicom.uid import UID

from benchmarks import timing

SCRIPT = pathlib.Path(__file__).with_name("start_verb.py")
REPO = pathlib.Path(__file__).resolve().parents[2]
SERIES = {"300 slices": 300, "2,000 slices": 2000}
_TIMES = ("AcquisitionDateTime", "AcquisitionTime", "ContentTime")
PARTS = ("total", "cpu", "imports", "tracing", "lowering", "compiling")
COUNTS = ("modules", "traced", "compiled", "peak_mb")
HEADER = ["", "cache", "code", *PARTS, *COUNTS, "cpu over before"]


def repeat_series(source: pathlib.Path, out: pathlib.Path, count: int, *, native: bool) -> None:
    """Writes a DICOM series of `count` slices, 1 mm apart: those of a folder in turn.

    Args:
      source: the folder of a series.
      out: the folder to create.
      count: the number of slices.
      native: decompress the pixels.
    """
    out.mkdir()
    slices = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
    for one in slices:
        if native and one.file_meta.TransferSyntaxUID.is_compressed:
            one.decompress()
        for name in _TIMES:  # otherwise the repetitions are different acquisitions
            if name in one:
                delattr(one, name)
    place = [float(mm) for mm in slices[0].ImagePositionPatient]
    for number in range(count):
        one = slices[number % len(slices)]
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{number + 1}")
        one.InstanceNumber = number + 1
        one.ImagePositionPatient = [*place[:2], place[2] + number]
        one.save_as(out / f"{number:05d}.dcm")


def commands(
    folder: pathlib.Path,
    model: str,
    ct: str | None,
    series: str | None,
    wide: pathlib.Path,
) -> dict[str, list[str]]:
    """Name -> arguments of `maknet`; OUT stands for a new path.

    Args:
      folder: where the repeated series are written.
      model: a workdir that `report` can read.
      ct: a CT for `predict` and `attribute`.
      series: the folder of a DICOM series to repeat.
      wide: the workdir of a network for the 300 slices.
    """
    found = {"report": ["report", model, "--out", "OUT"]}
    if ct:
        found["predict"] = ["predict", "--model", model, ct, "--out", "OUT.csv"]
        limits = ["--limit", "2", "--top", "1"]
        found["attribute"] = ["attribute", "--model", model, ct, *limits, "--out", "OUT"]
    if series:
        for name, count in SERIES.items():
            path, native = folder / f"series-{count}", count > 1000
            repeat_series(pathlib.Path(series), path, count, native=native)
            network = model if native else str(wide)
            found[name] = ["predict", "--model", network, str(path), "--out", "OUT.csv"]
    return found


def measure(
    folder: pathlib.Path, found: dict[str, list[str]], before: str | None, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields each start: cold and warm, and before and after in turns.

    Args:
      folder: for outputs and caches.
      found: the result of `commands`.
      before: another checkout to compare with, or None.
      repeats: starts of each kind.
    """
    checkouts = {"before": before, "now": str(REPO)} if before else {"now": str(REPO)}
    for name, arguments in found.items():
        for turn in range(repeats):
            for cache in ("cold", "warm"):
                for code, checkout in checkouts.items():
                    out = folder / f"{name}-{turn}-{cache}-{code}".replace(" ", "-")
                    stored = folder / f"cache-{name}-{turn}-{code}"
                    argv = [word.replace("OUT", str(out)) for word in arguments]
                    yield {"name": name, "cache": cache, "code": code} | _start(
                        argv, {"JAX_COMPILATION_CACHE_DIR": str(stored), "PYTHONPATH": checkout}
                    )
                    shutil.rmtree(out, ignore_errors=True)


def _start(argv: list[str], environment: dict[str, str]) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, SCRIPT, *argv],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"maknet {' '.join(argv)} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def rows(starts: list[dict[str, Any]]) -> list[list[str]]:
    """The table of `HEADER`: one row per name, cache and code."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for start in starts:
        groups.setdefault((start["name"], start["cache"], start["code"]), []).append(start)
    table = []
    for (name, cache, code), each in groups.items():
        cells = [
            timing.format_spread(timing.spread([start[part] for start in each])) for part in PARTS
        ]
        cells += [f"{max(start[part] for start in each):.0f}" for part in COUNTS]
        old = groups.get((name, cache, "before"), []) if code == "now" else []
        ratios = [now["cpu"] / past["cpu"] for past, now in zip(old, each, strict=False)]
        cells.append(timing.format_spread(timing.spread(ratios)) if ratios else "-")
        table.append([name, cache, code, *cells])
    return table
