"""Converted values of DICOM elements."""

import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from test_dicom import stored_values, write_slice

from maknet_jax.ct.dicom import TAGS, read_header
from maknet_jax.ct.elements import value

SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_values_are_those_that_pydicom_converts(tmp_path, syntax):
    # The same bytes under another character set, as another type, or in another byte order differ.
    for number, encoding in enumerate(("ISO_IR 100", "ISO_IR 144")):
        big = syntax == ExplicitVRBigEndian
        path = write_slice(
            tmp_path / f"{number}.dcm",
            values=stored_values().astype(">i2" if big else "<i2"),
            syntax=syntax,
            SpecificCharacterSet=encoding,
            PatientID=b"M\xfcller".decode("latin-1" if number == 0 else "iso8859_5"),
            PixelPaddingValue=-2000,
            AcquisitionNumber=7,
        )
        data, expected = pydicom.dcmread(path), pydicom.dcmread(path)
        for name in (*TAGS, "PatientID", "NumberOfFrames"):
            values = value(data, name), value(data, name)
            assert values == (expected.get(name),) * 2, name
            assert type(values[0]) is type(expected.get(name)), name
        assert value(data, "PatientID") == expected.PatientID


def test_damaged_values_are_those_that_pydicom_returns(tmp_path):
    path = write_slice(tmp_path / "a.dcm")
    content = path.read_bytes()
    assert content.count(b"-1024") == 1
    path.write_bytes(content.replace(b"-1024", b"-10x4"))
    expected = pydicom.dcmread(path).get("RescaleIntercept")
    assert value(pydicom.dcmread(path), "RescaleIntercept") == expected
    assert str(expected).startswith("-10x4")
    header = read_header(path)
    assert header is not None and header.problem.startswith("broken DICOM header")
