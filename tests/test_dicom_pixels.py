"""The pixels of DICOM files: padding, unused bits, trailing bytes and lossy compression."""

import re

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, get_frame
from test_dicom import only_reason, only_series, write_slice
from test_units import body, corners

from maknet_jax.ct import dicom, preprocess, search


def slice_of(path, stored, **changes):
    """The HU of a file with these stored values; unsigned values are stored as such."""
    kind = "<i2" if np.min(stored) < 0 else "<u2"
    changes.setdefault("PixelRepresentation", int(kind == "<i2"))
    values = np.asarray(stored).astype(kind)
    _, hu = dicom.read_slice(write_slice(path / "a.dcm", values=values, **changes))
    return hu.tolist()


TWELVE = {"BitsStored": 12, "HighBit": 11}


@pytest.mark.parametrize("intercept", [-32768, -32767, -1024, 0, 1, 30000])
@pytest.mark.parametrize(("signed", "bits"), [(0, 12), (1, 12), (0, 16), (1, 16)])
def test_hu_are_exact_at_the_ends_of_the_stored_range(tmp_path, signed, bits, intercept):
    low = -(1 << (bits - 1)) if signed else 0
    values = np.array([[low, low + 1, 0], [1, 100, low + (1 << bits) - 1]])
    path = write_slice(
        tmp_path / "a.dcm",
        values=values.astype("<i2" if signed else "<u2"),
        PixelRepresentation=signed,
        BitsStored=bits,
        HighBit=bits - 1,
        RescaleIntercept=intercept,
    )
    _, hu = dicom.read_slice(path)
    assert hu.dtype == np.int16
    np.testing.assert_array_equal(hu, np.clip(values + intercept, -32768, 32767))


@pytest.mark.parametrize(
    ("stored", "changes", "hu"),
    [
        ([[63536, 1024]], {"PixelPaddingValue": 63536}, [[-1024, 0]]),
        ([[65535, 1024]], {"PixelPaddingValue": 65535}, [[-1024, 0]]),
        (
            [[63536, 1024]],
            {"PixelPaddingValue": 63536, "syntax": "1.2.840.10008.1.2"},
            [[-1024, 0]],
        ),
        ([[63536, 1024]], {"PixelPaddingValue": 63536} | TWELVE, [[-1024, 0]]),
        ([[-2000, 30]], {"PixelPaddingValue": -2000, "RescaleIntercept": 0}, [[-1024, 30]]),
        ([[-2000, 30]], {"PixelPaddingValue": -2000, "RescaleSlope": 2}, [[-1024, -964]]),
        ([[0, 30]], {"PixelPaddingValue": 0, "RescaleIntercept": 0}, [[-1024, 30]]),
        (
            [[-2000, -3000, -3001, 30]],
            {"PixelPaddingValue": -3000, "PixelPaddingRangeLimit": -2000, "RescaleIntercept": 0},
            [[-1024, -1024, -3001, 30]],
        ),
        (
            [[2096, 1024]],  # -2000 in twelve bits, not sign-extended
            {"PixelPaddingValue": -2000, "PixelRepresentation": 1} | TWELVE,
            [[-1024, 0]],
        ),
    ],
)
def test_declared_padding_becomes_air(tmp_path, stored, changes, hu):
    assert slice_of(tmp_path, stored, **changes) == hu


def test_padding_in_the_vr_of_the_other_sign_is_compared_by_its_bits(tmp_path):
    path = write_slice(tmp_path / "a.dcm", values=np.array([[63536, 1024]], "<u2"))
    data = pydicom.dcmread(path)
    data.PixelRepresentation = 0
    data.add_new("PixelPaddingValue", "SS", -2000)
    data.save_as(path)
    assert dicom.read_slice(path)[1].tolist() == [[-1024, 0]]


def test_padded_pixels_do_not_change_a_record(tmp_path):
    records = []
    for padding in (-3000, -2100, 500):
        values = corners(body(), padding)[0].astype("<i2")
        declared = {"PixelPaddingValue": padding, "RescaleIntercept": 0}
        write_slice(tmp_path / "a.dcm", values=values, **declared)
        hu = only_series(tmp_path).hu
        records.append(preprocess.make_triplet([hu[0]] * 3, 32)[0])
    np.testing.assert_array_equal(records[0], records[1])
    np.testing.assert_array_equal(records[0], records[2])


def test_declared_padding_does_not_take_part_in_the_check(tmp_path):
    declared = {"PixelPaddingValue": -2000, "RescaleIntercept": 0}
    window = corners(np.clip(body(), 0, 400), -2000)[0].astype("<i2")
    write_slice(tmp_path / "a.dcm", values=window, **declared)
    assert "none is from -1500 to -1" in only_reason(tmp_path)
    write_slice(tmp_path / "a.dcm", values=np.full((6, 5), -2000, "<i2"), **declared)
    assert "all pixels are padding" in only_reason(tmp_path)


