"""Rates of `maknet prepare dicom` relative to pydicom, and of two workers relative to one.

    python benchmarks/speed/preparation.py  # about ten minutes on two cores; --quick: a minute

On generated slices of 512 x 512 pixels: reading series relative to bare decoding with pydicom
(CPU seconds of one core, in turns; targets: 0.6), and the seconds of `prepare.prepare_dicom` with
one and with two workers (in turns; targets: 1.7), on 12 series of 20 slices, on one long series,
and on as many slices in short series. Each call starts its workers. The same for the command line,
whose seconds contain the imports.
"""

import argparse
import functools
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from benchmarks import harness, timing
from maknet_jax import files, prepare
from maknet_jax.cli import options
from maknet_jax.ct import search, volumes
from maknet_jax.phantom import formats

SERIES, SLICES = 12, 20
COPIES = 8  # of each short series, under other UIDs, for the case of many series
EDGE = 512  # pixels


def write_data(folder: pathlib.Path, series: int, slices: int, *, compressed: bool) -> pathlib.Path:
    """Writes series of noisy ellipses as DICOM files; returns the folder.

    Args:
      folder: the new folder.
      series: the number of series.
      slices: per series.
      compressed: as JPEG 2000 (lossless) instead of native.
    """
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : EDGE * 1j, -1 : 1 : EDGE * 1j]
    body = np.where((rows / 0.6) ** 2 + (columns / 0.8) ** 2 < 1, 40.0, -1000.0)
    for number in range(series):
        hu = np.stack([body + rng.normal(0, 15, body.shape) for _ in range(slices)])
        hu = np.clip(np.rint(hu), -1024, None).astype(np.int16)
        name, place = f"patient {number}", folder / f"{number:03d}"
        syntax = ExplicitVRLittleEndian
        formats.write_series(place, hu, (2.0, 0.8, 0.8), name, rng, syntax=syntax)
        for path in sorted(place.iterdir()) if compressed else ():
            data = pydicom.dcmread(path)
            data.compress(JPEG2000Lossless, generate_instance_uid=False)
            data.save_as(path)
    return folder


def write_copies(source: pathlib.Path, folder: pathlib.Path, copies: int) -> pathlib.Path:
    """Writes each series several times under other UIDs; returns the folder."""
    for path in sorted(source.rglob("*.dcm")):
        data = pydicom.dcmread(path)
        series, slice_uid = data.SeriesInstanceUID, data.SOPInstanceUID
        for number in range(copies):
            place = folder / f"{number}-{path.parent.name}"
            place.mkdir(parents=True, exist_ok=True)
            data.SeriesInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
            data.SOPInstanceUID = generate_uid(entropy_srcs=[slice_uid, str(number)])
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
            data.save_as(place / path.name)
    return folder


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call, of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def reading(folder: pathlib.Path, repeats: int) -> list[float]:
    """The rates of reading series relative to bare decoding with pydicom, one per turn."""
    series, _ = search.find_series(folder)
    paths = [path for ref in series for path in ref.paths]
    timers = {
        "bare": lambda: cpu_seconds(lambda: [pydicom.dcmread(p).pixel_array for p in paths]),
        "series": lambda: cpu_seconds(lambda: list(map(volumes.load_series, series))),
    }
    seconds = timing.take_turns(timers, repeats)
    return [a / b for a, b in zip(seconds["bare"], seconds["series"], strict=True)]


def workers(
    folder: pathlib.Path, scratch: pathlib.Path, repeats: int, *, command: bool = False
) -> dict[str, Any]:
    """The speed with two workers relative to one, over the turns, and the seconds of both.

    Args:
      folder: the data.
      scratch: for the salt and the output.
      repeats: turns.
      command: run the command line in a new process instead of calling its function.
    """
    salt, out = scratch / "salt", scratch / "out"

    def prepared(count: int) -> float:
        start = time.perf_counter()
        if command:
            call = [sys.executable, "-m", "maknet_jax", "prepare", "dicom", str(folder)]
            call += ["--out", str(out), "--salt-file", str(salt)]
            call += ["--min-slices", "3", "--workers", str(count)]
            subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        else:
            prepare.prepare_dicom(folder, out, salt_file=salt, min_slices=3, workers=count)
        seconds = time.perf_counter() - start
        shutil.rmtree(out)
        return seconds

    prepared(1)  # creates the salt, and fills the page cache
    seconds = timing.take_turns({n: functools.partial(prepared, n) for n in (1, 2)}, repeats)
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return _of(ratios) | {"seconds": {str(n): timing.spread(seconds[n]) for n in (1, 2)}}


def measure(chosen: argparse.Namespace, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows: what, ratio (median, low, high), target."""
    rows = []
    for name, compressed in (("native", False), ("JPEG 2000", True)):
        data = write_data(folder / name, chosen.series, SLICES, compressed=compressed)
        ratios = reading(data, chosen.repeats)
        rows.append({"what": f"reading {name} relative to pydicom", "target": 0.6} | _of(ratios))
    short = f"{chosen.series} series of {SLICES} slices"
    jpeg, native, many = folder / "JPEG 2000", folder / "native", folder / "many"
    cases = [
        (f"two workers relative to one, {short}, native", native, False),
        (f"two workers relative to one, {short}, JPEG 2000", jpeg, False),
        (
            f"two workers relative to one, one series of {chosen.slices} slices, native",
            write_data(folder / "long", 1, chosen.slices, compressed=False),
            False,
        ),
        (
            f"two workers relative to one, {COPIES} x {short}, native",
            write_copies(native, many, COPIES),
            False,
        ),
        (f"command line, two workers relative to one, {short}, native", native, True),
        (f"command line, two workers relative to one, {COPIES} x {short}, native", many, True),
    ]
    for what, data, command in cases:
        measured = workers(data, folder, chosen.repeats, command=command)
        rows.append({"what": what, "target": 1.7} | measured)
    return rows


def _of(ratios: Sequence[float]) -> dict[str, Any]:
    return {"ratio": timing.spread(ratios)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its rows and writes them as JSON."""
    parser = harness.command_parser(__file__, __doc__)
    parser.add_argument("--quick", action="store_true", help="few slices, about a minute")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write (default: none)")
    parser.add_argument("--repeats", type=options.count, help="turns; medians are reported")
    parser.add_argument("--series", type=options.count, help="series of 20 slices")
    parser.add_argument("--slices", type=options.count, help="slices of the long series")
    full = {"repeats": 5, "series": SERIES, "slices": 2000}
    quick = {"repeats": 2, "series": 2, "slices": 200}
    chosen = harness.parse(parser, argv, full=full, quick=quick)
    with tempfile.TemporaryDirectory(prefix="maknet-") as temporary:
        rows = measure(chosen, pathlib.Path(temporary))
    for row in rows:
        ratio = row["ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        print(f"{row['what']}: {spread}, target {row['target']}")
    if chosen.out:
        document = harness.provenance("preparation") | {"extent": chosen.extent, "rows": rows}
        files.write_json(chosen.out, document)


if __name__ == "__main__":
    harness.run(main)
