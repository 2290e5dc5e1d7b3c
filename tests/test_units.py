"""Units: the verdicts of docs/ct_input.md, once per reader, and the DICOM pixels before them."""

import re
import types

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from test_dicom import only_reason, only_series, write_slice

from maknet_jax import cli, prepare
from maknet_jax.ct import arrays, dicom, preprocess, reading, search, volumes
from maknet_jax.data import lesions, records
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain import results, selection
from maknet_jax.explain.options import DISPLAY, PATH, SelectionOptions

SHAPE = (3, 48, 48)  # slices, rows, columns
RIGHT_TO_LEFT = np.diag([-1.0, -1.0, -3.0, 1.0])  # affine to RAS of arrays in standard order


def body(*, noise=1.0):
    """HU of a round body: air, skin fat, tissue, two lungs and a spine; with noise by default."""
    y, x = (np.mgrid[:48, :48] - 23.5) / 24
    hu = np.full(SHAPE, -1000.0)
    hu[:, x**2 + y**2 < 0.8] = -100
    hu[:, x**2 + y**2 < 0.7] = 40
    hu[:, (np.abs(x) - 0.4) ** 2 + y**2 < 0.05] = -800
    hu[:, x**2 + (y - 0.6) ** 2 < 0.03] = 300
    hu[:, x**2 + (y - 0.6) ** 2 < 0.01] = 900
    spread = np.where(hu == -800, 60, np.where(hu >= 300, 80, 12))
    drawn = np.random.default_rng(0).normal(size=SHAPE)
    return np.rint(hu + noise * spread * drawn).astype(np.int32)


def noiseless():
    """HU of constants that a rule for padding could take for it; no lungs."""
    hu = body(noise=0)
    return np.where(hu == -800, 40, hu)


def noise(mean, spread):
    return np.rint(np.random.default_rng(1).normal(mean, spread, SHAPE)).astype(np.int32)


def corners(hu, value):
    """`hu` with padding of `value` outside the scanner's circle."""
    y, x = (np.mgrid[:48, :48] - 23.5) / 24
    return np.where(x**2 + y**2 > 1, value, hu)


def scores(hu):
    return (hu - hu.mean()) / hu.std()


def stretched(hu):
    return np.rint((hu - hu.min()) / np.ptp(hu) * 65535 - 32768).astype(np.int32)


def with_metal(hu):
    hu = hu.copy()
    hu[:, 20:22, 20:23] = 31744
    return hu


ACCEPTED = {
    "hu": body(),
    "background -32768": np.where(body() < -940, -32768, body()),
    "two paddings": corners(np.where(body() < -1010, -2000, body()), -32768),
    "metal 31744": with_metal(body()),
    "window -160..240": np.clip(body(), -160, 240),
    "window -500..1300": np.clip(body(), -500, 1300),
    "water": noise(0, 5),
    "wax": noise(-120, 4),
}
REJECTED = {
    "offset 1024": np.maximum(body() + 1024, 0),
    "offset 1000": body() + 1000,
    "offset, padded -2000": corners(body() + 1024, -2000),
    "offset, padded -976": corners(body() + 1024, -976),
    "window 0..400": np.clip(body(), 0, 400),
    "0..255": np.rint(np.clip((body() + 160) / 400, 0, 1) * 255).astype(np.int32),
    "labels": np.where(body() > 200, 7, np.where(body() > -50, 25, 0)),
    "z-scores": scores(body()),
    "clipped z-scores": np.clip(scores(body()), -3, 3),
    "-1..1": body() / 1500,
    "constant": np.full(SHAPE, -1000),
    "times 10": np.rint(body() * 10.3).astype(np.int32),
    "times 10, noiseless": noiseless() * 10,
    "stretched": stretched(body()),
    "labels, no offset": np.where(body() > 400, -32760, -32768),
    "intercept 30000": body() + 30000,
    "intercept -30000": np.maximum(body() - 30000, -32768),
}


def read_dicom(folder, values, **overrides):
    scale = 1 if values.dtype.kind == "i" else 1024  # z-scores below 32
    shift = int(values.min()) + 32768 if values.min() < -32768 or values.max() > 32767 else 0
    stored = np.rint(values * scale).astype(np.int32) - shift
    for k, plane in enumerate(stored):
        rescale = {"RescaleSlope": 1 / scale, "RescaleIntercept": shift}
        write_slice(folder / f"{k}.dcm", z=-3 * k, values=plane.astype("<i2"), **rescale)
    return only_volume(folder, overrides)


