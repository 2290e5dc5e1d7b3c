"""Finding cases: the layouts, how CT and masks are paired, and what is rejected."""

import json
import pathlib

import nibabel
import numpy as np
import organ_cases
import pytest

from maknet_jax.ct import nifti
from maknet_jax.data import segmentation_cases
from maknet_jax.data.segmentation_cases import Mask, find_cases
from maknet_jax.errors import InputError, Rejected

TABLE = (
    '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension> <VolumeInformation Index="0">'
    '<LabelTable>\n<Label Key="1" Red="0.0"><![CDATA[liver]]></Label>\n'
    '<Label Key="7" Red="0.5">spleen</Label></LabelTable></VolumeInformation></CaretExtension>'
)


def write_map(folder, extension=None, values=(1, 7)):
    """A case with a label map of two organs."""
    organ_cases.write_nifti(folder / "ct.nii.gz", organ_cases.ct())
    volume = np.zeros(organ_cases.SHAPE, np.uint8)
    volume[2:5, 10:20, 10:20] = values[0]
    volume[4:8, 20:30, 10:20] = values[1]
    organ_cases.write_nifti(folder / "segmentation.nii.gz", volume, extension=extension)
    return folder


def test_totalsegmentators_layout(tmp_path):
    for name in ("s0002", "s0001", "nested/s0003"):
        organ_cases.write_case(tmp_path / name, {"liver": [9] * 12, "cord": [9] * 12})
    (tmp_path / "s0001" / "segmentations" / "notes.txt").write_text("not a mask")
    plan = find_cases(tmp_path)
    assert [case.name for case in plan.cases] == ["nested/s0003", "s0001", "s0002"]
    case = next(case for case in plan.cases if case.name == "s0001")
    folder = tmp_path / "s0001" / "segmentations"
    assert case.masks == (
        ("cord", Mask("file", str(folder / "cord.nii.gz"))),
        ("liver", Mask("file", str(folder / "liver.nii.gz"))),
    )
    assert case.patient == "s0001" and case.ref.count == 12
    assert plan.failures == [] == plan.unsegmented
    # A folder that is itself a case.
    (only,) = find_cases(tmp_path / "s0002").cases
    assert only.name == "s0002"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("case/segmentation.json", json.dumps({"1": "liver", "7": "spleen"})),
        ("case/segmentation.json", json.dumps({"background": 0, "liver": 1, "spleen": 7})),
        ("segmentation.json", json.dumps({"1": "liver", "7": "spleen"})),
        ("case/segmentation.csv", "value,name\n1,liver\n7, spleen\n"),
        ("case/segmentation.csv", 'Value;Name\r\n"1";"liver"\r\n;\r\n7;spleen\r\n'),
        ("segmentation.csv", "value,name\n1,liver\n7,spleen\n"),
        (None, None),
    ],
)
def test_one_label_map_with_names_beside_it_above_it_or_in_its_header(tmp_path, place, text):
    folder = write_map(tmp_path / "case", None if place else TABLE.encode())
    if place:
        (tmp_path / place).write_text(text)
    (case,) = find_cases(tmp_path).cases
    path = str(folder / "segmentation.nii.gz")
    assert case.masks == (("liver", Mask("value", path, 1)), ("spleen", Mask("value", path, 7)))


def test_names_beside_the_map_come_before_those_in_its_header(tmp_path):
    folder = write_map(tmp_path / "case", TABLE.encode())
    (folder / "segmentation.json").write_text('{"1": "first", "7": "second"}')
    (case,) = find_cases(tmp_path).cases
    assert [name for name, _ in case.masks] == ["first", "second"]


def test_label_tables_in_headers(tmp_path):
    folder = write_map(tmp_path / "case", TABLE.encode())
    assert nifti.read_label_names(folder / "segmentation.nii.gz") == {1: "liver", 7: "spleen"}
    assert nifti.read_label_names(folder / "ct.nii.gz") == {}
    image = nibabel.load(folder / "segmentation.nii.gz")
    caret = nibabel.nifti1.Nifti1Extension(30, image.header.extensions[0].content)
    image.header.extensions[:] = [caret]  # under its own code
    image.to_filename(tmp_path / "caret.nii")
    assert nifti.read_label_names(tmp_path / "caret.nii") == {1: "liver", 7: "spleen"}
    for text in (
        TABLE.replace("</Label>", ""),
        TABLE.replace("<Caret", "<!DOCTYPE a><Caret", 1),
        TABLE.replace('"7"', '"1"'),
    ):
        write_map(folder, text.encode())
        with pytest.raises(Rejected, match="label table"):
            nifti.read_label_names(folder / "segmentation.nii.gz")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"1": "liver", "7": "liver"}', "same name"),
        ("[1, 2]", "does not name values"),
        ('[["1", "liver"]]', "not an object"),
        ('{"1": 2}', "does not name values"),
        ('{"one": "liver"}', "does not name values"),
        ("{}", "no names"),
        ('{"1": "liver", "1": "spleen"}', "two names"),
        ('{"liver": 1, "spleen": 1}', "two names"),
        ('{"1": null}', "does not name values"),
        ('{"liver": true}', "does not name values"),
        ('{"labels": {"liver": 1}}', "does not name values"),
        ("[" * 200_000, "does not name values"),
    ],
)
def test_invalid_names_reject_the_case(tmp_path, text, part):
    folder = write_map(tmp_path / "case")
    (folder / "segmentation.json").write_text(text)
    plan = find_cases(tmp_path)
    ((path, reason),) = plan.failures
    assert plan.cases == [] and path == str(folder / "ct.nii.gz") and part in reason


