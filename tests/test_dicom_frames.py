"""Enhanced multi-frame CT, and files that misstate their transfer syntax."""

import gc
import struct
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage
from test_dicom import only_reason, only_series, stored_values, write_slice

from maknet_jax.ct import dicom, search, volumes
from maknet_jax.errors import Rejected

IMPLICIT, EXPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99"))
JPEG_2000, JPEG_LS, JPEG_LOSSLESS, RLE = (
    f"1.2.840.10008.1.2{end}" for end in (".4.90", ".4.80", ".4.70", ".5")
)
EXPECTED = stored_values().astype(int) - 1024


def item(**elements):
    data = pydicom.Dataset()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def write_enhanced(path, places, *, phases=1, **changes):
    """An enhanced CT; frame k has the values of seed k, a slope of 1 + k % 2 and a place."""
    path.parent.mkdir(exist_ok=True)
    write_slice(path)
    data = pydicom.dcmread(path)
    for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "ImageType"):
        delattr(data, name)
    del data.RescaleSlope, data.RescaleIntercept
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.NumberOfFrames = len(places) * phases
    orientation = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared = item(
        PlaneOrientationSequence=[orientation],
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75])],
        CTImageFrameTypeSequence=[item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])],
    )
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(len(places) * phases):
        scale = item(RescaleSlope=1 + k % 2, RescaleIntercept=-1024, RescaleType="HU")
        frames.append(
            item(
                PlanePositionSequence=[item(ImagePositionPatient=[0, 0, places[k % len(places)]])],
                PixelValueTransformationSequence=[scale],
                FrameContentSequence=[item(TemporalPositionIndex=k // len(places))],
            )
        )
    data.PerFrameFunctionalGroupsSequence = frames
    data.PixelData = b"".join(stored_values(k).tobytes() for k in range(len(frames)))
    for name, value in changes.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def test_enhanced_ct_is_read_by_its_functional_groups(tmp_path):
    places = [10, -5, 0, 5]
    path = write_enhanced(tmp_path / "e.dcm", places)
    volume = only_series(path)
    order = [0, 3, 2, 1]
    assert volume.slices == tuple(f"e.dcm#frame={k + 1}" for k in order)
    assert volume.spacing == (5.0, 0.5, 0.75) and volume.series == "1.2.3"
    assert len(set(volume.uids)) == 4
    for plane, k in zip(volume.hu, order, strict=True):
        np.testing.assert_array_equal(plane, stored_values(k).astype(int) * (1 + k % 2) - 1024)
    # The file is a volume, not a slice with neighbours.
    again, index = volumes.load_series_of(path)
    assert index is None and volumes.slice_of(again, "e.dcm#frame=1") == 0
    np.testing.assert_array_equal(again.hu, volume.hu)
    assert dicom.read_header(f"{path}#frame=3").position == (0, 0, 0)


def test_an_enhanced_ct_may_be_larger_than_a_slice(tmp_path, monkeypatch):
    path = write_enhanced(tmp_path / "e.dcm", [0, 5, 10])
    monkeypatch.setattr(dicom, "LARGEST_FILE", 1000)
    assert only_series(path).hu.shape == (3, 6, 5)
    monkeypatch.setattr(dicom, "LARGEST_SERIES", path.stat().st_size - 1)
    assert "multi-frame" in only_reason(path)
    write_slice(tmp_path / "a.dcm", values=stored_values(shape=(30, 30)))
    assert "limit for a CT slice" in only_reason(tmp_path / "a.dcm")


def test_phases_of_an_enhanced_ct_are_divided(tmp_path):
    write_enhanced(tmp_path / "e.dcm", [0, 5, 10], phases=2)
    series, reasons = search.find_series(tmp_path)
    assert reasons == [] and [(ref.key, ref.count) for ref in series] == [
        ("1.2.3:1", 3),
        ("1.2.3:2", 3),
    ]
    assert volumes.load_series(series[1]).slices[0] == "e.dcm#frame=6"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"NumberOfFrames": 5}, "3 per-frame functional groups for 5 frames"),
        ({"PixelData": bytes(70)}, "truncated.* 70 .*180"),
        ({"SharedFunctionalGroupsSequence": []}, "ImageOrientationPatient"),
        ({"Modality": "MR"}, "MR"),
    ],
)
def test_damaged_enhanced_ct_is_refused(tmp_path, changes, reason):
    write_enhanced(tmp_path / "e.dcm", [0, 5, 10], **changes)
    with pytest.raises((Rejected, AssertionError), match=reason):
        raise Rejected(only_reason(tmp_path))


