"""Thousands of damaged files of every format: no foreign exception, no abort, no hang."""

import json
import pathlib
import struct
import subprocess
import sys
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
from test_containers import pack
from test_dicom import write_series, write_slice
from test_dicom_frames import write_enhanced
from test_search import write_dicomdir

COUNT = 1000  # mutations per file
SLOWEST, LIMIT = 60.0, 1800.0  # seconds of one mutation and of all, on a busy machine
MEMORY = 2048  # MiB; the largest slice takes a few hundred
RLE, JPEG_2000, JPEG_LS = (f"1.2.840.10008.1.2.{end}" for end in ("5", "4.90", "4.80"))
NATIVE = {f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99")}
REAL = ("4.50", "4.57", "4.70", "4.81", "4.91")  # encodings that pydicom cannot write


def body(shape=(48, 40)):
    """HU of an ellipse of tissue in air."""
    rows, columns = np.indices(shape)
    inside = np.hypot(rows / shape[0] - 0.5, columns / shape[1] - 0.5) < 0.4
    noise = np.random.default_rng(0).integers(-30, 30, shape)
    return (np.where(inside, 40, -980) + noise).astype(np.int16)


def write_dicom(folder, syntax):
    path = folder / f"{syntax}.dcm"
    stored = body() + 1024
    if syntax.endswith(".1.2.2"):
        stored = stored.astype(">i2")
    write_slice(path, values=stored, syntax=syntax if syntax in NATIVE else "1.2.840.10008.1.2.1")
    if syntax not in NATIVE:
        data = pydicom.dcmread(path)
        data.compress(syntax, generate_instance_uid=False)
        data.save_as(path)
    return path


def write_nifti(folder, name):
    values = np.stack([body().T] * 3, axis=-1)
    kind = nibabel.Nifti2Image if name == "two.nii" else nibabel.Nifti1Image
    image = kind(values, np.diag([2.0, 2, 3, 1]))
    table = b"<Caret><LabelTable><Label Key='1'>liver</Label></LabelTable></Caret>"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(30, table))
    image.to_filename(folder / name)
    return folder / name


def write_png(folder, name):
    rows = (body().astype(int) + 32768).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", *rows.shape[::-1], 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tEXt", b"a\0b"), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + crc
    (folder / name).write_bytes(content)
    return folder / name


def write_archive(folder, name):
    slices = write_series(folder / "series", [0, 5])
    return pack(folder / name, {f"s/{path.name}": path.read_bytes() for path in slices})


def write_seg(folder, name):
    segment = pydicom.Dataset()
    segment.SegmentNumber, segment.SegmentLabel = 1, "liver"
    series = pydicom.Dataset()
    series.SeriesInstanceUID = "1.2.3"
    elements = {"SegmentSequence": [segment], "ReferencedSeriesSequence": [series]}
    storage = pydicom.uid.SegmentationStorage
    write_slice(folder / "a.dcm", SOPClassUID=storage, SegmentationType="BINARY", **elements)
    return (folder / "a.dcm").rename(folder / name)


def write_medium(folder, name):
    write_series(folder / "st1", [0, 5])
    for path in (folder / "st1").iterdir():
        path.rename(path.with_suffix(""))
    write_dicomdir(folder / name, [["ST1", "000"], ["ST1", "001"]])
    return folder / name


WRITERS = {
    **dict.fromkeys((*sorted(NATIVE), RLE, JPEG_2000, JPEG_LS), write_dicom),
    "enhanced.dcm": lambda folder, name: write_enhanced(folder / name, [0, 5, 10]),
    **dict.fromkeys(("a.nii", "a.nii.gz", "two.nii"), write_nifti),
    "a1.png": write_png,
    **dict.fromkeys(("a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"), write_archive),
    "a.seg": write_seg,
    "DICOMDIR": write_medium,
}


def fuzz(source, folder, count=COUNT):
    """Reads mutations in a child process; returns what it counted."""
    (folder / "mutated").mkdir()
    script = pathlib.Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), str(source), str(folder / "mutated"), str(count), "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, cwd=script.parents[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    counts = json.loads(done.stdout)
    assert counts["read"] + counts["rejected"] == count
    assert counts["slowest"] < SLOWEST and counts["memory"] < MEMORY
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_read_or_rejected(tmp_path, name):
    counts = fuzz(WRITERS[name](tmp_path, name), tmp_path)
    assert counts["rejected"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("ending", REAL)
def test_damaged_files_in_other_encodings_are_read_or_rejected(shared_data, tmp_path, ending):
    (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob(f"*_1.2.840*{ending}.dcm")
    counts = fuzz(path, tmp_path)
    assert counts["rejected"] > 0
