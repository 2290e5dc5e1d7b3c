"""Series in folders: detected by content, grouped, and listed in a fixed order."""

import os
import shutil

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from test_dicom import write_series, write_slice

from maknet_jax.ct import reading, search, volumes
from maknet_jax.errors import InputError, Rejected
from maknet_jax.figures import charts, contact_sheet


def write_pngs(folder, names):
    folder.mkdir(exist_ok=True, parents=True)
    for k, name in enumerate(names):
        values = 32768 + k - 100 * np.arange(9).reshape(3, 3)
        Image.fromarray(values.astype(np.uint16)).save(folder / name)


def test_all_real_series_are_listed_in_a_fixed_order(shared_data):
    # Named one by one, because the shared folder may contain other data sets.
    folders = [shared_data / name for name in ("body_part_ordinal", "deeplesion", "dicom", "nifti")]
    series, reasons = [], []
    for folder in folders:
        listed = search.find_series(folder)
        assert search.find_series(folder, workers=4) == listed
        series += listed[0]
        reasons += listed[1]
    counts = {kind: sum(ref.kind == kind for ref in series) for kind in ("dicom", "nifti", "png")}
    assert counts == {"dicom": 2, "nifti": 2, "png": 77}
    assert len({ref.key for ref in series}) == len(series)
    assert [ref.key for ref in series if ref.count == 16] == ["Images_png/000001_02_01:8-23"]
    names = [path.rsplit("/", 1)[1] for path, _ in reasons]
    assert names[0] == "CT2.dcm" and len(names) == 7  # sparse slices, and six lossy files


def test_files_that_are_not_images_are_skipped_silently(tmp_path):
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


def test_other_volume_formats_are_rejected_by_name(tmp_path):
    names = ("a.hdr", "a.img", "b.img", "b.hdr.gz", "c.mha", "d.MHD", "e.nrrd", "f.nhdr")
    for name in names:
        (tmp_path / name).write_bytes(b"some volume")
    write_slice(tmp_path / "slice.img")  # DICOM is recognised by its content
    series, reasons = search.find_series(tmp_path)
    assert [ref.count for ref in series] == [1]
    listed = {os.path.basename(path): reason for path, reason in reasons}
    assert sorted(listed) == sorted(names)
    assert "nibabel" in listed["a.hdr"] and "NRRD" in listed["e.nrrd"]
    for name in names:
        with pytest.raises(Rejected, match="convert"):
            volumes.load_series_of(tmp_path / name)


