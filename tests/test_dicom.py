"""DICOM: exact HU, the standard orientation, and a reason for whatever is rejected."""

import logging
import re
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless

from maknet_jax.ct import dicom, reading, search, volumes
from maknet_jax.errors import Rejected

LOSSLESS = ("1.2.2.dcm", "1.2.1.99.dcm", "4.90.dcm", "4.80.dcm", "4.70.dcm", "4.57.dcm")
LOSSLESS += ("10008.1.2.1.dcm", "10008.1.2.dcm", "10008.1.2.5.dcm")


def stored_values(seed=0, shape=(6, 5)):
    """Unique values, so that any flip or transposition changes the array."""
    return np.random.default_rng(seed).permutation(np.prod(shape)).reshape(shape).astype("<i2")


def write_slice(path, *, z=0.0, values=None, syntax=ExplicitVRLittleEndian, drop=(), **changes):
    """Writes a CT slice with pydicom; `changes` replace elements, `drop` removes some."""
    values = stored_values() if values is None else values
    data = pydicom.Dataset()
    data.SOPClassUID, data.Modality = CTImageStorage, "CT"
    data.SOPInstanceUID, data.SeriesInstanceUID = f"1.2.3.{zlib.crc32(path.stem.encode())}", "1.2.3"
    data.FrameOfReferenceUID = "1.2.3.4"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [-10, -20, z]
    data.PixelSpacing = [0.5, 0.75]
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = values.tobytes()
    for name, value in changes.items():
        setattr(data, name, value)
    for name in drop:
        delattr(data, name)
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.get("SOPClassUID") or CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.9"
    if "PixelData" in data and not pydicom.uid.UID(syntax).is_implicit_VR:
        data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, places, **changes):
    """Writes one slice at each z; slice k holds the values of seed k."""
    folder.mkdir(exist_ok=True)
    return [
        write_slice(folder / f"{k:03d}.dcm", z=z, values=stored_values(k), **changes)
        for k, z in enumerate(places)
    ]


def only_series(path, **overrides):
    overrides = reading.Overrides(**overrides)
    series, reasons = search.find_series(path, overrides=overrides)
    assert reasons == []
    assert len(series) == 1
    return volumes.load_series(series[0], overrides=overrides)


def only_reason(path, **overrides):
    overrides = reading.Overrides(**overrides)
    series, reasons = search.find_series(path, overrides=overrides)
    if series:
        with pytest.raises(Rejected) as caught:
            volumes.load_series(series[0], overrides=overrides)
        return str(caught.value)
    assert len(reasons) == 1
    return reasons[0][1]


def test_hu_are_slope_times_value_plus_intercept(tmp_path):
    values = stored_values()
    values[0, 0] = -2000
    path = write_slice(tmp_path / "a.dcm", values=values, RescaleSlope=2)
    header, hu = dicom.read_slice(path)
    assert hu.dtype == np.int16
    np.testing.assert_array_equal(hu, values.astype(int) * 2 - 1024)
    assert header.series == "1.2.3"
    half = write_slice(tmp_path / "b.dcm", values=values, RescaleSlope=0.5)
    np.testing.assert_array_equal(dicom.read_slice(half)[1], np.rint(values * 0.5 - 1024))


def test_hu_outside_int16_are_clipped(tmp_path):
    values = stored_values()
    values[0, :2] = -32768, 32767
    hu = dicom.read_slice(write_slice(tmp_path / "a.dcm", values=values))[1]
    assert hu[0, 0] == -32768 and hu[0, 1] == 32767 - 1024


def test_each_slice_has_its_own_slope_and_intercept(tmp_path):
    write_slice(tmp_path / "a.dcm", z=0, RescaleSlope=2, RescaleIntercept=-1000)
    write_slice(tmp_path / "b.dcm", z=5, RescaleSlope=3, RescaleIntercept=-900)
    hu = only_series(tmp_path).hu
    np.testing.assert_array_equal(hu[0], stored_values() * 3 - 900)
    np.testing.assert_array_equal(hu[1], stored_values() * 2 - 1000)


def test_unsigned_and_twelve_bits(tmp_path):
    values = (stored_values().astype(np.uint16) * 130).astype("<u2")
    kind = {"PixelRepresentation": 0, "BitsStored": 12, "HighBit": 11}
    hu = dicom.read_slice(write_slice(tmp_path / "a.dcm", values=values, **kind))[1]
    np.testing.assert_array_equal(hu, values.astype(int) - 1024)


