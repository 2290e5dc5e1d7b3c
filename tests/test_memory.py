"""The memory of `maknet prepare` does not grow with the number of files."""

import subprocess
import sys

import numpy as np
import pytest
from test_dicom import write_slice

LARGEST_GROWTH = 60  # MB per 4,500 files: headers and counts of 50 pieces; records would take 600
COMMAND = """
import resource, sys
from maknet_jax import cli
code = cli.main(sys.argv[1:])
processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print("peak", max(resource.getrusage(who).ru_maxrss for who in processes) // 1024)
sys.exit(code)
"""


def write_files(folder, series, slices):
    """Series of slices of 64 x 64 pixels, as copies of one file with other UIDs and positions."""
    values = np.random.default_rng(0).integers(0, 1500, (64, 64)).astype("<i2")
    ids = {"SOPInstanceUID": "1.2.3.4.9000000", "SeriesInstanceUID": "1.2.3.5.9000000"}
    (folder / "files").mkdir(parents=True)
    template = write_slice(
        folder / "template", values=values, **ids, ImagePositionPatient=["1", "2", "-90000.0"]
    ).read_bytes()
    for name in (*ids.values(), "-90000.0"):
        assert name.encode() in template
    for number in range(series * slices):
        k, z = divmod(number, slices)
        content = template.replace(b"1.2.3.4.9000000", b"1.2.3.4.%d" % (1000000 + number))
        content = content.replace(b"1.2.3.5.9000000", b"1.2.3.5.%d" % (1000000 + k))
        content = content.replace(b"-90000.0", b"-%07.1f" % (2 * z))
        (folder / "files" / f"{number:05d}.dcm").write_bytes(content)
    return folder / "files"


def peak(folder, out, *options):
    """MB of the largest process of `maknet prepare dicom`."""
    # A shell starts it: the peak of a child includes that of the process that started it.
    command = ["sh", "-c", '"$@" || exit', "sh", sys.executable, "-c", COMMAND]
    command += ["prepare", "dicom", str(folder), "--out", str(out), *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.rpartition("peak ")[2])


@pytest.mark.slow
@pytest.mark.parametrize(("slices", "workers"), [(100, "1"), (0, "2")], ids=["many", "one series"])
def test_the_peak_is_flat_from_500_to_5000_files(tmp_path, slices, workers):
    peaks = []
    for count in (500, 5000):
        size = slices or count
        folder = write_files(tmp_path / str(count), count // size, size)
        options = ["--workers", workers, "--salt-file", str(tmp_path / "salt"), "--size", "256"]
        peaks.append(peak(folder, tmp_path / f"out{count}", *options))
    print(f"{peaks} MB")
    assert peaks[1] - peaks[0] < LARGEST_GROWTH, peaks
