"""No output names a patient: markers in all headers and file names are searched in all outputs."""

import dataclasses
import io
import os
import shutil
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from prepared import examples, read_csv
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from maknet_jax import attribute, console, files, perturb, predict, prepare
from maknet_jax.ct import pseudonym, search, volumes
from maknet_jax.data import patient_splits
from maknet_jax.errors import InputError
from maknet_jax.explain import selection
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.figures import charts
from maknet_jax.runs import workdir

MARKER, NUMBER = "ZQMARKERQZ", "98765432109"  # in text, and in UIDs
HEADER = "QZHEADERZQ"  # in the header of a rejected file, but in no name
TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
# Elements whose values the reader checks.
READ = "Modality ImageType PhotometricInterpretation RescaleType SpecificCharacterSet".split()


def mark(data):
    """Plants the markers in every text element, in UIDs, in a sequence and in private tags."""
    for tag, (vr, *_) in DicomDictionary.items():
        name = keyword_for_tag(tag)
        if vr in TEXT and name and name not in READ and 0x0008 <= tag >> 16 < 0x7FE0:
            data.add_new(tag, vr, MARKER)
    inner = pydicom.Dataset()
    inner.PatientName, inner.InstitutionName = f"{MARKER}^Hans", MARKER
    data.RequestAttributesSequence = [inner]
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        data[name].value = f"1.2.{NUMBER}.{data[name].value[-20:].lstrip('.0')}"
    private = data.private_block(0x0029, MARKER, create=True)
    private.add_new(1, "LO", MARKER)
    private.add_new(2, "UN", MARKER.encode())


def write_pixels(path, name):
    picture, information = np.full((64, 64), 1000 + 32768, np.uint16), PngImagePlugin.PngInfo()
    picture[:8] = 32768 - 1000
    information.add_text("Patient", MARKER)
    for number in (7, 8):
        Image.fromarray(picture).save(path / f"{name}_{number}.png", pnginfo=information)


