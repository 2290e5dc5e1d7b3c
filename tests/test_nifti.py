"""NIfTI: every stored orientation gives the same volume; values that are not HU are rejected."""

import gzip
import itertools

import nibabel
import numpy as np
import pytest

from maknet_jax.ct import nifti
from maknet_jax.errors import Rejected


def block():
    """[X, Y, Z] in RAS: unique HU, so that any flip or transposition changes the array."""
    values = np.random.default_rng(0).permutation(4 * 5 * 6).reshape(4, 5, 6) * 10 - 600
    return values.astype(np.int16)


def write(path, values, affine=None, **header):
    image = nibabel.Nifti1Image(values, np.diag([2.0, 3, 4, 1]) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def test_a_ras_volume_worked_out_by_hand(tmp_path):
    values = np.full((2, 3, 4), -1000, np.int16)
    values[0, 2, 3] = 7
    hu, spacing, stored = nifti.read_nifti(write(tmp_path / "a.nii", values))
    # RAS+: x grows to the patient's right, y to anterior, z to the head. So the voxel lies at
    # the left (last column), anterior (row 0), in the slice nearest to the head (slice 0).
    assert hu[0, 0, 1] == 7
    assert spacing == (4.0, 3.0, 2.0)
    assert stored == ("3", "2", "1", "0")


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_every_stored_orientation_gives_the_same_volume(tmp_path, axes):
    ras = nibabel.Nifti1Image(block(), np.diag([2.0, 3, 4, 1]))
    first = None
    for flips in itertools.product((1, -1), repeat=3):
        image = ras.as_reoriented(np.array(list(zip(axes, flips, strict=True))))
        image.to_filename(tmp_path / "a.nii.gz")
        hu, spacing, stored = nifti.read_nifti(tmp_path / "a.nii.gz")
        canonical = np.asarray(nibabel.as_closest_canonical(image).dataobj)
        # canonical is RAS: x to the right of the patient, so columns right to left run down x
        np.testing.assert_array_equal(hu, canonical[::-1, ::-1, ::-1].transpose(2, 1, 0))
        assert spacing == (4.0, 3.0, 2.0)
        axis = axes[2]
        for k, name in enumerate(stored):  # names are the indices of the stored planes
            plane = np.take(np.asarray(image.dataobj), int(name), axis=axis)
            assert set(plane.ravel()) == set(hu[k].ravel())
        first = hu if first is None else first
        np.testing.assert_array_equal(hu, first)


def test_scale_is_applied_and_rounded(tmp_path):
    image = nibabel.Nifti1Image(block(), np.eye(4))
    image.header.set_slope_inter(0.5, -100)
    image.to_filename(tmp_path / "a.nii")
    stored = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj.get_unscaled())
    proxy = nibabel.load(tmp_path / "a.nii").dataobj
    expected = np.rint(stored * float(proxy.slope) + float(proxy.inter))
    hu, _, _ = nifti.read_nifti(tmp_path / "a.nii")
    np.testing.assert_array_equal(hu, expected[::-1, ::-1, ::-1].transpose(2, 1, 0))
    assert (float(proxy.slope), float(proxy.inter)) == (0.5, -100.0)


def test_the_torso_agrees_with_its_label_map(shared_data):
    folder = shared_data / "nifti" / "torso_112"
    hu, spacing, stored = nifti.read_nifti(folder / "example_ct.nii.gz")
    labels = nifti.load_label_map(
        folder / "example_seg_fast_force_split.nii.gz", like=folder / "example_ct.nii.gz"
    )
    assert hu.shape == labels.shape == (112, 101, 122)
    assert spacing == (3.0, 3.0, 3.0) and (hu.min(), hu.max()) == (-1207, 3382)
    assert stored[0] == "111" and stored[-1] == "0"  # stored from the pelvis up

    def centre(label):
        return np.argwhere(labels == label).mean(axis=0)

    liver, spleen, bladder, lung = (centre(k) for k in (5, 1, 21, 10))
    assert liver[2] < 61 < spleen[2]  # the liver on the image's left half, the spleen right
    assert lung[0] < liver[0] < bladder[0]  # head to feet
    bone = np.argwhere(hu[60] > 300).mean(axis=0)
    assert bone[0] > 55  # the spine lies low in the picture
    assert np.median(hu[labels == 10]) < -700 and 0 < np.median(hu[labels == 5]) < 200


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (np.abs(block()) % 256, "0 to 254"),
        (block() + 1024, "424 to 1614"),
        (block().astype(np.float32) / 1000, "-0.6 to 0.59"),
        (np.where(block() == 0, np.nan, block()), "finite"),
        (block().astype(np.float32) * 1000, "-600000 to 590000"),
        (np.stack([block()] * 2, -1), r"\(4, 5, 6, 2\)"),
        (block().astype(np.complex64), "complex64"),
        (block()[:, :, 0], r"\(4, 5\)"),
    ],
)
def test_values_that_are_not_hu_are_rejected(tmp_path, values, part):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    path = write(tmp_path / "a.nii", values)
    with pytest.raises(Rejected, match=part):
        nifti.read_nifti(path)


