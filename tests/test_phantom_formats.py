"""The phantom's DICOM series, read back."""

import itertools

import numpy as np
import pydicom
import pytest

from maknet_jax.phantom import formats


@pytest.mark.parametrize(
    ("syntax", "intercept", "padding"),
    list(itertools.product(formats.SYNTAXES, (0, -1024), (0, -3024))),
)
def test_dicom_round_trips_the_hu(tmp_path, syntax, intercept, padding):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1024, 3000, (5, 20, 24)).astype(np.int16)
    hu[:, 0] = padding
    uids = formats.write_series(
        tmp_path / "series",
        hu,
        (5.0, 0.8, 0.7),
        "key",
        rng,
        syntax=syntax,
        intercept=intercept,
        upwards=True,
    )
    files = [pydicom.dcmread(path) for path in sorted((tmp_path / "series").iterdir())]
    assert {data.file_meta.TransferSyntaxUID for data in files} == {syntax}
    positions = [float(data.ImagePositionPatient[2]) for data in files]
    assert positions != sorted(positions) and positions != sorted(positions, reverse=True)
    files.sort(key=lambda data: -data.ImagePositionPatient[2])
    assert [data.SOPInstanceUID for data in files] == uids.tolist()
    assert [data.InstanceNumber for data in files] == [5, 4, 3, 2, 1]
    assert np.diff([data.ImagePositionPatient[2] for data in files]) == pytest.approx(-5.0)
    for data, frame in zip(files, hu, strict=True):
        assert data.PixelSpacing == [0.8, 0.7]
        raw = data.pixel_array.astype(int)
        assert np.array_equal(raw * int(data.RescaleSlope) + int(data.RescaleIntercept), frame)
        assert ("PixelPaddingValue" in data) == (padding == -3024)