@pytest.fixture(scope="module")
def scans(phantom, tmp_path_factory):
    """A folder of series that can be used, and of files that are rejected for many reasons."""
    root = tmp_path_factory.mktemp("scans") / f"{MARKER}^Hans"
    source = sorted(phantom["dicom"].iterdir())[0]
    first, *others = [pydicom.dcmread(path) for path in sorted(source.glob("*.dcm"))]

    def save(data, *place, **changes):
        path = root.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, value in changes.items():
            setattr(data, name, value)
        data.save_as(path)
        return path

    for number, data in enumerate((first, *others)):
        mark(data)
        save(data, "good", f"{MARKER}{number}.dcm")
        save(data, "cut", f"{MARKER}{number}.dcm", SeriesInstanceUID=f"1.2.{NUMBER}.9")
    cut = root / "cut" / f"{MARKER}3.dcm"
    cut.write_bytes(cut.read_bytes()[:-4000])
    save(first, f"{MARKER}_modality.dcm", Modality=MARKER, SeriesInstanceUID=f"1.2.{NUMBER}.1")
    save(first, f"{MARKER}_type.dcm", Modality="CT", RescaleType=HEADER)
    first.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(first, f"{MARKER}_deflated.dcm", SeriesInstanceUID=f"1.2.{NUMBER}.2")
    header = root / f"{MARKER}_header.dcm"
    header.write_bytes(bytes(128) + b"DICM\x02\x00\x10\x00UI\xff\xff" + MARKER.encode())

    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(np.stack([d.pixel_array for d in (first, *others)], -1), affine)
    image.header["descrip"], image.header["aux_file"] = MARKER, MARKER
    image.header.set_xyzt_units("mm")
    nibabel.save(image, root / f"{MARKER}.nii.gz")
    hu = (image.get_fdata() + float(others[0].RescaleIntercept)).astype(np.int16)
    case = root.parent / "cases" / MARKER
    (case / "segmentations").mkdir(parents=True)
    for path, data in (("ct", hu), ("segmentations/liver", (hu > 0).astype(np.uint8))):
        image = nibabel.Nifti1Image(data, affine)
        image.header["descrip"] = MARKER
        image.header.set_xyzt_units("mm")
        nibabel.save(image, case / f"{path}.nii.gz")
    shutil.copytree(case, case.with_name(f"{MARKER}2"))
    (case.with_name(f"{MARKER}2") / "segmentations" / "liver.nii.gz").write_bytes(b"no mask")
    (root / "pngs").mkdir()
    write_pixels(root / "pngs", f"{MARKER}_img")
    (root / f"{MARKER}_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + MARKER.encode())
    return root


@pytest.fixture
def salt(tmp_path):
    path = tmp_path / "salt"
    path.write_text("a secret of the user, long enough\n")
    return path


def everything(*paths):
    """Yields (file, its content) of all files, archives and records included."""
    for root in paths:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            assert MARKER not in path.name
            if not path.is_file():
                continue
            content = path.read_bytes()
            yield path, content
            if zipfile.is_zipfile(io.BytesIO(content)):
                with zipfile.ZipFile(path) as archive:
                    yield path, b"".join(map(archive.read, archive.namelist()))
        if (root / "dataset.json").is_file():
            rows = [example for split in examples(root).values() for example in split]
            yield root / "records", repr([(e.id, e.meta) for e in rows]).encode()


def leaks(*paths):
    """The files that contain a marker; arrays of text are UTF-32."""
    forms = [
        f(x)
        for x in (MARKER, NUMBER, HEADER)
        for f in (str.encode, lambda x: x.encode("utf-32-le"))
    ]
    return {path.name for path, content in everything(*paths) if any(f in content for f in forms)}


def test_prepare_dicom_names_inputs_in_its_failures_only(scans, salt, tmp_path):
    options = {"salt_file": salt, "min_slices": 2, "size": 32}
    summary = prepare.prepare_dicom(scans, tmp_path / "named", **options)
    assert leaks(tmp_path / "named") == {"failures.csv"}, "the outputs should name the bad files"
    assert summary["failures"] >= 5 and summary["records"]["unlabelled"] >= 4
    hidden = prepare.prepare_dicom(scans, tmp_path / "hidden", pseudonyms=True, **options)
    assert leaks(tmp_path / "hidden") == set()
    assert hidden["failures"] == summary["failures"]
    reasons = [row["reason"] for row in read_csv(tmp_path / "hidden" / "failures.csv")]
    for part in ("RescaleType", "truncated pixel data: 4192 bytes", "--min-slices 2", "modality"):
        assert any(part in reason for reason in reasons), (part, reasons)


def test_predict_with_pseudonyms(scans, salt, tmp_path, trained, monkeypatch):
    titles = []
    chart = charts.write_label_chart
    monkeypatch.setattr(
        charts,
        "write_label_chart",
        lambda *a, **k: (titles.append(f"{k['title']} {k['notes']}"), chart(*a, **k)),
    )
    outputs = {"as_json": True, "charts": True, "wide": True, "audit": True}
    for name, more in (("named", {}), ("hidden", {"pseudonyms": True, "salt_file": salt})):
        out = tmp_path / name / "labels.csv"
        features = tmp_path / name / "features.npz"
        summary = predict.predict(trained, scans, out, features=features, **outputs, **more)
        assert summary["failures"] >= 5 and (out.parent / "labels.failures.csv").is_file()
    shown = ("labels.csv", "labels.series.csv", "labels.json", "labels.failures.csv")
    assert leaks(tmp_path / "named") >= {*shown, "features.npz"}
    assert leaks(tmp_path / "hidden") == set()
    hidden = [title for title in titles if MARKER not in title and NUMBER not in title]
    assert len(hidden) * 2 == len(titles) > 0
    # The pseudonyms are those of the records.
    prepared = tmp_path / "records"
    prepare.prepare_dicom(scans / "good", prepared, salt_file=salt, min_slices=2, size=32)
    ids = {example.id for example in examples(prepared)["unlabelled"]}
    rows = read_csv(tmp_path / "hidden" / "labels.csv")
    assert ids and ids < {f"{row['series']}-{row['file']}" for row in rows}


def test_prepare_segmentations_with_pseudonyms(scans, salt, tmp_path):
    out = tmp_path / "out"
    summary = prepare.prepare_segmentations(
        [scans.parent / "cases"], out, salt_file=salt, pseudonyms=True, size=32
    )
    assert leaks(out) == set()
    assert summary["failures"] == 1
    (case,) = {example.meta["case"] for split in examples(out).values() for example in split}
    assert case in {row["case"] for row in read_csv(out / "cases.csv")}


def test_prepare_table_with_pseudonyms(scans, salt, tmp_path):
    table = tmp_path / "table.csv"
    good = sorted((scans / "good").iterdir())[2]
    rows = [f"{good},liver,train", f"{scans}/{MARKER}_type.dcm,liver,train"]
    table.write_text("\n".join(["path,labels,split", *rows]))
    for pseudonyms in (False, True):
        out = tmp_path / f"out-{pseudonyms}"
        prepare.prepare_table(table, out, pseudonyms=pseudonyms, salt_file=salt, size=32)
        assert leaks(out) == (set() if pseudonyms else {"failures.csv"})
    assert [row["input"] for row in read_csv(out / "failures.csv")] == ["line 3"]


@pytest.mark.slow
def test_attribute_with_pseudonyms(scans, salt, tmp_path, trained):
    chosen = SelectionOptions(path=scans, limit=2, top=1, pseudonyms=True, salt_file=salt)
    out = tmp_path / "out"
    summary = attribute.attribute(trained, out, chosen, PathOptions(steps=2, refine=0))
    assert leaks(out) == set() and summary["failures"] >= 4
    # A second run selects the same images by their pseudonyms, and resumes.
    attribute.attribute(trained, out, chosen, PathOptions(steps=2, refine=0))


@pytest.mark.slow
def test_perturb_with_pseudonyms(scans, salt, tmp_path, trained):
    for pseudonyms in (False, True):
        chosen = SelectionOptions(path=scans, limit=1, top=1, pseudonyms=pseudonyms, salt_file=salt)
        out = tmp_path / f"out-{pseudonyms}"
        perturb.perturb(trained, out, chosen, PathOptions(steps=2), strategies=["random"])
        assert bool(leaks(out)) != pseudonyms


def test_numbers_as_file_names_are_replaced(salt):
    names = pseudonym.Pseudonyms(salt.read_text().strip())
    volume = volumes.Volume(np.zeros((2, 4, 4)), (1, 1, 1), "s", (NUMBER, "7"), ("1.2", "1.3"))
    assert names.volume(volume).slices == (names.name("1.2"), names.name("1.3"))
    numbered = dataclasses.replace(volume, slices=("1", "0"))  # of DICOM
    assert names.volume(numbered).slices == (names.name("1.2"), names.name("1.3"))
    hidden = names.volume(dataclasses.replace(numbered, file="Doe.nii"))
    assert (hidden.slices, hidden.file) == (("1", "0"), names.name("Doe.nii"))


def test_many_failures_of_one_folder_take_linear_time(tmp_path, monkeypatch):
    listed = []
    monkeypatch.setattr(pseudonym.os, "listdir", lambda path: listed.append(path) or ["a7.dcm"])
    failures = [(str(tmp_path), "slices a7.dcm and b differ")] * 50
    assert {reason for _, reason in pseudonym.Redaction().failures(failures)} == {
        "slices … and b differ"
    }
    assert 1 <= len(listed) <= 2


def test_a_selection_with_pseudonyms(scans, salt, trained):
    options = SelectionOptions(path=scans, pseudonyms=True, salt_file=salt)
    selected = selection.select(workdir.open_run(trained), options)
    images = [read() for read in selected.readers[:2]]
    shown = repr([selected.failures, selected.identity, [(i.id, i.public_meta) for i in images]])
    assert MARKER not in shown and NUMBER not in shown and len(selected.failures) >= 4
    chosen = SelectionOptions(path=scans, pseudonyms=True, salt_file=salt, ids=[images[1].id])
    (read,) = selection.select(workdir.open_run(trained), chosen).readers
    assert read().id == images[1].id


def test_names_that_are_not_utf8_or_not_printable_are_replaced(salt, tmp_path):
    names = pseudonym.Pseudonyms(salt.read_text().strip())
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    path = folder / "\x1b[31mHans.dcm"
    path.write_bytes(b"")
    printed = files.printable(path.name)
    ((file, reason),) = names.failures([(str(path), f"{printed}: broken")])
    assert file == names.name(str(path)) == names.name(files.printable(str(path)))
    assert reason == f"{names.name(path.name)}: broken"
    assert patient_splits.hashed_split(folder.name, {"train": 1.0}, seed=0) == "train"


def test_the_target_of_a_dead_link_is_replaced(salt, tmp_path):
    names = pseudonym.Pseudonyms(salt.read_text().strip())
    (tmp_path / "scan").symlink_to(f"/nowhere/{MARKER}/Hans.dcm")
    _, failures = search.find_series(tmp_path)
    assert MARKER in failures[0][1]
    for hidden in (names, pseudonym.Redaction()):
        ((_, reason),) = hidden.failures(failures)
        assert "link to" in reason and MARKER not in reason and "Hans" not in reason


def test_a_salt_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "salt").write_bytes(b"\xff" * 32)
    with pytest.raises(InputError, match="is not UTF-8"):
        pseudonym.read_salt(tmp_path / "salt", log=console.Log())