def test_encodings_of_one_slice_have_equal_hu(shared_data):
    folder = shared_data / "dicom" / "transfer_syntaxes"
    raw = pydicom.dcmread(folder / "CTImage.dcm").PixelData
    expected = np.frombuffer(raw, "<i2").reshape(512, 512).astype(int) - 1024
    files = [path for path in folder.glob("*.dcm") if path.name.endswith(LOSSLESS)]
    assert len(files) == 9
    for path in [folder / "CTImage.dcm", *files]:
        np.testing.assert_array_equal(only_series(path).hu[0], expected, err_msg=path.name)
    for ending, bound in (("4.91.dcm", 5), ("4.81.dcm", 1)):  # both are near-lossless
        (path,) = folder.glob(f"*{ending}")
        assert np.abs(only_series(path, allow_lossy=True).hu[0] - expected).max() <= bound


@pytest.mark.parametrize("number", [50, 51, 53, 55])
def test_lossy_jpeg_is_rejected_with_its_transfer_syntax(shared_data, number):
    (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob(f"*.4.{number}.dcm")
    assert f"1.2.840.10008.1.2.4.{number}" in only_reason(path)


def test_jpeg_2000_series_against_gdcm(shared_data):
    """GDCM is an independent decoder; it is not used, because it aborts on damaged streams."""
    volume = only_series(shared_data / "dicom" / "liver_j2k_20")
    assert volume.hu.shape == (20, 512, 512)
    assert volume.spacing == (2.0, 0.9765625, 0.9765625)
    assert len(set(volume.uids)) == 20
    numbers = [int(name[-5:]) for name in volume.slices]
    assert numbers == sorted(numbers)  # this scan ran from head to feet
    for k in (0, 19):
        data = pydicom.dcmread(shared_data / "dicom" / "liver_j2k_20" / volume.slices[k])
        values, _ = get_decoder(JPEG2000Lossless).as_array(data, decoding_plugin="gdcm")
        np.testing.assert_array_equal(volume.hu[k], values.astype(int) - 1024)


def test_two_slices_at_one_position_are_rejected(shared_data, tmp_path):
    reason = only_reason(shared_data / "dicom" / "duplicate_positions")
    assert "CT26.dcm" in reason and "CT28.dcm" in reason
    write_series(tmp_path, [0, 5, 10, 5, 15])
    reason = only_reason(tmp_path)
    assert "one position" in reason and "001.dcm" in reason and "003.dcm" in reason


def test_big_endian_deflated_and_implicit(tmp_path):
    values = stored_values()
    expected = values.astype(int) - 1024
    big = {"values": values.astype(">i2"), "syntax": "1.2.840.10008.1.2.2"}
    np.testing.assert_array_equal(
        dicom.read_slice(write_slice(tmp_path / "big.dcm", **big))[1], expected
    )
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"):
        path = write_slice(tmp_path / "a.dcm", syntax=syntax)
        np.testing.assert_array_equal(dicom.read_slice(path)[1], expected)


def test_slices_are_sorted_head_to_feet_by_position_not_name(tmp_path):
    places = [10, -5, 0, 5, -10]
    write_series(tmp_path, places)
    volume = only_series(tmp_path)
    ranks = np.argsort([-z for z in places])
    assert volume.slices == tuple(f"{k:03d}.dcm" for k in ranks)
    assert volume.spacing == (5.0, 0.5, 0.75)
    for plane, k in zip(volume.hu, ranks, strict=True):
        np.testing.assert_array_equal(plane, stored_values(k).astype(int) - 1024)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        ([1, 0, 0, 0, 1, 0], lambda a: a),
        ([-1, 0, 0, 0, 1, 0], lambda a: a[:, ::-1]),
        ([1, 0, 0, 0, -1, 0], lambda a: a[::-1]),
        ([-1, 0, 0, 0, -1, 0], lambda a: a[::-1, ::-1]),
        ([0, 1, 0, 1, 0, 0], lambda a: a.T),
        ([0, -1, 0, 1, 0, 0], lambda a: a[:, ::-1].T),
        ([0, 1, 0, -1, 0, 0], lambda a: a[::-1].T),
    ],
)
def test_axis_aligned_orientations_become_standard(tmp_path, orientation, turn):
    for z in (0, 3):
        write_slice(tmp_path / f"{z}.dcm", z=z, ImageOrientationPatient=orientation)
    volume = only_series(tmp_path)
    assert volume.slices == ("3.dcm", "0.dcm")  # head first, also where the normal points down
    np.testing.assert_array_equal(volume.hu[0], turn(stored_values()).astype(int) - 1024)
    transposed = orientation[0] == 0
    assert volume.spacing == (3.0, 0.75, 0.5) if transposed else (3.0, 0.5, 0.75)


