"""DICOM SEG beside its CT series: round trips of what highdicom writes, and what is rejected."""

import gc
import sys
import warnings

import numpy as np
import organ_cases
import pydicom
import pytest
from prepared import examples, read_csv
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from maknet_jax import prepare
from maknet_jax.ct import dicom, dicom_seg, geometry, search
from maknet_jax.data.segmentation_cases import find_cases
from maknet_jax.errors import InputError, Rejected
from maknet_jax.phantom.formats import write_series

hd = pytest.importorskip("highdicom", reason="highdicom is not installed (extra dicom-seg)")

# highdicom leaves the database of its frames to the garbage collector, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")

SALT = "a secret of the user, long enough"
LIVER = organ_cases.organ([0, 0, 9, 9, 20, 20, 9, 0, 0, 0, 0, 0])
# Overlaps the liver: both start at the same pixel.
VESSEL = organ_cases.organ([0, 0, 0, 0, 10, 12, 0, 0, 0, 0, 0, 0])
EMPTY = np.zeros(organ_cases.SHAPE, bool)


@pytest.fixture(autouse=True)
def collect():
    """Collects what highdicom left while its warning is ignored."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def write_ct(folder, name="patient", seed=0):
    """Writes a CT series with shuffled file names; its data sets from head to feet."""
    hu = organ_cases.ct(seed)
    rng = np.random.default_rng(seed)
    uids = write_series(folder, hu, organ_cases.SPACING, name, rng, syntax=ExplicitVRLittleEndian)
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, folder.glob("*.dcm"))}
    for source in sources.values():
        source.PatientName = ""  # highdicom warns of names without a caret
    return [sources[uid] for uid in uids]


def write_seg(path, sources, masks, kind="BINARY", shuffle=True, **changes):
    """Writes a SEG of masks `[Z, Y, X]`; frames are stored in another order than the slices."""
    order = np.random.default_rng(1).permutation(len(sources)) if shuffle else range(len(sources))
    pixels = np.stack(list(masks.values()), axis=-1)[list(order)].astype(np.uint8)
    if kind == "LABELMAP":
        pixels = (pixels * np.arange(1, len(masks) + 1)).max(axis=-1).astype(np.uint8)
    describe = hd.seg.SegmentDescription
    descriptions = [
        describe(
            n, name, codes.SCT.Organ, codes.SCT.Liver, hd.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for n, name in enumerate(masks, start=1)
    ]
    seg = hd.seg.Segmentation(
        [sources[k] for k in order],
        pixels,
        kind,
        descriptions,
        generate_uid(),
        2,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "0",
    )
    for name, value in changes.items():
        setattr(seg, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return path


def headers_of(folder):
    """The headers of the only CT series, head to feet."""
    series, _ = search.find_series(folder)
    (ref,) = [ref for ref in series if ref.kind == "dicom"]
    return [dicom.read_header(path) for path in ref.paths]


def run(folder, out, **options):
    salt = out.parent / "salt"
    salt.write_text(SALT)
    return prepare.prepare_segmentations([folder], out, size=32, salt_file=salt, **options)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_masks_are_matched_by_uid(tmp_path, kind):
    sources = write_ct(tmp_path / "ct")
    # A label map holds no overlap.
    vessel = VESSEL & ~LIVER if kind == "LABELMAP" else VESSEL
    spleen = np.roll(LIVER, 4, axis=0)[:, ::-1]
    masks = {"liver": LIVER, "vessel": vessel, "spleen": spleen, "none": EMPTY}
    path = write_seg(tmp_path / "seg" / "a.dcm", sources, masks, kind)
    assert dicom_seg.is_segmentation(path)
    assert not any(dicom_seg.is_segmentation(p) for p in (tmp_path / "ct").iterdir())
    header = dicom_seg.read_header(path)
    assert header.patient == "patient" and header.series == sources[0].SeriesInstanceUID
    assert header.segments == tuple(enumerate(masks, start=1))
    seg = dicom_seg.Segmentation(path, headers_of(tmp_path / "ct"))
    for number, mask in enumerate(masks.values(), start=1):
        np.testing.assert_array_equal(seg.mask(number), mask)


def test_a_turned_ct_and_its_masks_are_turned_alike(tmp_path):
    """Columns to the right and rows to anterior, as a prone patient is stored."""
    sources = write_ct(tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(path)
        data.PatientName = ""
        data.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        data.save_as(path)
    by_uid = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, (tmp_path / "ct").iterdir())}
    turned = [by_uid[source.SOPInstanceUID] for source in sources]
    path = write_seg(tmp_path / "a.dcm", turned, {"liver": LIVER})
    headers = headers_of(tmp_path / "ct")
    mask = dicom_seg.Segmentation(path, headers).mask(1)
    # The order of slices follows from the orientation, so compare slice by slice.
    index = {source.SOPInstanceUID: k for k, source in enumerate(sources)}
    axes = dicom.stored_axes(headers[0].orientation)
    for row, header in zip(mask, headers, strict=True):
        stored = LIVER[index[header.uid]][None]
        np.testing.assert_array_equal(row, geometry.to_standard(stored, axes)[0])
        np.testing.assert_array_equal(row, stored[0, ::-1, ::-1])


def test_cases_of_two_patients_become_records(tmp_path):
    for n in range(2):
        sources = write_ct(tmp_path / "idc" / f"p{n}" / "ct", f"p{n}", n)
        masks = {"liver": LIVER, "vessel": VESSEL, "spleen": EMPTY}
        folder = tmp_path / "idc" / f"p{n}"
        write_seg(folder / "seg1" / "a.dcm", sources, masks)
        write_seg(folder / "seg2" / "b.dcm", sources, {"kidney": np.roll(LIVER, 2, axis=0)})
    write_ct(tmp_path / "idc" / "p9" / "ct", "p9", 9)  # a CT series that nobody segmented
    summary = run(tmp_path / "idc", tmp_path / "out")
    assert sum(summary["records"].values()) == 24 and summary["failures"] == 0
    assert summary["about"]["series_without_segmentation"] == 1
    written = [e for rows in examples(tmp_path / "out").values() for e in rows]
    liver = LIVER.sum(axis=(1, 2)) * organ_cases.PIXEL
    vessel = VESSEL.sum(axis=(1, 2)) * organ_cases.PIXEL
    for example in written:
        z = example.meta["slice"]
        # kidney, liver, spleen, vessel
        areas = [liver[z - 2], liver[z], 0, vessel[z]]
        assert example.labels.tolist() == [int(area >= 50) for area in areas]
        assert example.label_mask.tolist() == [1, 1, 0, 1]
    # Identifiers do not reach the records; cases.csv names the cases for their owner.
    assert not any("p0" in str(e.meta) or "p0" in e.id for e in written)
    assert {row["patient"] for row in read_csv(tmp_path / "out" / "cases.csv")} == {"p0", "p1"}
    assert len({e.meta["patient"] for e in written}) == 2
    (missing,) = read_csv(tmp_path / "out" / "missing.csv")
    assert "no segmentation" in missing["reason"]


def test_another_grid_is_rejected_by_name(tmp_path):
    sources = write_ct(tmp_path / "a" / "ct", "a", 0)
    good = write_ct(tmp_path / "b" / "ct", "b", 1)
    write_seg(tmp_path / "b" / "seg.dcm", good, {"liver": LIVER})
    path = write_seg(tmp_path / "a" / "seg.dcm", sources, {"liver": LIVER})
    original = pydicom.dcmread(path)

    def reason():
        summary = run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
        out = tmp_path.parent / f"{tmp_path.name}-out"
        (failure,) = read_csv(out / "failures.csv")
        assert summary["failures"] == 1 and sum(summary["records"].values()) == 12
        for file in sorted(out.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        out.rmdir()
        assert str(path) in failure["reason"]
        return failure["reason"]

    for name, change in (
        ("PixelMeasuresSequence", {"PixelSpacing": [2.0, 2.5]}),
        ("PlaneOrientationSequence", {"ImageOrientationPatient": [1, 0, 0, 0, -1, 0]}),
    ):
        data = pydicom.dcmread(path)
        for key, value in change.items():
            setattr(data.SharedFunctionalGroupsSequence[0][name].value[0], key, value)
        data.save_as(path)
        assert "another grid" in reason()
        original.save_as(path)
    data = pydicom.dcmread(path)
    frame = data.PerFrameFunctionalGroupsSequence[0]
    frame.PlanePositionSequence[0].ImagePositionPatient[2] -= 5.0
    data.save_as(path)
    assert "position of frame 1" in reason()
    data = pydicom.dcmread(path)
    source = data.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
    source.SourceImageSequence[0].ReferencedSOPInstanceUID = generate_uid()
    data.save_as(path)
    assert "expected one slice of the CT series" in reason()


def test_frames_that_are_not_described_are_rejected(tmp_path):
    path = write_seg(tmp_path / "seg.dcm", write_ct(tmp_path / "ct"), {"liver": LIVER})
    headers, original = headers_of(tmp_path / "ct"), pydicom.dcmread(path)
    data = pydicom.dcmread(path)
    del data.PerFrameFunctionalGroupsSequence[-1]
    data.save_as(path)
    with pytest.raises(Rejected, match="NumberOfFrames is 5.* has 4 items"):
        dicom_seg.Segmentation(path, headers)
    original.SegmentSequence[0].SegmentNumber = 5
    original.save_as(path)
    with pytest.raises(Rejected, match="frame 1 references segment 1"):
        dicom_seg.Segmentation(path, headers)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"SegmentationType": "FRACTIONAL"}, "FRACTIONAL"),
        ({"ReferencedSeriesSequence": []}, "references 0 series"),
    ],
)
def test_headers_that_are_rejected(tmp_path, changes, part):
    sources = write_ct(tmp_path / "ct")
    path = write_seg(tmp_path / "a.dcm", sources, {"liver": LIVER}, **changes)
    with pytest.raises(Rejected, match=part):
        dicom_seg.read_header(path)
    plan = find_cases(tmp_path)
    assert plan.cases == [] and [file for file, _ in plan.failures] == [str(path)]
    with pytest.raises(InputError, match=part):
        run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")


def test_segments_with_one_number_are_rejected_and_labels_are_printable(tmp_path):
    sources = write_ct(tmp_path / "ct")
    path = write_seg(tmp_path / "a.dcm", sources, {"li\tver": LIVER, "vessel": VESSEL})
    assert dicom_seg.read_header(path).segments == ((1, "li\\tver"), (2, "vessel"))
    data = pydicom.dcmread(path)
    data.SegmentSequence[1].SegmentNumber = 1  # both would have the mask of the first
    data.save_as(path)
    with pytest.raises(Rejected, match="same number"):
        dicom_seg.read_header(path)


def test_two_segmentations_of_one_organ_and_one_without_its_ct_are_rejected(tmp_path):
    sources = write_ct(tmp_path / "a" / "ct", "a", 0)
    for name in ("one", "two"):
        write_seg(tmp_path / "a" / f"{name}.dcm", sources, {"liver": LIVER})
    lost = write_ct(tmp_path / "b" / "ct", "b", 1)
    path = write_seg(tmp_path / "b.dcm", lost, {"liver": LIVER})
    for file in (tmp_path / "b" / "ct").iterdir():
        file.unlink()
    plan = find_cases(tmp_path)
    reasons = [reason for _, reason in plan.failures]
    assert plan.cases == [] and len(reasons) == 2
    assert "two segmentations of liver" in reasons[0]
    assert plan.failures[1][0] == str(path) and "not under" in reasons[1]


def test_without_highdicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    sources = write_ct(tmp_path / "ct")
    write_seg(tmp_path / "a.dcm", sources, {"liver": LIVER})
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r"maknet-jax\[dicom-seg\]"):
        find_cases(tmp_path)