def read_nifti(folder, values, **overrides):
    stored = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
    path = folder / "ct.nii.gz"
    nibabel.Nifti1Image(stored.transpose(2, 1, 0), RIGHT_TO_LEFT).to_filename(path)
    return only_volume(folder, overrides)


def read_png(folder, values, **overrides):
    stored = np.clip(np.rint(values) + 32768, 0, 65535).astype(np.uint16)
    for k, plane in enumerate(stored):
        Image.fromarray(plane).save(folder / f"{k}.png")
    return only_volume(folder, overrides)


def read_array(folder, values, **overrides):
    affine = np.diag([-3.0, -1.0, -1.0, 1.0])[[2, 1, 0, 3]]
    try:
        return arrays.volume_of_array(
            values, affine=affine, overrides=reading.Overrides(**overrides)
        )
    except InputError as error:
        raise Rejected(str(error)) from error


def only_volume(folder, overrides):
    overrides = reading.Overrides(**overrides)
    (ref,), reasons = search.find_series(folder, overrides=overrides)
    assert reasons == []
    return volumes.load_series(ref, overrides=overrides)


READERS = {"dicom": read_dicom, "nifti": read_nifti, "png": read_png, "array": read_array}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", [*ACCEPTED, *REJECTED])
def test_each_reader_gives_the_same_verdict(tmp_path, case, reader):
    read = READERS[reader]
    if case in ACCEPTED:
        np.testing.assert_array_equal(read(tmp_path, ACCEPTED[case]).hu, ACCEPTED[case])
        return
    values = REJECTED[case]
    with pytest.raises(Rejected, match="--assume-hu"):
        read(tmp_path, values)
    expected = np.clip(np.rint(values), -32768, 32767)
    np.testing.assert_array_equal(read(tmp_path, values, assume_hu=True).hu, expected)


def test_the_evidence_is_named(tmp_path):
    with pytest.raises(Rejected, match=r"values from 0 to 255 .*none is from -1500 to -1"):
        read_nifti(tmp_path, REJECTED["0..255"])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int64, np.uint64, np.float64])
def test_small_and_large_types_do_not_overflow(dtype):
    """An int16 range from -32768 to 1000 overflowed to a negative number."""
    background = corners(body(), -32768).astype(np.int16)
    np.testing.assert_array_equal(read_array(None, background).hu, background)
    values = np.clip(body(), 0 if np.dtype(dtype).kind == "u" else -128, 127).astype(dtype)
    np.testing.assert_array_equal(read_array(None, values, assume_hu=True).hu, values)


@pytest.mark.parametrize("reader", ["nifti", "array"])
def test_values_that_are_not_finite_are_always_rejected(tmp_path, reader):
    values = body().astype(np.float32)
    values[1, 2, 3] = np.nan
    with pytest.raises(Rejected, match="finite"):
        READERS[reader](tmp_path, values, assume_hu=True)


def test_each_rule_is_needed():
    """Values that only one of the rules rejects."""
    fill = corners(body(), 64511)  # unsigned 65535, not declared as padding
    for values, evidence in ((body() / 30, "fractions"), (fill, "above 32767")):
        with pytest.raises(Rejected, match=evidence):
            read_array(None, values)


def test_eight_bit_pngs_state_their_units_by_the_window(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "1.png")
    (ref,), _ = search.find_series(tmp_path)
    assert volumes.load_series(ref, png_window=(0, 400)).hu.max() == 400


def test_a_slice_with_its_neighbours_is_checked_too(tmp_path):
    read_dicom(tmp_path, body() + 1000, assume_hu=True)
    with pytest.raises(Rejected, match="--assume-hu"):
        volumes.load_series_of(tmp_path / "1.dcm")
    accepted = reading.Overrides(assume_hu=True)
    assert len(volumes.load_series_of(tmp_path / "1.dcm", overrides=accepted)[0].hu) == 3


def slice_of(path, stored, **changes):
    """The HU of a file with these stored values; unsigned values are stored as such."""
    kind = "<i2" if np.min(stored) < 0 else "<u2"
    changes.setdefault("PixelRepresentation", int(kind == "<i2"))
    values = np.asarray(stored).astype(kind)
    _, hu = dicom.read_slice(write_slice(path / "a.dcm", values=values, **changes))
    return hu.tolist()