def test_gantry_tilt_is_accepted_up_to_30_degrees(tmp_path):
    def tilted(degrees):
        angle = np.radians(degrees)
        return [1, 0, 0, 0, round(np.cos(angle), 6), round(np.sin(angle), 6)]

    write_series(tmp_path / "tilt", [0, 5, 10], ImageOrientationPatient=tilted(20))
    volume = only_series(tmp_path / "tilt")
    assert volume.slices == ("002.dcm", "001.dcm", "000.dcm")
    assert volume.spacing[0] == pytest.approx(5 * np.cos(np.radians(20)), abs=1e-5)
    write_series(tmp_path / "steep", [0, 5, 10], ImageOrientationPatient=tilted(40))
    reason = only_reason(tmp_path / "steep")
    assert all(part in reason for part in ("40 degrees", "30", "3 files", "1.2.3"))


@pytest.mark.parametrize(
    ("places", "parts"),
    [
        ([0, 5, 10, 12, 15, 20], ("uneven", "2.00 mm", "003.dcm", "002.dcm", "5.00 mm")),
        ([0, 5, 10, 15, 17.5], ("uneven", "2.50 mm", "004.dcm", "003.dcm", "5.00 mm")),
        ([0, 40, 50, 52, 90, 99], ("uneven", "2.00 mm", "003.dcm", "002.dcm")),
    ],
)
def test_unevenly_spaced_slices_are_rejected(tmp_path, places, parts):
    write_series(tmp_path, places)
    reason = only_reason(tmp_path)
    assert all(part in reason for part in parts), reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Modality": "", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "no Modality"),
        ({"Modality": "MR"}, "MR"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, "0 per-frame .* 1 frames"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "Secondary Capture Image Storage"),
        ({"NumberOfFrames": 3}, "3 frames"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "ImageType LOCALIZER"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "3 .*RGB"),
        ({"Rows": 5000}, "5000 x 5"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "BitsAllocated 8, BitsStored 8"),
        ({"HighBit": 14}, "BitsAllocated 16, BitsStored 16, HighBit 14"),
        ({"BitsStored": 17, "HighBit": 16}, "BitsAllocated 16, BitsStored 17"),
        ({"RescaleSlope": 0}, "RescaleSlope 0"),
        ({"RescaleSlope": "1e300"}, "RescaleSlope 1e300"),
        ({"RescaleIntercept": "-1e300"}, "RescaleIntercept -1e300"),
        ({"RescaleType": "MGML"}, "RescaleType MGML"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "only axial slices|90 degrees"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "ImageOrientationPatient .*1.0"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "ImageOrientationPatient .* 6 "),
        ({"drop": ["ImageOrientationPatient"]}, "ImageOrientationPatient"),
        ({"drop": ["RescaleIntercept"]}, "RescaleIntercept"),
        ({"drop": ["PixelRepresentation"]}, "PixelRepresentation None"),
        ({"drop": ["BitsStored"]}, "BitsStored None"),
        ({"drop": ["PixelData"]}, "no pixel data"),
        ({"drop": ["Rows"]}, "None x 5"),
        ({"PixelData": bytes(40)}, "truncated.* 40 .*60"),
        ({"PixelData": bytes(120)}, "oversized.* 120 .*60"),
    ],
)
def test_unsupported_files_are_rejected(tmp_path, changes, reason):
    write_slice(tmp_path / "a.dcm", **changes)
    assert re.search(reason, only_reason(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"FrameOfReferenceUID": "9.9"}, "FrameOfReferenceUID"),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}, "orientation"),
        ({"values": stored_values(shape=(4, 4))}, "matrix"),
        ({"PixelSpacing": [1, 1]}, "PixelSpacing"),
        ({"drop": ["ImagePositionPatient"]}, "ImagePositionPatient"),
    ],
)
def test_differences_within_a_series_are_rejected(tmp_path, changes, reason):
    write_slice(tmp_path / "a.dcm", z=0)
    write_slice(tmp_path / "b.dcm", z=5, **changes)
    message = only_reason(tmp_path)
    assert reason in message and "b.dcm" in message


def test_truncated_files_are_rejected_in_one_line(tmp_path, shared_data):
    folder = shared_data / "dicom" / "transfer_syntaxes"
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        content = path.read_bytes()
        for k, part in enumerate((0.999, 0.5, 0.003)):
            cut = tmp_path / f"{number}-{k}.dcm"
            cut.write_bytes(content[: int(len(content) * part)])
            reason = only_reason(cut)
            assert "\n" not in reason and len(reason) < 400