def test_a_nifti_file_that_is_alone_is_named_with_its_folder(tmp_path):
    for name in ("p1/ct.nii.gz", "p2/ct.nii.gz", "p2/second.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / name)

    def keys(*paths):
        return [ref.key for ref in search.find_series([tmp_path / path for path in paths])[0]]

    assert keys("p1/ct.nii.gz") == keys("p1") == ["p1/ct.nii.gz"]
    assert keys("p2/ct.nii.gz") == ["p2/ct.nii.gz"]
    assert keys("p2") == ["ct.nii.gz", "second.nii.gz"]
    assert keys(".") == ["p1/ct.nii.gz", "p2/ct.nii.gz", "p2/second.nii.gz"]
    assert keys("p2/ct.nii.gz", "p1") == ["p2/ct.nii.gz", "p1/ct.nii.gz"]
    ((ref,), _) = search.find_series(tmp_path / "p1")
    assert search.relative_name(ref.paths[0], ref.root) == "ct.nii.gz"


def write_dicomdir(path, names):
    """Writes a DICOMDIR that lists images by their ReferencedFileID."""
    records = [{"DirectoryRecordType": "PATIENT"}]
    records += [{"DirectoryRecordType": "IMAGE", "ReferencedFileID": name} for name in names]
    sequence = [pydicom.Dataset() for _ in records]
    for item, record in zip(sequence, records, strict=True):
        for key, value in record.items():
            setattr(item, key, value)
    directory = {"SOPClassUID": "1.2.840.10008.1.3.10", "DirectoryRecordSequence": sequence}
    return write_slice(path, **directory, drop=["Modality", "Rows", "PixelData"])


def test_a_dicomdir_is_read_as_the_files_that_it_lists(tmp_path):
    write_series(tmp_path / "st1", [0, 5, 10, 15])
    for k in range(4):
        (tmp_path / "st1" / f"{k:03d}.dcm").rename(tmp_path / "st1" / f"im{k}")
    listed = [["ST1", "IM0"], ["ST1", "IM1"], ["ST1", "IM2"], ["ST1", "IM9"], ["..", "x"]]
    write_dicomdir(tmp_path / "DICOMDIR", listed[:-1])
    series, failures = search.find_series(tmp_path / "DICOMDIR")
    assert [(ref.key, ref.count) for ref in series] == [("1.2.3", 3)]
    ((path, reason),) = failures
    assert path == str(tmp_path / "ST1" / "IM9") and "not found" in reason
    volume, index = volumes.load_series_of(tmp_path / "DICOMDIR")
    assert index is None and volume.slices == ("st1/im2", "st1/im1", "st1/im0")
    (tmp_path / "x").write_bytes((tmp_path / "st1" / "im3").read_bytes())
    with reading.quiet():  # pydicom warns about such names
        write_dicomdir(tmp_path / "st1" / "DICOMDIR", listed[-1:])
    series, failures = search.find_series(tmp_path / "st1" / "DICOMDIR")
    assert series == [] and len(failures) == 1, "files outside of its folder are not read"


def test_pictures_that_we_wrote_are_not_taken_for_ct(tmp_path):
    contact_sheet.write_contact_sheet(tmp_path / "contact_sheet.png", [], [])
    scores = np.zeros((3, 1))
    charts.write_label_chart(tmp_path / "labels.000.png", scores, scores > 1, ["liver"])
    write_pngs(tmp_path, ["1.png", "2.png"])
    series, failures = search.find_series(tmp_path)
    assert [ref.count for ref in series] == [2] and failures == []


def test_dicom_is_detected_by_content_and_grouped_by_uid(tmp_path):
    for k, z in enumerate((0, 5, 10)):
        write_slice(tmp_path / f"IM{k}", z=z)
        write_slice(tmp_path / f"x{k}.jpg", z=z, SeriesInstanceUID="1.2.9")
    write_slice(tmp_path / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for k in range(3):
        mr = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}
        write_slice(tmp_path / f"mr{k}", SeriesInstanceUID="1.2.5", **mr)
    series, reasons = search.find_series(tmp_path)
    assert [(ref.key, ref.count) for ref in series] == [("1.2.3", 3), ("1.2.9", 3)]
    (_, mr), (_, scout) = reasons
    assert "MR" in mr and "3 files" in mr and "1.2.5" in mr
    assert "LOCALIZER" in scout and "files" not in scout


def test_runs_of_png_become_series(tmp_path):
    write_pngs(tmp_path / "a" / "000001_01_01", ["008.png", "009.png", "010.png", "012.png"])
    write_pngs(tmp_path / "flat", ["000002_01_01_099.png", "000002_01_01_100.png", "liver.png"])
    write_pngs(tmp_path / "twice", ["1.png", "01.png"])
    series, reasons = search.find_series(tmp_path)
    assert [(ref.key, ref.count) for ref in series] == [
        ("a/000001_01_01:8-10", 3),
        ("a/000001_01_01:12-12", 1),
        ("flat/000002_01_01:99-100", 2),
        ("flat/liver", 1),
    ]
    assert "index 1" in reasons[0][1]


def test_a_copy_of_a_png_under_the_same_number_is_taken_once(tmp_path):
    write_pngs(tmp_path, ["1.png", "2.png", "7.png"])
    shutil.copy(tmp_path / "2.png", tmp_path / "02.png")
    series, reasons = search.find_series(tmp_path)
    assert reasons == [] and [(ref.count, ref.copies) for ref in series] == [(2, 1), (1, 0)]


@pytest.mark.parametrize("uid", ["", "1.2.3"])
def test_a_copied_folder_is_one_series_with_and_without_a_uid(tmp_path, uid):
    """Without one, a series is named by its slices, and two had the same name and ids."""
    write_series(tmp_path / "a", [0, 5, 10], SeriesInstanceUID=uid)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_series(tmp_path / "c", [0, 5], SeriesInstanceUID=uid and "1.2.4")
    series, reasons = search.find_series(tmp_path)
    assert reasons == [] and sorted((ref.count, ref.copies) for ref in series) == [(2, 0), (3, 3)]
    assert len({ref.key for ref in series}) == 2


def test_a_folder_that_is_named_in_several_ways_is_read_once(tmp_path, monkeypatch):
    write_series(tmp_path / "s", [0, 5, 10], SeriesInstanceUID="")
    (tmp_path / "link").symlink_to("s")
    monkeypatch.chdir(tmp_path)
    for paths in (["s", "link"], [tmp_path / "s" / "001.dcm", "s"], ["s/002.dcm", "link", "s"]):
        (series,), reasons = search.find_series(paths)
        assert (series.count, series.copies, reasons) == (3, 0, [])
        assert [os.path.basename(path)[:3] for path in series.paths] == ["002", "001", "000"]