def test_bits_above_bits_stored_are_ignored(tmp_path):
    values = np.array([[0, 1, 1024, 4095]])
    overlay = values | 0x8000
    assert slice_of(tmp_path, overlay, **TWELVE) == [[-1024, -1023, 0, 3071]]
    signed = {"PixelRepresentation": 1, "RescaleIntercept": 0} | TWELVE
    garbage = np.array([[0x0FFF, 0x7FFF, 0x3801, 0x5001]])  # -1, -1, -2047, 1 in twelve bits
    assert slice_of(tmp_path, garbage, **signed) == [[-1, -1, -2047, 1]]


@pytest.mark.parametrize(
    ("rest", "accepted"),
    [(bytes(4), True), (b"\xff\xff", True), (b"\0\1", False), (b"\1\1", False), (bytes(60), False)],
)
def test_trailing_padding_is_accepted(tmp_path, rest, accepted):
    values = np.arange(30, dtype="<i2").reshape(6, 5) * 40
    path = write_slice(tmp_path / "a.dcm", values=values, PixelData=values.tobytes() + rest)
    if accepted:
        np.testing.assert_array_equal(only_series(path).hu[0], values - 1024)
    else:
        assert re.search(f"oversized.* {60 + len(rest)} .*60", only_reason(path))


def test_an_encoded_image_may_be_padded(tmp_path, shared_data):
    nema = shared_data.parent / "cases" / "nema_CT1_J2KR_padded_with_ff"
    openjpeg = pytest.importorskip("openjpeg")  # an independent decoder
    data = pydicom.dcmread(nema)
    frame = get_frame(data.PixelData, 0, number_of_frames=1)
    expected = openjpeg.decode(frame.rstrip(b"\xff")).astype(int) - 1024
    expected[expected == -2000 - 1024] = -1024  # its PixelPaddingValue
    np.testing.assert_array_equal(only_series(nema).hu[0], expected)
    for syntax in (57, 80, 90):
        (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob(f"*.1.2.4.{syntax}.dcm")
        data = pydicom.dcmread(path)
        frame = get_frame(data.PixelData, 0, number_of_frames=1).rstrip(b"\0")
        data.PixelData = encapsulate([frame + b"\xff" * 6])
        data.save_as(tmp_path / "a.dcm")
        np.testing.assert_array_equal(only_series(tmp_path).hu, only_series(path).hu)


def test_rescale_types(tmp_path):
    for name in ("", "HU", "Hu", " hu ", "HOUNSFIELD UNITS", "Houndsfield Unit", "US", "H.U."):
        assert dicom.read_header(write_slice(tmp_path / "a.dcm", RescaleType=name)).problem == ""
    for name in ("HU_MOD", "OD", "MGML", "Z_EFF", "PCT"):
        header = dicom.read_header(write_slice(tmp_path / "a.dcm", RescaleType=name))
        assert f"RescaleType {name}" in header.problem


def test_lossy_compression_needs_an_option(tmp_path, shared_data):
    """Declared by the header, by the transfer syntax, or only by the stream itself."""
    folder = shared_data / "dicom" / "transfer_syntaxes"
    exact = only_series(folder / "CTImage.dcm").hu.astype(int)

    def copied(syntax, change=lambda frame: frame, lossy="00"):
        (path,) = folder.glob(f"*.4.{syntax}.dcm")
        data = pydicom.dcmread(path)
        data.PixelData = encapsulate([change(get_frame(data.PixelData, 0, number_of_frames=1))])
        data.LossyImageCompression = lossy
        data.save_as(tmp_path / "a.dcm")
        return tmp_path / "a.dcm"

    def irreversible(frame):
        place = frame.index(b"\xff\x52") + 13
        return frame[:place] + b"\0" + frame[place + 1 :]

    assert "JPEG-LS with an error of up to 1 " in only_reason(copied(81))
    assert np.abs(only_series(copied(81), allow_lossy=True).hu - exact).max() == 1
    for syntax in (90, 91):
        assert "irreversible JPEG 2000" in only_reason(copied(syntax, irreversible))
    assert np.abs(only_series(copied(91)).hu - exact).max() <= 5  # nothing says that it is lossy
    assert "LossyImageCompression 01" in only_reason(copied(90, lossy="01"))
    baseline = copied(50)
    assert "1.2.840.10008.1.2.4.50" in only_reason(baseline)
    inside = exact > -1000  # 8 bits, steps of 32 HU, and ringing around the padding
    assert np.abs(only_series(baseline, allow_lossy=True).hu - exact)[inside].mean() < 32
    write_slice(tmp_path / "a.dcm", LossyImageCompression="01")
    assert "--allow-lossy" in only_reason(tmp_path)
    assert only_series(tmp_path, allow_lossy=True).hu.shape == (1, 6, 5)


def test_a_lossy_copy_does_not_reject_the_series(tmp_path):
    write_slice(tmp_path / "a.dcm")
    write_slice(tmp_path / "b.dcm", LossyImageCompression="01")
    (ref,), ((path, _),) = search.find_series(tmp_path)
    assert ref.count == 1 and path.endswith("b.dcm")
