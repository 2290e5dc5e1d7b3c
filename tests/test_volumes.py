"""Series read as volumes, and single slices with their neighbours."""

import concurrent.futures

import nibabel
import numpy as np
import pytest
from test_dicom import stored_values, write_series, write_slice
from test_search import write_pngs

from maknet_jax.ct import arrays, png, search, volumes
from maknet_jax.errors import InputError, Rejected


def test_a_label_map_is_not_ct(shared_data):
    series, _ = search.find_series(shared_data / "nifti")
    assert volumes.load_series(series[0]).hu.shape == (112, 101, 122)
    with pytest.raises(Rejected, match="0 to 117"):
        volumes.load_series(series[1])


def test_a_deeplesion_volume_is_read_in_order(shared_data):
    folder = shared_data / "deeplesion" / "Images_png" / "000001_01_01"
    (ref,), reasons = search.find_series(folder)
    volume = volumes.load_series(ref)
    assert reasons == [] and ref.key == volume.series == "000001_01_01:103-115"
    assert volume.slices == tuple(f"{k}.png" for k in range(103, 116))
    np.testing.assert_array_equal(volume.hu[6], png.read_png(folder / "109.png"))
    assert np.isnan(volume.spacing).all() and len(set(volume.uids)) == 13
    assert volume.json_spacing == [None, None, None]


def test_a_dicom_file_is_read_with_its_neighbours(tmp_path):
    paths = write_series(tmp_path, [0, 4, 9, 14])
    write_slice(tmp_path / "other.dcm", z=7, SeriesInstanceUID="1.2.9")
    whole = volumes.load_series(search.find_series(tmp_path)[0][0])
    for k, names in ((0, ("001.dcm", "000.dcm")), (1, ("002.dcm", "001.dcm", "000.dcm"))):
        volume, index = volumes.load_series_of(paths[k])
        assert volume.slices == names and volume.slices[index] == paths[k].name
        assert volume.spacing == whole.spacing and volume.series == whole.series
        np.testing.assert_array_equal(volume.hu[index], stored_values(k).astype(int) - 1024)
    wide, index = volumes.load_series_of(paths[0], around=2)
    assert wide.slices == ("002.dcm", "001.dcm", "000.dcm") and index == 2
    with pytest.raises(InputError, match=r"2 series \(1.2.3, 1.2.9\)"):
        volumes.load_series_of(tmp_path)
    paths[1].unlink()  # the next slice is not a neighbour
    volume, index = volumes.load_series_of(paths[0])
    assert volume.slices == ("000.dcm",) and index == 0
    write_slice(tmp_path / "extra.dcm", z=11)
    write_slice(tmp_path / "end.dcm", z=19)
    with pytest.raises(Rejected, match="uneven"):  # the neighbours would be wrong
        volumes.load_series_of(paths[2])


def test_a_png_is_read_with_its_neighbours_and_a_nifti_as_a_volume(tmp_path, shared_data):
    write_pngs(tmp_path / "s", ["009.png", "010.png", "011.png"])
    volume, index = volumes.load_series_of(tmp_path / "s" / "010.png")
    assert index == 1 and volume.hu[:, 0, 0].tolist() == [0, 1, 2]
    volume, index = volumes.load_series_of(tmp_path / "s" / "009.png")
    assert index == 0 and volume.slices == ("009.png", "010.png")
    torso = shared_data / "nifti" / "torso_112" / "example_ct.nii.gz"
    volume, index = volumes.load_series_of(torso)
    assert index is None and volumes.slice_of(volume, 111) == 0
    with pytest.raises(InputError, match="112 .*example_ct.nii.gz.* 111 .*0"):
        volumes.slice_of(volume, 112)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no CT"):
        volumes.load_series_of(tmp_path / "empty")


