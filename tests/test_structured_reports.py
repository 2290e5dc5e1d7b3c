"""DICOM structured reports of predictions, read back by highdicom."""

import dataclasses
import shutil
import sys

import numpy as np
import pydicom
import pytest

from maknet_jax import cli, files, predict
from maknet_jax.ct import search
from maknet_jax.ct.volumes import Volume
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, Rejected
from maknet_jax.evaluation import structured_reports
from maknet_jax.evaluation.domain import Verdict
from maknet_jax.evaluation.series import SeriesResult

hd = pytest.importorskip("highdicom")

LABELS = ("liver", "left kidney", "lymph node")  # the last one has no code
ROWS = {"liver": (0, 1, 2), "left kidney": (2, 3), "lymph node": (1,)}


def result_of(uids):
    """Four slices: LABELS are predicted in ROWS with confidences from 0.6 to 0.9."""
    confidences = np.zeros((4, 3), np.float32)
    for name, rows in ROWS.items():
        confidences[list(rows), LABELS.index(name)] = [0.6 + 0.1 * row for row in rows]
    names = tuple(f"{k}.dcm" for k in range(4))
    volume = Volume(np.zeros((4, 2, 2), np.int16), (5.0, 1.0, 1.0), "1.2.3", names, uids)
    return SeriesResult.of_scores(
        volume,
        Vocabulary.from_names(LABELS),
        np.full(3, 0.5),
        confidences,
        features=None,
        read=lambda: volume,
    )


def header():
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3.0"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2", "1.2.3"
    data.PatientID, data.PatientName, data.PatientSex = "p7", "Doe^J", "O"
    data.PatientBirthDate = data.StudyID = data.AccessionNumber = data.ReferringPhysicianName = ""
    data.StudyDate, data.StudyTime = "20200101", "120000"
    return data


def groups_of(path):
    """Label -> (code, laterality, UIDs, percent) of a report."""
    report = hd.sr.srread(path)
    groups = {}
    for group in report.content.get_image_measurement_groups():
        (site,) = group.finding_sites
        value = [item.value for item in group.get_measurements()]
        uids = [image.referenced_sop_instance_uid for image in group.source_images]
        side = site.laterality.meaning if site.laterality else ""
        groups[group.tracking_identifier] = (site.value.value, side, uids, value)
    return report, groups


def test_a_report_has_the_coded_labels_and_their_slices(tmp_path):
    uids = tuple(f"1.2.3.{k}" for k in range(4))
    data = structured_reports.report_of(result_of(uids), header(), "torso, step 8")
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    report, groups = groups_of(tmp_path / "a.dcm")
    assert (report.PatientID, report.StudyInstanceUID, report.Modality) == ("p7", "1.2", "SR")
    assert report.SeriesInstanceUID != "1.2.3"
    assert set(groups) == {"regions of the series", "liver", "left kidney"}
    assert groups["liver"] == ("10200004", "", list(uids[:3]), [pytest.approx(70)])
    assert groups["left kidney"] == ("64033007", "Left", list(uids[2:]), [pytest.approx(85)])
    assert groups["regions of the series"] == ("818981001", "", list(uids), [])
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    referenced = [item.ReferencedSOPInstanceUID for item in evidence.ReferencedSOPSequence]
    assert sorted(referenced) == list(uids)
    assert search.find_series(tmp_path) == ([], [])  # a report is not CT, and not a failure


def test_frames_of_one_file_are_referenced_by_number(tmp_path):
    data = header()
    data.SOPClassUID = pydicom.uid.EnhancedCTImageStorage
    result = result_of(tuple(f"1.2.9:{k}" for k in (1, 2, 3, 4)))
    structured_reports.report_of(result, data, "torso").save_as(
        tmp_path / "a.dcm", enforce_file_format=True
    )
    for group in hd.sr.srread(tmp_path / "a.dcm").content.get_image_measurement_groups():
        (image,) = group.source_images
        frames = {"liver": [1, 2, 3], "left kidney": [3, 4]}
        expected = frames.get(group.tracking_identifier, [1, 2, 3, 4])
        assert image.referenced_sop_instance_uid == "1.2.9"
        assert list(image.referenced_frame_numbers) == expected


def test_an_anonymised_series_has_a_report():
    data = pydicom.Dataset()
    for name in ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(data, name, header()[name].value)
    result = result_of(tuple(f"1.2.3.{k}" for k in range(4)))
    assert structured_reports.report_of(result, data, "torso").PatientID == ""


