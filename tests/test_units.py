"""Units: the verdicts of docs/ct_input.md, once per reader, and the DICOM pixels before them."""

import types

import nibabel
import numpy as np
import pytest
from PIL import Image
from test_dicom import write_slice

from maknet_jax import cli, prepare
from maknet_jax.ct import arrays, reading, search, volumes
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
    "mask": (body() > 200).astype(np.int32),
    "empty mask": np.zeros(SHAPE, np.int32),
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


MASKS = {
    "mask": "values from 0 to 1 are not HU: a binary mask; remove it",
    "empty mask": "an empty mask",
    "labels": "values from 0 to 25 are not HU: a label map of 2 values; remove it",
    "labels, no offset": "a binary mask",
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
    with pytest.raises(Rejected, match=MASKS.get(case, "--assume-hu")) as error:
        read(tmp_path, values)
    assert ("remove it" in str(error.value)) == (case in MASKS)
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
