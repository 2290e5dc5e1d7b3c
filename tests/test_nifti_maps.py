"""Maps as NIfTI: where a voxel lies, what it sums to, and series without geometry."""

import nibabel
import numpy as np
import pytest

from maknet_jax.explain import nifti_maps, results

SIZE, SHAPE, CROP = 16, (3, 40, 50), (4, 10, 36, 42)  # the box is 32 x 32: 2 pixels per value
AFFINE = [[-0.8, 0, 0, 20.0], [0, -0.8, 0, 30.0], [0, 0, -5.0, 100.0], [0, 0, 0, 1]]


def save(folder, number, labels, maps, series="a/b", affine=AFFINE):
    """One image's result with maps `[T, S, S, 3]`, as `attribute` stores it."""
    scale = np.abs(maps).max(axis=(1, 2, 3)) + np.float32(1e-30)
    entries = [{"label": label, "map": row} for row, label in enumerate(labels)]
    meta = {"series": series, "slice": number, "crop": CROP, "shape": SHAPE, "size": SIZE}
    meta |= {"affine": affine} if affine else {}
    models = [{"name": "net", "labels": [*entries, {"label": "unexplained", "map": None}]}]
    metadata = {"id": f"{series}:{number}", "group": series, "meta": meta, "models": models}
    arrays = {"maps_0": (maps / scale[:, None, None, None]).astype(np.float16), "scale_0": scale}
    path = folder / f"{len(list(folder.iterdir())):05d}.npz"
    results.save(path, metadata, arrays)
    return path


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "cases").mkdir()
    return tmp_path / "cases"


def test_a_voxel_lies_where_the_network_saw_it(cases, tmp_path):
    maps = np.zeros((1, SIZE, SIZE, 3), np.float32)
    maps[0, 5, 9] = [0.1, 0.2, -0.05]
    ((entry,), without) = nifti_maps.write_maps(
        tmp_path / "out", {0: save(cases, 1, ["left kidney"], maps)}, ["net"]
    )
    assert (entry["series"], entry["label"], entry["slices"]) == ("a/b", "left kidney", 1)
    assert entry["file"] == str(tmp_path / "out" / "a_b" / "left_kidney.nii.gz") and not without
    image = nibabel.load(entry["file"])
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(image.header.get_qform(), AFFINE, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    values = np.asarray(image.dataobj).transpose(2, 1, 0)
    assert values.shape == SHAPE and not values[[0, 2]].any()
    rows, columns = np.nonzero(values[1])
    centre = (
        np.average(rows, weights=values[1][rows, columns]),
        np.average(columns, weights=values[1][rows, columns]),
    )
    expected = CROP[0] + 2 * 5 + 0.5, CROP[1] + 2 * 9 + 0.5  # the middle of its 2 x 2 pixels
    np.testing.assert_allclose(centre, expected, atol=0.01)


def test_the_voxels_of_a_slice_sum_to_the_change(cases, tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.normal(0.001, 0.01, (2, SIZE, SIZE, 3)).astype(np.float32)
    maps[:, [0, -1]] = maps[:, :, [0, -1]] = 0  # interpolation repeats the edge
    paths = {
        0: save(cases, 0, ["liver", "lung"], maps),
        1: save(cases, 2, ["lung", "spleen"], 2 * maps),
    }
    entries, _ = nifti_maps.write_maps(tmp_path / "out", paths, ["net"])
    volumes = {entry["label"]: np.asarray(nibabel.load(entry["file"]).dataobj) for entry in entries}
    totals = maps.sum((1, 2, 3))
    expected = {
        "liver": [totals[0], 0, 0],
        "lung": [totals[1], 0, 2 * totals[0]],
        "spleen": [0, 0, 2 * totals[1]],
    }
    assert volumes.keys() == expected.keys()
    for label, values in volumes.items():
        np.testing.assert_allclose(values.sum((0, 1)), expected[label], atol=0.01)
    assert [entry["slices"] for entry in entries] == [1, 2, 1]


def test_series_without_geometry_are_counted(cases, tmp_path):
    maps = np.ones((1, SIZE, SIZE, 3), np.float32)
    paths = {
        0: save(cases, 0, ["lung"], maps, series="png", affine=None),
        1: save(cases, 0, ["lung"], maps, series="a b"),
        2: save(cases, 0, ["lung"], maps, series="a_b"),
    }
    entries, without = nifti_maps.write_maps(tmp_path / "out", paths, ["net"])
    assert without == 1
    assert [entry["file"].split("/")[-2] for entry in entries] == ["a_b", "a_b-2"]