@pytest.fixture
def collect():
    """Collects what highdicom left while its warning is ignored."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.usefixtures("collect")
def test_a_converted_series_has_the_hu_of_its_slices(shared_data, tmp_path):
    """highdicom is an independent writer of enhanced objects."""
    highdicom = pytest.importorskip("highdicom")
    folder = shared_data / "dicom" / "liver_j2k_20"
    slices = [pydicom.dcmread(path, force=True) for path in sorted(folder.iterdir())[:3]]
    expected = only_series(folder).hu[:3]
    for data in slices:
        data.SOPClassUID = CTImageStorage
        data.decompress()
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices,
        series_instance_uid="1.2.9",
        series_number=1,
        sop_instance_uid="1.2.10",
        instance_number=1,
        transfer_syntax_uid=EXPLICIT,
    )
    converted.save_as(tmp_path / "e.dcm")
    np.testing.assert_array_equal(only_series(tmp_path).hu, expected)


def relabel(content, old, new):
    """Replaces the transfer syntax in the header, and nothing else."""

    def element(uid):
        uid = uid.encode() + b"\0" * (len(uid) % 2)
        return b"\x02\x00\x10\x00UI" + struct.pack("<H", len(uid)) + uid

    before, after = element(old), element(new)
    length = struct.unpack("<I", content[140:144])[0] + len(after) - len(before)
    content = content.replace(before, after, 1)
    return content[:140] + struct.pack("<I", length) + content[144:]


@pytest.mark.parametrize("stated", [IMPLICIT, EXPLICIT, BIG, DEFLATED, JPEG_2000])
@pytest.mark.parametrize("actual", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_a_data_set_is_read_by_its_content(tmp_path, actual, stated):
    values = stored_values().astype(">i2" if actual == BIG else "<i2")
    path = write_slice(tmp_path / "a.dcm", syntax=actual, values=values)
    path.write_bytes(relabel(path.read_bytes(), actual, stated))
    if (actual, stated) == (IMPLICIT, DEFLATED):
        assert "deflated, but the data are not" in only_reason(tmp_path)
    else:
        np.testing.assert_array_equal(only_series(tmp_path).hu[0], EXPECTED)


@pytest.mark.parametrize("stated", [EXPLICIT, JPEG_2000, JPEG_LOSSLESS, RLE])
@pytest.mark.parametrize("actual", [JPEG_2000, JPEG_LS, JPEG_LOSSLESS, RLE])
def test_pixels_are_decoded_by_their_content(tmp_path, shared_data, actual, stated):
    folder = shared_data / "dicom" / "transfer_syntaxes"
    (path,) = folder.glob(f"*_{actual}.dcm")
    (tmp_path / "a.dcm").write_bytes(relabel(path.read_bytes(), actual, stated))
    expected = dicom.read_slice(folder / "CTImage.dcm")[1]
    np.testing.assert_array_equal(dicom.read_slice(tmp_path / "a.dcm")[1], expected)


def test_frames_in_ct_image_storage_are_refused(tmp_path):
    write_slice(tmp_path / "a.dcm", SOPClassUID=CTImageStorage, NumberOfFrames=2)
    assert "2 frames" in only_reason(tmp_path)
