"""The OpenKBP release as NIfTI: axes, values, trimming, and files that are invalid."""

import re
import shutil

import nibabel
import numpy as np
import pytest
from prepared import read_csv

from maknet_jax import prepare
from maknet_jax.ct import nifti
from maknet_jax.data import openkbp
from maknet_jax.errors import InputError

SPACING = (4.0, 3.5, 2.5)  # mm along y, x, z
FIRST, LAST = 30, 90  # slices with a body
ORGAN = {(60, 50, 40): 1, (61, 50, 40): 1, (61, 52, 41): 1}  # y, x, z


def sparse(path, entries):
    """Writes (y, x, z) -> value, or -> None for a mask, as the release does."""
    lines = [",data"]
    for place, value in sorted(entries.items()):
        index = np.ravel_multi_index(place, openkbp.SHAPE)
        lines.append(f"{index}," + ("" if value is None else f"{float(value)}"))
    path.write_text("\n".join(lines) + "\n")


def write_patient(folder):
    """A box of water at 1024, brighter towards the left; one voxel of bone."""
    folder.mkdir(parents=True)
    entries = {
        (y, x, z): 1024 + x
        for y in range(50, 78)
        for x in range(45, 75)
        for z in (*range(FIRST, LAST + 1), 10)
        if z != 10 or y == 60  # too little body in slice 10
    }
    entries[70, 70, 35] = 2500
    sparse(folder / "ct.csv", entries)
    sparse(folder / "Brainstem.csv", dict.fromkeys(ORGAN))
    sparse(folder / "Larynx.csv", {})
    sparse(folder / "PTV70.csv", dict.fromkeys(ORGAN))
    sparse(folder / "dose.csv", {(60, 50, 40): 70.0})
    np.savetxt(folder / "voxel_dimensions.csv", SPACING)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("openkbp")
    write_patient(root / "release" / "pt_7")
    summary = prepare.prepare_openkbp(root / "release", root / "out")
    counts = {"patients": 1, "present_before": 0, "failures": 0}
    assert summary == {"out": str(root / "out"), **counts}
    return root


def test_values_and_axes(converted):
    hu, spacing, _ = nifti.read_nifti(converted / "out" / "pt_7" / "ct.nii.gz")
    # Cut to the slices with a body; the standard orientation is that of the release.
    assert hu.shape == (LAST - FIRST + 1, 128, 128)
    assert spacing == pytest.approx((2.5, 4.0, 3.5))
    assert hu[35 - FIRST, 70, 70] == 1476 and hu[0, 60, 50] == 50 and hu[0, 0, 0] == -1024
    assert (hu[:, 60, 45:75] == np.arange(45, 75)).all()


def test_masks_have_the_names_of_totalsegmentator_and_empty_ones_stay_empty(converted):
    folder = converted / "out" / "pt_7" / "segmentations"
    assert sorted(path.name for path in folder.iterdir()) == ["brainstem.nii.gz", "larynx.nii.gz"]
    ct = folder.parent / "ct.nii.gz"
    mask = nifti.load_label_map(folder / "brainstem.nii.gz", like=ct)
    places = {(y, x, z + FIRST) for z, y, x in np.argwhere(mask).tolist()}
    assert places == set(ORGAN)
    assert not nifti.load_label_map(folder / "larynx.nii.gz", like=ct).any()


def test_finished_patients_are_skipped(converted):
    path = converted / "out" / "pt_7" / "ct.nii.gz"
    before = path.stat().st_mtime_ns
    summary = prepare.prepare_openkbp(converted / "release", converted / "out")
    assert summary["present_before"] == 1 and path.stat().st_mtime_ns == before


def test_the_geometry_is_that_of_the_converted_test_data(converted, shared_data):
    """The test data were converted by others: their affine with the spacing of pt_11."""
    image = nibabel.load(shared_data / "openkbp" / "train" / "pt_11" / "ct.nii.gz")
    ours = nibabel.load(converted / "out" / "pt_7" / "ct.nii.gz")
    assert image.shape[:2] == ours.shape[:2] == (128, 128)
    assert (np.sign(image.affine[:3, :3]) == np.sign(ours.affine[:3, :3])).all()
    scale = np.diag(ours.affine)[:2] / np.diag(image.affine)[:2]
    np.testing.assert_allclose(ours.affine[:2, 3], image.affine[:2, 3] * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("voxel_dimensions.csv", "4\n3\n", "three numbers"),
        ("voxel_dimensions.csv", "4\n3\n-2\n", "three numbers"),
        ("voxel_dimensions.csv", None, "voxel_dimensions.csv"),
        ("ct.csv", "index,data\n1,2\n", "expected ',data'"),
        ("ct.csv", ",data\n1,\n", "ct.csv"),
        ("ct.csv", ",data\n5,1024.0\n", "body"),
        ("ct.csv", ",data\n", "body"),
        ("ct.csv", ",data\n5,nan\n", "values"),
        ("ct.csv", ",data\n5,40000\n", "values"),
        ("ct.csv", ",data\n5,1\n5,2\n", "twice"),
        ("ct.csv", ",data\n5,1,2\n", "an index and a value"),
        ("Brainstem.csv", ",data\nnan,\n", "indices"),
        ("Brainstem.csv", ",data\n1e300,\n", "indices"),
        ("Brainstem.csv", ",data\n#7,\n", "#7"),
        ("Brainstem.csv", ",data\n7,0.0\n", "empty cell"),
        ("voxel_dimensions.csv", "", "three numbers"),
        ("voxel_dimensions.csv", "4\n3\nx\n", "three numbers"),
        ("voxel_dimensions.csv", "4\n3\n1e6\n", "three numbers"),
        ("Brainstem.csv", ",data\n2097152,\n", "indices"),
        ("Brainstem.csv", ",data\n-1,\n", "indices"),
        ("Brainstem.csv", ",data\n1.5,\n", "indices"),
    ],
)
def test_invalid_files_reject_the_patient_and_leave_nothing(converted, tmp_path, file, text, part):
    folder = shutil.copytree(converted / "release" / "pt_7", tmp_path / "release" / "pt_1")
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    summary = prepare.prepare_openkbp(tmp_path / "release", tmp_path / "out")
    assert summary["patients"] == 0 and summary["failures"] == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failures.csv"]
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    assert failure["input"] == str(folder) and re.search(part, failure["reason"])


def test_a_patient_without_ct_and_a_folder_in_use_are_rejected(converted, tmp_path):
    for name in ("pt_1", "pt_2", "pt_3"):
        shutil.copytree(converted / "release" / "pt_7", tmp_path / name)
    (tmp_path / "pt_1" / "ct.csv").unlink()
    (tmp_path / "pt_2" / "Brainstem.csv").unlink()
    (tmp_path / "pt_2" / "Brainstem.csv").symlink_to(tmp_path / "nowhere")  # not merely missing
    summary = prepare.prepare_openkbp(tmp_path, tmp_path / "out")
    assert summary["patients"] == 1 and summary["failures"] == 2
    # Its folders are those of the release: they are not taken for converted patients.
    summary = prepare.prepare_openkbp(tmp_path, tmp_path)
    assert (summary["patients"], summary["present_before"], summary["failures"]) == (0, 0, 3)


def test_a_folder_without_patients_is_refused(tmp_path):
    with pytest.raises(InputError, match="pt_N/ct.csv"):
        prepare.prepare_openkbp(tmp_path, tmp_path / "out")
