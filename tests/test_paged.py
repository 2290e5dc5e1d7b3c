"""Large volumes that are mapped from a file."""

import hashlib
import mmap
import os

import numpy as np
import pytest

from maknet_jax.ct import containers, paged, preprocess

PLANES = np.arange(12 * 8 * 8, dtype=np.int16).reshape(12, 8, 8)


@pytest.fixture
def mapped(monkeypatch):
    """Even the smallest volume is mapped, and its pages are released after each slice."""
    monkeypatch.setattr(paged, "IN_MEMORY", 0)
    monkeypatch.setattr(paged, "BLOCK", 1)


@pytest.mark.parametrize("order", [range(12), range(11, -1, -1), [3, 0, 7, 11, 1]])
def test_slices_are_ordered_in_memory_and_in_a_file(order, monkeypatch):
    for limit in (paged.IN_MEMORY, 0):
        monkeypatch.setattr(paged, "IN_MEMORY", limit)
        monkeypatch.setattr(paged, "BLOCK", 1)
        slices = paged.Slices(len(PLANES))
        for plane in PLANES:
            slices.append(plane)
        volume = slices.ordered(list(order))
        assert slices.alike and isinstance(volume, np.memmap) == (limit == 0)
        np.testing.assert_array_equal(volume, PLANES[list(order)])
        paged.release(volume)
        np.testing.assert_array_equal(volume, PLANES[list(order)])


def test_a_slice_of_another_shape_is_noticed():
    slices = paged.Slices(2)
    slices.append(PLANES[0])
    slices.append(PLANES[0, :4])
    assert not slices.alike


def test_a_full_disk_leaves_the_volume_in_memory(mapped, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert type(paged.empty((2, 3))) is np.ndarray
    assert "TMPDIR" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages are released on POSIX only")
def test_released_pages_do_not_count_as_memory(mapped):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc")
    size = 64 << 20
    before = resident()
    array = paged.empty((64, size // 64), np.uint8)
    array[:] = 7
    assert resident() - before > size / 2
    paged.release(array[3:])
    assert resident() - before < size / 4
    assert array[63, -1] == array[0, 0] == 7


def test_the_threshold_of_8_bit_images_is_the_same_in_blocks(mapped):
    window = (-175.0, 275.0)
    hu = np.full((5, 4, 4), -175, np.int16)
    assert preprocess.body_threshold(hu, window) == -166
    hu[4, 3, 3] = -176
    assert preprocess.body_threshold(hu, window) == preprocess.BODY


def test_the_id_of_a_file_is_that_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()[:32]
    assert containers.content_id(tmp_path / "a") == f"sha256:{digest}"