def test_unusable_cases_are_rejected_with_a_reason(tmp_path):
    organ_cases.write_case(tmp_path / "good", {"liver": [9] * 12})
    organ_cases.write_case(tmp_path / "both", {"liver": [9] * 12})
    write_map(tmp_path / "both", TABLE.encode())
    organ_cases.write_nifti(tmp_path / "none" / "ct.nii.gz", organ_cases.ct())
    write_map(tmp_path / "nameless")
    organ_cases.write_case(tmp_path / "broken", {"liver": [9] * 12})
    (tmp_path / "broken" / "ct.nii.gz").write_bytes(b"")
    organ_cases.write_case(tmp_path / "twice", {"liver": [9] * 12})
    mask = organ_cases.organ([9] * 12).astype(np.uint8)
    organ_cases.write_nifti(tmp_path / "twice" / "segmentations" / "liver.nii", mask)
    # A mask that cannot be read is not one that is missing.
    for name in ("dead", "folder"):
        organ_cases.write_case(tmp_path / name, {"liver": [9] * 12})
    (tmp_path / "dead" / "segmentations" / "cord.nii.gz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder" / "segmentations" / "cord.nii.gz").mkdir()
    organ_cases.write_case(tmp_path / "cts", {"liver": [9] * 12})
    organ_cases.write_nifti(tmp_path / "cts" / "ct.nii", organ_cases.ct(1))
    write_map(tmp_path / "names")
    (tmp_path / "names" / "segmentation.json").write_text('{"1": "liver"}')
    (tmp_path / "names" / "segmentation.csv").write_text("value,name\n1,spleen\n")
    plan = find_cases(tmp_path)
    assert [case.name for case in plan.cases] == ["good"]
    parts = len(tmp_path.parts)
    reasons = {pathlib.Path(path).parts[parts]: reason for path, reason in plan.failures}
    expected = "both broken cts dead folder nameless names none twice"
    assert list(reasons) == expected.split()
    assert "dead link" in reasons["dead"] and "a folder" in reasons["folder"]
    assert "ct.nii.gz and ct.nii exist" in reasons["cts"]
    assert "segmentation.json and segmentation.csv exist" in reasons["names"]
    assert reasons["both"].startswith("both of") and reasons["none"].startswith("neither of")
    assert "no names" in reasons["nameless"] and "broken NIfTI" in reasons["broken"]
    assert "two masks of liver" in reasons["twice"]


def test_masks_without_a_ct_are_rejected_and_cases_inside_cases_are_read(tmp_path):
    organ_cases.write_case(tmp_path / "good", {"liver": [9] * 12})
    organ_cases.write_case(tmp_path / "good" / "later", {"liver": [9] * 12})
    (tmp_path / "good" / "raw").mkdir()
    (tmp_path / "good" / "raw" / "ct.nrrd").write_bytes(b"where the CT comes from")
    organ_cases.write_case(tmp_path / "masks", {"liver": [9] * 12})
    write_map(tmp_path / "map", TABLE.encode())
    for name in ("masks", "map"):
        (tmp_path / name / "ct.nii.gz").unlink()
    (tmp_path / "other" / "segmentations").mkdir(parents=True)  # holds no NIfTI
    plan = find_cases(tmp_path)
    assert [case.name for case in plan.cases] == ["good", "good/later"]
    assert [path for path, _ in plan.failures] == [str(tmp_path / n) for n in ("map", "masks")]
    assert all("without a CT" in reason for _, reason in plan.failures)


@pytest.mark.parametrize("place", ["", "series"])
def test_a_mask_without_a_ct_does_not_hide_other_cases(tmp_path, place, monkeypatch):
    seen = []
    monkeypatch.setattr(segmentation_cases, "_is_seg", lambda path: path.endswith(".dcm"))
    monkeypatch.setattr(
        segmentation_cases, "_add_dicom_cases", lambda root, files, *rest: seen.extend(files)
    )
    mask = organ_cases.organ([9] * 12).astype(np.uint8)
    organ_cases.write_nifti(tmp_path / place / "segmentations" / "liver.nii.gz", mask)
    (tmp_path / "series").mkdir(exist_ok=True)
    (tmp_path / "series" / "seg.dcm").touch()
    (tmp_path / "series" / "deep").mkdir()
    (tmp_path / "series" / "deep" / "seg.dcm").touch()
    ((path, reason),) = find_cases(tmp_path).failures
    assert path == str(tmp_path / place) and "without a CT" in reason
    assert seen == [str(tmp_path / "series" / n) for n in ("seg.dcm", "deep/seg.dcm")]


def test_names_of_masks_are_printable(tmp_path):
    mask = organ_cases.organ([9] * 12).astype(np.uint8)
    folder = organ_cases.write_case(tmp_path / "case", {})
    organ_cases.write_nifti(folder / "segmentations" / "li\x1bver.nii.gz", mask)
    write_map(tmp_path / "map", TABLE.replace("spleen", "sp\tleen").encode())
    names = [name for case in find_cases(tmp_path).cases for name, _ in case.masks]
    assert names == ["li\\x1bver", "liver", "sp\\tleen"]


def test_folders_without_a_case_are_refused(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        find_cases(tmp_path / "absent")
    with pytest.raises(InputError, match="has no case"):
        find_cases(tmp_path)
    (tmp_path / "pt_1").mkdir()
    (tmp_path / "pt_1" / "ct.csv").write_text(",data\n")
    with pytest.raises(InputError, match="maknet prepare openkbp"):
        find_cases(tmp_path)


def test_links_to_cases_are_followed_once(tmp_path):
    case = organ_cases.write_case(tmp_path / "store" / "pt_1", {"liver": [9] * 12})
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "pt_1").symlink_to(case)
    (tmp_path / "in" / "deep" / "circle").symlink_to(tmp_path / "in")
    assert [listed.name for listed in find_cases(tmp_path / "in").cases] == ["pt_1"]