def test_messages_keep_their_words_and_pseudonyms_are_stable(scans, salt):
    names = pseudonym.Pseudonyms(salt.read_text().strip())
    path = str(scans / "good" / f"{MARKER}0.dcm")
    message = f"series 1.2.{NUMBER}.7.8: {MARKER}0.dcm and Hans differ by 2.5 mm, -1024 HU (CHEST)"
    ((file, reason),) = names.failures([(path, message)])
    uid, name, part = map(names.name, (f"1.2.{NUMBER}.7.8", f"{MARKER}0.dcm", "Hans"))
    assert reason == f"series {uid}: {name} and {part} differ by 2.5 mm, -1024 HU (CHEST)"
    assert file == names.name(path)
    assert pseudonym.Pseudonyms("another secret of the user").name(path) != file


def test_a_command_in_a_message_stays_readable(tmp_path, salt):
    folder = tmp_path / "segmentations"
    folder.mkdir(exist_ok=True)
    (folder / "liver.nii.gz").touch()
    message = "a binary mask, not CT (`maknet prepare segmentations` reads masks beside their CT)"
    ((_, reason),) = pseudonym.Pseudonyms(salt.read_text().strip()).failures(
        [(str(folder / "liver.nii.gz"), message)]
    )
    assert reason == message


def test_an_archive_of_which_nothing_can_be_used(scans, salt, tmp_path):
    path = shutil.make_archive(str(tmp_path / f"{MARKER}_archive"), "zip", scans)
    for pseudonyms, leaking in ((False, {"failures.csv"}), (True, set())):
        out = tmp_path / f"out-{pseudonyms}"
        options = {"salt_file": salt, "min_slices": 500, "pseudonyms": pseudonyms}
        with pytest.raises(InputError, match="--min-slices"):
            prepare.prepare_dicom(path, out, **options)
        assert leaks(out) == leaking
    reasons = [row["reason"] for row in read_csv(out / "failures.csv")]
    assert any("RescaleType" in reason for reason in reasons), reasons