TWELVE = {"BitsStored": 12, "HighBit": 11}


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


def test_prepare_records_the_overrides(tmp_path, capsys):
    (tmp_path / "ct").mkdir()
    read_dicom(tmp_path / "ct", REJECTED["offset 1000"], assume_hu=True)
    (tmp_path / "salt").write_text("a secret of the user, long enough\n")
    arguments = ["prepare", "dicom", str(tmp_path / "ct"), "--salt-file", str(tmp_path / "salt")]
    arguments += ["--min-slices", "3", "--size", "32", "--workers", "1", "--out"]
    assert cli.main([*arguments, str(tmp_path / "a")]) == 2
    assert "--assume-hu" in capsys.readouterr().err
    assert cli.main([*arguments, str(tmp_path / "a"), "--assume-hu", "--allow-lossy"]) == 0
    about = records.open_dataset(tmp_path / "a").info["about"]
    assert (about["assume_hu"], about["allow_lossy"]) == (True, True)


def test_every_way_to_records_checks_the_units(tmp_path):
    read_nifti(tmp_path, REJECTED["offset 1000"], assume_hu=True)
    (tmp_path / "segmentations").mkdir()
    mask = (body() > 200).astype(np.uint8).transpose(2, 1, 0)
    nibabel.Nifti1Image(mask, RIGHT_TO_LEFT).to_filename(
        tmp_path / "segmentations" / "spine.nii.gz"
    )
    (tmp_path / "table.csv").write_text("path,labels,split,slice\nct.nii.gz,spine,train,1\n")
    for name, verb, source in (
        ("table", prepare.prepare_table, tmp_path / "table.csv"),
        ("organs", prepare.prepare_segmentations, [tmp_path]),
    ):
        with pytest.raises(InputError, match="--assume-hu"):
            verb(source, tmp_path / name, size=32)
        verb(source, tmp_path / name, size=32, assume_hu=True)
        about = records.open_dataset(tmp_path / name).info["about"]
        assert about["assume_hu"] is True and "allow_lossy" not in about
    (tmp_path / "png").mkdir()
    read_png(tmp_path / "png", REJECTED["offset 1000"], assume_hu=True)
    box, spacing = (20, 20, 25, 25), (1, 1, 2)
    with pytest.raises(Rejected, match="--assume-hu"):
        lesions.patch_of_png(tmp_path / "png" / "1.png", box, spacing, 16)
    accepted = reading.Overrides(assume_hu=True)
    image, *_ = lesions.patch_of_png(tmp_path / "png" / "1.png", box, spacing, 16, accepted)
    assert image.mean() > 500


def test_masks_in_other_formats_are_named(tmp_path):
    read_nifti(tmp_path, body())
    (tmp_path / "segmentations").mkdir()
    (tmp_path / "segmentations" / "liver.nrrd").write_bytes(b"NRRD0004")
    with pytest.raises(InputError, match=r"liver\.nrrd: NRRD is not supported"):
        prepare.prepare_segmentations([tmp_path], tmp_path / "out", size=32)
    (tmp_path / "ct.nii.gz").rename(tmp_path / "ct.mha")
    with pytest.raises(InputError, match="MetaImage is not supported"):
        prepare.prepare_segmentations([tmp_path], tmp_path / "out", size=32)


def test_attribute_and_perturb_take_and_record_the_overrides(tmp_path):
    read_nifti(tmp_path, REJECTED["offset 1000"], assume_hu=True)
    run = types.SimpleNamespace(size=32, vocabulary=types.SimpleNamespace(index={}))
    for assume_hu in (False, True):
        options = SelectionOptions(path=tmp_path, assume_hu=assume_hu)
        read = selection.select(run, options).readers[0]
        if assume_hu:
            assert read().image.shape == (32, 32, 3)
        else:
            with pytest.raises(Rejected):
                read()
        network = types.SimpleNamespace(run=types.SimpleNamespace(vocabulary=["a"]), identity=[])
        settings = results.shared_settings([network], options, PATH, DISPLAY)
        assert settings.get("assume_hu", False) == assume_hu and "allow_lossy" not in settings