def test_an_encoded_image_without_its_end_marker_is_rejected(tmp_path, shared_data):
    """Decoders make up missing pixels, so the end marker is checked first."""
    for number in (57, 80, 90):
        (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob(f"*.1.2.4.{number}.dcm")
        data = pydicom.dcmread(path)
        frame = get_frame(data.PixelData, 0, number_of_frames=1)
        data.PixelData = encapsulate([frame[: len(frame) // 2]])
        data.save_as(tmp_path / "a.dcm")
        assert "end marker" in only_reason(tmp_path / "a.dcm")


def test_broken_headers_and_decompression_bombs_are_rejected(tmp_path, monkeypatch):
    good = write_slice(tmp_path / "good.dcm").read_bytes()
    empty = tmp_path / "empty.dcm"
    empty.write_bytes(b"")
    noise = tmp_path / "noise.dcm"
    noise.write_bytes(good[:200] + np.random.default_rng(0).bytes(500))
    deep = tmp_path / "deep.dcm"
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
    deep.write_bytes(good[:128] + b"DICM" + b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + item * 5000)
    for path in (empty, noise, deep):
        assert re.match("broken DICOM|.*Modality", only_reason(path))
    monkeypatch.setattr(dicom, "LARGEST_INFLATED", 1 << 20)
    bomb = write_slice(tmp_path / "bomb.dcm", syntax="1.2.840.10008.1.2.1.99").read_bytes()
    start = bomb.index(b"1.2.840.10008.1.2.1.99")
    meta = pydicom.filereader.read_file_meta_info(tmp_path / "bomb.dcm")
    end = 144 + meta.FileMetaInformationGroupLength
    assert start < end
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = squeeze.compress(bytes(8 << 20)) + squeeze.flush()
    (tmp_path / "bomb.dcm").write_bytes(bomb[:end] + packed)
    assert "1 MiB" in only_reason(tmp_path / "bomb.dcm")


def test_a_deflated_bomb_behind_a_long_header_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "LARGEST_INFLATED", 1 << 20)
    uid = b"1.2.840.10008.1.2.1.99"
    private = b"\x02\0\x02\x01OB\0\0" + (9000).to_bytes(4, "little") + bytes(9000)
    meta = b"\x02\0\x10\0UI" + len(uid).to_bytes(2, "little") + uid + private
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    header = b"\x08\0\x16\0UI\0\0" * 1000  # starts like a data set
    packed = squeeze.compress(header + bytes(8 << 20)) + squeeze.flush()
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + meta + packed)
    assert "1 MiB" in only_reason(tmp_path / "a.dcm")


def test_an_encoded_image_of_another_size_is_never_decoded(tmp_path, shared_data):
    folder = shared_data / "dicom" / "transfer_syntaxes"
    for number in (57, 70, 80, 81, 90, 91):
        (path,) = folder.glob(f"*.1.2.4.{number}.dcm")
        data = pydicom.dcmread(path)
        data.Rows = 256
        data.save_as(tmp_path / "a.dcm")
        reason = only_reason(tmp_path / "a.dcm", allow_lossy=True)
        assert re.search(r"encoded .*\(512, 512\).*\(256, 512\)", reason)
    syntax = "1.2.840.10008.1.2.4.90"
    write_slice(tmp_path / "b.dcm", syntax=syntax, PixelData=encapsulate([b"nonsense\xff\xd9"]))
    assert re.search(r"encoded .*None.*\(6, 5\)", only_reason(tmp_path / "b.dcm"))


def test_decoders_print_and_log_nothing(tmp_path, shared_data, capfd, caplog):
    """A damaged stream is rejected without log lines, warnings or output of C libraries."""
    for ending in ("4.80.dcm", "4.57.dcm", "4.70.dcm", "1.2.5.dcm"):
        (path,) = (shared_data / "dicom" / "transfer_syntaxes").glob(f"*{ending}")
        content = bytearray(path.read_bytes())
        content[-60000:-100] = bytes(59900)
        (tmp_path / "a.dcm").write_bytes(content)
        assert re.search("pixel data", only_reason(tmp_path / "a.dcm"))
    data = write_slice(tmp_path / "b.dcm", drop=["FrameOfReferenceUID"])
    content = data.read_bytes().replace(b"0.75", b"0,75")  # not a number
    data.write_bytes(content)
    assert "header" in only_reason(data)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_quiet_restores_warnings_and_logging():
    before = list(warnings.filters), logging.getLogger("pydicom").disabled
    with reading.quiet(), reading.quiet():
        warnings.warn("suppressed", UserWarning, stacklevel=1)
    assert (list(warnings.filters), logging.getLogger("pydicom").disabled) == before
    with pytest.raises(UserWarning, match="visible"):
        warnings.warn("visible", UserWarning, stacklevel=1)


def test_a_file_without_preamble_or_uids_is_read(tmp_path, shared_data):
    content = write_slice(tmp_path / "a", syntax="1.2.840.10008.1.2").read_bytes()
    meta = pydicom.filereader.read_file_meta_info(tmp_path / "a")
    (tmp_path / "a").write_bytes(content[144 + meta.FileMetaInformationGroupLength :])
    np.testing.assert_array_equal(only_series(tmp_path).hu[0], stored_values().astype(int) - 1024)
    write_slice(tmp_path / "a", SeriesInstanceUID="", SOPInstanceUID="")
    assert only_series(tmp_path).series.startswith("sha256:")
