"""Series in folders: found by content, read as volumes, and named with their neighbours."""

import concurrent.futures
import os

import numpy as np
import pytest
from PIL import Image
from test_dicom import stored_values, write_series, write_slice

from maknet_jax.ct import png, search, volumes
from maknet_jax.errors import InputError, Rejected


def write_pngs(folder, names):
    folder.mkdir(exist_ok=True, parents=True)
    for k, name in enumerate(names):
        Image.fromarray(np.full((3, 3), 32768 + k, np.uint16)).save(folder / name)


def test_all_real_data_is_found_in_a_fixed_order(shared_data):
    # Named one by one: the shared folder may hold other data sets too.
    folders = [shared_data / name for name in ("body_part_ordinal", "deeplesion", "dicom", "nifti")]
    found, reasons = [], []
    for folder in folders:
        listed = search.find_series(folder)
        assert search.find_series(folder, workers=4) == listed
        found += listed[0]
        reasons += listed[1]
    counts = {kind: sum(ref.kind == kind for ref in found) for kind in ("dicom", "nifti", "png")}
    assert counts == {"dicom": 1, "nifti": 2, "png": 77}
    assert len({ref.key for ref in found}) == len(found)
    assert [ref.key for ref in found if ref.count == 16] == ["Images_png/000001_02_01:8-23"]
    names = [path.rsplit("/", 1)[1] for path, _ in reasons]
    assert names[0] == "CT2.dcm" and len(names) == 6  # duplicates twice, and four lossy JPEGs


def test_a_label_map_is_no_ct(shared_data):
    found, _ = search.find_series(shared_data / "nifti")
    assert volumes.load_series(found[0]).hu.shape == (112, 101, 122)
    with pytest.raises(Rejected, match="0 to 117"):
        volumes.load_series(found[1])


def test_deeplesion_volume(shared_data):
    folder = shared_data / "deeplesion" / "Images_png" / "000001_01_01"
    (ref,), reasons = search.find_series(folder)
    volume = volumes.load_series(ref)
    assert reasons == [] and ref.key == volume.series == "000001_01_01:103-115"
    assert volume.slices == tuple(f"{k}.png" for k in range(103, 116))
    np.testing.assert_array_equal(volume.hu[6], png.read_png(folder / "109.png"))
    assert np.isnan(volume.spacing).all() and len(set(volume.uids)) == 13


def test_what_is_no_image_is_passed_over_in_silence(tmp_path):
    (tmp_path / "README").write_text("about")
    (tmp_path / "labels.csv").write_text("path,labels\n")
    (tmp_path / ".hidden.dcm").write_bytes(b"")
    (tmp_path / "odd").write_bytes(b"\x08\x00" + bytes(20))
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff")
    write_slice(
        tmp_path / "DICOMDIR", SOPClassUID="1.2.840.10008.1.3.10", drop=["Modality", "Rows"]
    )
    report = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Modality": "SR"}
    write_slice(tmp_path / "report", **report, drop=["Rows", "Columns", "PixelData"])
    assert search.find_series(tmp_path) == ([], [])
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert [os.path.basename(path) for path, _ in search.find_series(tmp_path)[1]] == [
        "empty.dcm",
        "empty.nii.gz",
    ]
    with pytest.raises(InputError, match="nowhere"):
        search.find_series(tmp_path / "nowhere")


def test_dicom_is_found_by_content_and_grouped_by_uid(tmp_path):
    for k, z in enumerate((0, 5, 10)):
        write_slice(tmp_path / f"IM{k}", z=z)
        write_slice(tmp_path / f"x{k}.jpg", z=z, SeriesInstanceUID="1.2.9")
    write_slice(tmp_path / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for k in range(3):
        mr = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}
        write_slice(tmp_path / f"mr{k}", SeriesInstanceUID="1.2.5", **mr)
    found, reasons = search.find_series(tmp_path)
    assert [(ref.key, ref.count) for ref in found] == [("1.2.3", 3), ("1.2.9", 3)]
    (_, mr), (_, scout) = reasons
    assert "MR" in mr and "3 files" in mr and "1.2.5" in mr
    assert "LOCALIZER" in scout and "files" not in scout


def test_runs_of_png_become_series(tmp_path):
    write_pngs(tmp_path / "a" / "000001_01_01", ["008.png", "009.png", "010.png", "012.png"])
    write_pngs(tmp_path / "flat", ["000002_01_01_099.png", "000002_01_01_100.png", "liver.png"])
    write_pngs(tmp_path / "twice", ["1.png", "01.png"])
    found, reasons = search.find_series(tmp_path)
    assert [(ref.key, ref.count) for ref in found] == [
        ("a/000001_01_01:8-10", 3),
        ("a/000001_01_01:12-12", 1),
        ("flat/000002_01_01:99-100", 2),
        ("flat/liver", 1),
    ]
    assert "index 1" in reasons[0][1]


def test_the_slice_of_a_dicom_file_with_its_neighbours(tmp_path):
    paths = write_series(tmp_path, [0, 4, 9, 14])
    write_slice(tmp_path / "other.dcm", z=7, SeriesInstanceUID="1.2.9")
    whole = volumes.load_series(search.find_series(tmp_path)[0][0])
    for k, wanted in ((0, ("001.dcm", "000.dcm")), (1, ("002.dcm", "001.dcm", "000.dcm"))):
        volume, index = volumes.load_series_of(paths[k])
        assert volume.slices == wanted and volume.slices[index] == paths[k].name
        assert volume.spacing == whole.spacing and volume.series == whole.series
        np.testing.assert_array_equal(volume.hu[index], stored_values(k).astype(int) - 1024)
    wide, index = volumes.load_series_of(paths[0], around=2)
    assert wide.slices == ("002.dcm", "001.dcm", "000.dcm") and index == 2
    with pytest.raises(InputError, match=r"2 series \(1.2.3, 1.2.9\)"):
        volumes.load_series_of(tmp_path)
    paths[1].unlink()  # now a slice is missing, so neighbours would be wrong
    with pytest.raises(Rejected, match="9.00 mm .*5.00 mm"):
        volumes.load_series_of(paths[0])


def test_the_slice_of_a_png_file_and_of_a_volume(tmp_path, shared_data):
    write_pngs(tmp_path / "s", ["009.png", "010.png", "011.png"])
    volume, index = volumes.load_series_of(tmp_path / "s" / "010.png")
    assert index == 1 and volume.hu[:, 0, 0].tolist() == [0, 1, 2]
    volume, index = volumes.load_series_of(tmp_path / "s" / "009.png")
    assert index == 0 and volume.slices == ("009.png", "010.png")
    torso = shared_data / "nifti" / "torso_112" / "example_ct.nii.gz"
    volume, index = volumes.load_series_of(torso)
    assert index is None and volumes.slice_of(volume, 111) == 0
    with pytest.raises(InputError, match="112 .*example_ct.nii.gz.* 111 .*0"):
        volumes.slice_of(volume, 112)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        volumes.load_series_of(tmp_path / "empty")


def test_many_threads_read_at_once(shared_data):
    """The silence around pydicom holds in threads; JPEG lossless borrows stderr in turn."""
    folder = shared_data / "dicom" / "transfer_syntaxes"
    refs = [search.find_series(path)[0] for path in sorted(folder.glob("*.4.[578][07].dcm"))] * 4
    refs = [found[0] for found in refs if found]
    assert len(refs) == 12
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        planes = [volume.hu for volume in pool.map(volumes.load_series, refs)]
    for plane in planes:
        np.testing.assert_array_equal(plane, planes[0])