def test_unsupported_affines_are_rejected(tmp_path):
    def reason(affine=None, **header):
        with pytest.raises(Rejected) as caught:
            nifti.check_nifti(write(tmp_path / "a.nii", block(), affine, **header))
        return str(caught.value)

    def turned(degrees):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        return np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1.0]])

    assert nifti.check_nifti(write(tmp_path / "a.nii", block(), turned(25))) == 6
    assert "40 degrees" in reason(turned(40))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[252:256] = bytes(4)  # qform_code and sform_code
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(Rejected, match="sform .*qform"):
        nifti.check_nifti(tmp_path / "a.nii")
    assert "meter" in reason(xyzt_units=1)
    assert "0.05 to 50" in reason(np.diag([0.001, 0.001, 0.001, 1]))
    image = nibabel.Nifti1Image(block(), np.eye(4))
    image.set_sform(np.diag([-1.0, 1, 1, 1]), 1)
    image.set_qform(np.eye(4), 1)
    image.to_filename(tmp_path / "a.nii")
    with pytest.raises(Rejected, match="sform and qform"):
        nifti.check_nifti(tmp_path / "a.nii")


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    flat, _, _ = nifti.read_nifti(write(tmp_path / "a.nii", block()))
    hu, _, _ = nifti.read_nifti(write(tmp_path / "b.nii", block()[..., None]))
    np.testing.assert_array_equal(hu, flat)


def test_broken_files_are_rejected(tmp_path, capfd):
    for name in ("a.nii.gz", "a.nii"):
        content = write(tmp_path / name, block()).read_bytes()
        for size in (0, 3, 40, len(content) * 2 // 3, len(content) - 9):
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(Rejected):
                nifti.read_nifti(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def flipped(content, places):
    """Yields copies of `content` with one bit flipped."""
    for place in places:
        copy = bytearray(content)
        copy[place] ^= 1 << (place % 8)
        yield bytes(copy)


def test_a_flipped_bit_in_gzip_is_rejected(tmp_path):
    # Shorter files are read to their end by chance.
    values = np.random.default_rng(0).integers(-1000, 1000, (40, 40, 50)).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", values)
    content = path.read_bytes()
    expected, *_ = nifti.read_nifti(path)
    start = content.index(b"\0", 10) + 1 if content[3] & 8 else 10  # after the name of the file
    places = [*np.linspace(start, len(content) - 9, 30).astype(int), *range(-8, 0)]
    for copy in flipped(content, places):
        path.write_bytes(copy)
        with pytest.raises(Rejected):
            nifti.read_nifti(path)
    path.write_bytes(content + bytes(64))  # padding after the stream
    np.testing.assert_array_equal(nifti.read_nifti(path)[0], expected)


def test_bytes_after_the_voxels_are_bounded(tmp_path):
    path = write(tmp_path / "a.nii", block())
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(18 << 20)))
    with pytest.raises(Rejected, match="after the voxels"):
        nifti.read_nifti(tmp_path / "a.nii.gz")


def test_voxels_inside_the_header_are_rejected(tmp_path):
    path = write(tmp_path / "a.nii", block())
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(0).tobytes()  # vox_offset
    path.write_bytes(content)
    with pytest.raises(Rejected, match="vox_offset 0 .*352"):
        nifti.check_nifti(path)


def test_an_invalid_qform_beside_a_sform_is_ignored(tmp_path):
    image = nibabel.Nifti1Image(block(), np.diag([2.0, 3, 4, 1]))
    image.header.set_qform(np.diag([2.0, 3, 4, 1]), 1)
    image.header["quatern_b"] = 1.0001
    image.to_filename(tmp_path / "a.nii")
    expected, spacing, _ = nifti.read_nifti(write(tmp_path / "b.nii", block()))
    hu, same, _ = nifti.read_nifti(tmp_path / "a.nii")
    np.testing.assert_array_equal(hu, expected)
    assert same == spacing
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[254:256] = bytes(2)  # sform_code
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(Rejected, match="broken NIfTI"):
        nifti.check_nifti(tmp_path / "a.nii")


def test_label_maps_contain_whole_numbers_only(tmp_path):
    labels = np.abs(block()).astype(np.uint8)
    hu_path = write(tmp_path / "ct.nii", block())
    path = write(tmp_path / "a.nii", labels)
    loaded = nifti.load_label_map(path, like=hu_path)
    assert loaded.dtype == np.uint16
    np.testing.assert_array_equal(loaded, labels[::-1, ::-1, ::-1].transpose(2, 1, 0))
    # nibabel stores float masks in a file of integers with a slope: 255 * float32(1 / 255).
    image = nibabel.Nifti1Image(np.minimum(labels, 1).astype(float), np.diag([2.0, 3, 4, 1]))
    image.set_data_dtype(np.uint8)
    image.to_filename(tmp_path / "slope.nii")
    assert nibabel.load(tmp_path / "slope.nii").dataobj.slope != 1
    scaled = nifti.load_label_map(tmp_path / "slope.nii")
    np.testing.assert_array_equal(scaled, np.minimum(loaded, 1))
    for wrong in (block(), block().astype(np.float32) / 7):
        with pytest.raises(Rejected, match="0 to 65535"):
            nifti.load_label_map(write(tmp_path / "b.nii", wrong))
    shifted = np.diag([2.0, 3, 4, 1])
    shifted[0, 3] = 9
    with pytest.raises(Rejected, match=r"voxel grid differs from that of .*ct\.nii: the corners"):
        nifti.load_label_map(write(tmp_path / "c.nii", labels, shifted), like=hu_path)