def test_a_series_of_one_file_has_its_neighbours_as_context(tmp_path):
    paths = write_series(tmp_path / "dicom", [0, -5, -10])
    write_pngs(tmp_path / "png", ["img9.png", "img10.png", "img11.png", "other10.png"])
    whole = volumes.load_series(search.find_series(tmp_path / "dicom")[0][0])
    for k in range(3):
        ((ref,), _) = search.find_series(paths[k])
        volume = volumes.load_series(ref)
        assert volume.slices == (paths[k].name,) and volume.hu.shape == (1, 6, 5)
        for plane, expected in zip(volume.neighbours(0), whole.neighbours(k), strict=True):
            np.testing.assert_array_equal(plane, expected)
    values = []
    for name in ("img9.png", "img10.png", "img11.png"):
        ((ref,), _) = search.find_series(tmp_path / "png" / name)
        around = volumes.load_series(ref).neighbours(0)
        values.append([int(plane[0, 0]) for plane in around])
    assert values == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]  # by number, not by text


def test_many_threads_read_at_once(shared_data):
    """Silencing pydicom is safe in threads; JPEG lossless readers redirect stderr in turn."""
    folder = shared_data / "dicom" / "transfer_syntaxes"
    refs = [search.find_series(path)[0] for path in sorted(folder.glob("*.4.[578][07].dcm"))] * 4
    refs = [series[0] for series in refs if series]
    assert len(refs) == 12
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        planes = [volume.hu for volume in pool.map(volumes.load_series, refs)]
    for plane in planes:
        np.testing.assert_array_equal(plane, planes[0])


@pytest.mark.parametrize(
    "orientation",
    [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0), (0, 1, 0, -1, 0, 0), (1, 0, 0, 0, 0.96, -0.28)],
    ids=["standard", "mirrored", "turned", "tilted"],
)
def test_the_affine_places_every_voxel_of_a_dicom_series(tmp_path, orientation):
    shape, (row, column), z = stored_values().shape, (3, 2), (0.0, 4.0, 8.0)
    for k, place in enumerate(z):
        values = np.zeros(shape, np.int16)
        values[row, column] = 3000 if k == 2 else 0
        write_slice(
            tmp_path / f"{k}.dcm",
            z=place,
            values=values,
            ImageOrientationPatient=list(orientation),
            BodyPartExamined="CHEST",
        )
    volume = volumes.load_series(search.find_series(tmp_path)[0][0])
    assert volume.body_part == "CHEST"
    index = np.unravel_index(volume.hu.argmax(), volume.hu.shape)
    along_columns, along_rows = np.reshape(orientation, (2, 3))
    left, posterior, superior = (
        np.array([-10, -20, z[2]]) + 0.75 * column * along_columns + 0.5 * row * along_rows
    )
    world = volume.affine @ [*index[::-1], 1]
    np.testing.assert_allclose(world[:3], [-left, -posterior, superior], atol=1e-6)
    assert volume.affine[2, 2] == pytest.approx(-4)  # towards the feet


def test_the_affine_places_every_voxel_of_a_nifti_and_an_array(tmp_path):
    stored = np.random.default_rng(0).integers(-1000, 500, (5, 6, 7)).astype(np.int16)
    stored[1, 4, 2] = 3000
    affine = np.array([[0, 0, -2, 9], [0.5, 0, 0, 8], [0, -3, 0, 7], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "ct.nii.gz")
    (ref,), _ = search.find_series(tmp_path)
    centred = affine * [1, 1, 1, 0] + np.diag([0, 0, 0, 1])
    for volume, expected in (
        (volumes.load_series(ref), affine),
        (arrays.volume_of_array(stored, affine=affine), affine),
        (arrays.volume_of_array(stored, spacing=(0.5, 3, 2), orientation="AIL"), centred),
    ):
        index = np.unravel_index(volume.hu.argmax(), volume.hu.shape)
        world = volume.affine @ [*index[::-1], 1]
        np.testing.assert_allclose(world, expected @ [1, 4, 2, 1], atol=1e-6)