@pytest.mark.parametrize(
    "name, value",
    [
        ("StudyDate", "2022-13-45"),
        ("StudyTime", "99:99"),
        ("PatientBirthDate", "19xx"),
        ("PatientSex", "unknown"),
        ("PatientName", ["A^B", "C^D"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_an_invalid_element_of_the_patient_is_left_empty(name, value):
    data = header()
    setattr(data, name, value)
    result = result_of(tuple(f"1.2.3.{k}" for k in range(4)))
    report = structured_reports.report_of(result, data, "torso")
    assert not report.get(name)
    assert report.PatientID == "p7"


def test_names_in_other_character_sets_are_kept(tmp_path):
    data = header()
    data.SpecificCharacterSet = ["", "ISO 2022 IR 87"]  # as Japanese scanners write them
    data.PatientName = "Yamada^Tarou=山田^太郎"
    pydicom.dcmwrite(tmp_path / "a.dcm", data, implicit_vr=True, little_endian=True)
    read = structured_reports._header([str(tmp_path / "a.dcm")])  # without preamble
    result = result_of(tuple(f"1.2.3.{k}" for k in range(4)))
    structured_reports.report_of(result, read, "torso").save_as(
        tmp_path / "b.dcm", enforce_file_format=True
    )
    assert str(pydicom.dcmread(tmp_path / "b.dcm").PatientName) == "Yamada^Tarou=山田^太郎"


def test_a_header_that_cannot_be_copied_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("unhashable")

    monkeypatch.setattr(structured_reports, "report_of", fail)
    results = [result_of(tuple(f"1.2.3.{k}" for k in range(4)))]
    written, without = structured_reports.write_reports(tmp_path / "a.csv", results, [], "torso")
    assert written == [] and without == [
        ("1.2.3", "its header breaks the standard (TypeError: unhashable)")
    ]


def test_series_without_a_report_have_a_reason(tmp_path):
    result = result_of(tuple(f"1.2.3.{k}" for k in range(4)))
    without = header()
    del without.StudyInstanceUID
    several = header()
    several.StudyInstanceUID = ["1.2", "1.3"]
    content = dataclasses.replace(result, uids=("sha256:ab",) * 4)
    nothing = dataclasses.replace(result, predicted=np.zeros((4, 3), bool))
    verdict = Verdict(np.ones(4), np.ones(4, bool), 1.0, None, True, False)
    outside = dataclasses.replace(result, verdict=verdict)
    for one, data, reason in (
        (result, None, "not DICOM"),
        (result, without, "StudyInstanceUID"),
        (result, several, "StudyInstanceUID"),
        (content, header(), "SOPInstanceUID"),
        (nothing, header(), "SNOMED CT"),
        (outside, header(), "outside the domain"),
    ):
        with pytest.raises(Rejected, match=reason):
            structured_reports.report_of(one, data, "torso")
    written = structured_reports.write_reports(tmp_path / "a.csv", [result, outside], [], "torso")
    assert written == ([], [("1.2.3", "not DICOM")] * 2)


def test_predict_writes_a_report_for_each_series(trained, phantom, tmp_path, capsys, monkeypatch):
    scans, out = tmp_path / "scans", tmp_path / "labels.csv"
    shutil.copytree(sorted(phantom["dicom"].iterdir())[0], scans / "series")
    argv = ["predict", str(scans), "--model", str(trained), "--out", str(out), "--sr"]
    assert cli.main(argv) == 0
    summary = files.read_json(tmp_path / "labels.summary.json")
    assert summary["without_report"] == 0 and summary["no_report"] == []
    _, groups = groups_of(tmp_path / "labels.000.sr.dcm")
    coded = {row["label"]: row for row in summary["covers"] if row["sct_code"] != "no code"}
    assert set(coded) == set(groups) - {"regions of the series"} and coded
    for name, row in coded.items():
        code, _, uids, (percent,) = groups[name]
        assert (code, len(uids)) == (row["sct_code"], row["slices"])
        assert percent == pytest.approx(100 * row["mean_confidence"], abs=0.01)
    assert cli.main(argv) == 2 and "exists" in capsys.readouterr().err
    assert cli.main([*argv[:-1], "--overwrite"]) == 0
    assert not (tmp_path / "labels.000.sr.dcm").exists()  # of the earlier run
    with pytest.raises(InputError, match="omit it or --pseudonyms"):
        predict.predict(trained, scans, tmp_path / "b.csv", sr=True, pseudonyms=True)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r"maknet-jax\[sr\]"):
        predict.predict(trained, scans, tmp_path / "b.csv", sr=True)
