"""Decoders that abort, hang or need too long cannot take the command with them."""

import time

import numpy as np
import pydicom
import pytest
from pydicom.uid import MediaStorageDirectoryStorage, SegmentationStorage
from test_dicom import only_reason, only_series

from maknet_jax.ct import decoding, dicom, dicom_seg, reading, search
from maknet_jax.errors import InputError, Rejected


@pytest.fixture
def lossless(shared_data):
    """A slice as lossless JPEG, which the child process decodes."""
    (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob("*.1.2.4.70.dcm")
    return path


def test_a_stream_that_aborts_the_decoder_is_rejected_and_the_next_is_read(shared_data, lossless):
    expected = dicom.read_slice(lossless)[1]
    for path in sorted((shared_data.parent / "cases").glob("jpeg_lossless_abort*.dcm")):
        assert "aborted" in only_reason(path)
        np.testing.assert_array_equal(only_series(lossless).hu[0], expected)


def test_a_decoder_that_takes_too_long_is_stopped(lossless, monkeypatch):
    expected = dicom.read_slice(lossless)[1]
    monkeypatch.setattr(decoding, "TIME_LIMIT", 0.0)
    started = time.monotonic()
    with pytest.raises(Rejected, match="0 seconds"):
        dicom.read_slice(lossless)
    assert time.monotonic() - started < 10
    monkeypatch.undo()
    np.testing.assert_array_equal(dicom.read_slice(lossless)[1], expected)


def test_the_child_process_imports_the_package_of_its_parent(lossless, tmp_path, monkeypatch):
    """Not one in the current folder."""
    (tmp_path / "maknet_jax").mkdir()
    (tmp_path / "maknet_jax" / "__init__.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    decoding._child.cache_clear()
    assert dicom.read_slice(lossless)[1].shape == (512, 512)
    decoding._child.cache_clear()
    monkeypatch.setattr(decoding, "_START", "raise SystemExit(7)")
    with pytest.raises(Rejected, match="does not start: exit code 7"):
        dicom.read_slice(lossless)
    decoding._child.cache_clear()


def test_only_lossless_jpeg_needs_the_child_process(shared_data, monkeypatch):
    monkeypatch.setattr(decoding, "_child", lambda: pytest.fail("started a process"))
    for path in (shared_data / "dicom" / "transfer_syntaxes").glob("*.dcm"):
        if path.name.endswith((".57.dcm", ".70.dcm")) or dicom.read_header(path).problem:
            continue
        dicom.read_slice(path)


def test_parsing_is_bounded_in_time(shared_data, tmp_path, monkeypatch):
    bomb = shared_data.parent / "cases" / "deflated_200mib_of_empty_elements.dcm"
    started = time.process_time()
    assert "64 MiB" in only_reason(bomb)
    assert time.process_time() - started < 10
    monkeypatch.setattr(reading, "MOST_READS", 5000)
    empty = b"\x09\x00\x01\x10LO\0\0" * 6000
    meta = b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"
    (tmp_path / "plain.dcm").write_bytes(bytes(128) + b"DICM" + meta + empty)
    item = b"\xfe\xff\0\xe0\x08\0\0\0\x08\0\x60\0CS\0\0"
    nested = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + item * 6000
    (tmp_path / "items.dcm").write_bytes(bytes(128) + b"DICM" + meta + nested)
    for name in ("plain.dcm", "items.dcm"):
        assert "5000 elements" in only_reason(tmp_path / name)
    (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob("*.4.90.dcm")
    data = pydicom.dcmread(path)
    fragments = b"\xfe\xff\0\xe0\2\0\0\0ab" * 6000
    data.PixelData = b"\xfe\xff\0\xe0\0\0\0\0" + fragments + b"\xfe\xff\xdd\xe0\0\0\0\0"
    data.save_as(tmp_path / "fragments.dcm")
    assert "5000 elements" in only_reason(tmp_path / "fragments.dcm")


def test_parsing_of_other_dicom_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_READS", 250)  # times 20
    empty = b"\x09\x00\x01\x10LO\0\0" * 6000
    for storage in (SegmentationStorage, MediaStorageDirectoryStorage):
        meta = b"\x02\0\x02\0UI" + len(storage).to_bytes(2, "little") + storage.encode()
        meta += b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"
        (tmp_path / storage).write_bytes(bytes(128) + b"DICM" + meta + empty)
    with pytest.raises(Rejected, match="5000 elements"):
        dicom_seg.read_header(tmp_path / SegmentationStorage)
    with pytest.raises(InputError, match="5000 elements"):
        search.find_series(tmp_path / MediaStorageDirectoryStorage)
