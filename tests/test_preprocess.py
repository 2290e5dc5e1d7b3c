"""From slices to network input: padding, the crop around the body, triplets."""

import numpy as np
import pytest

from maknet_jax.ct import png, preprocess, search, volumes

S = 256


def air():
    return np.full((S, S), -1000, np.int16)


def ellipse(hu, row, column, height, width, value):
    rows, columns = np.ogrid[:S, :S]
    hu[((rows - row) / height) ** 2 + ((columns - column) / width) ** 2 <= 1] = value
    return hu


def body():
    """Rows 60 to 180, columns 50 to 206, with lungs."""
    hu = ellipse(air(), 120, 128, 60, 78, 40)
    ellipse(hu, 115, 90, 35, 22, -850)
    return ellipse(hu, 115, 166, 35, 22, -850)


def near(box, expected, margin=8):
    return np.abs(np.subtract(box, expected)).max() <= margin


BODY = (60, 50, 181, 207)


def test_padding_becomes_air_and_other_hu_are_unchanged():
    hu = np.array([-32768, -3024, -2048, -2000, -1999, -1025, -1024, -1, 0, 3071, 32767], np.int16)
    cleaned = preprocess.clean(hu)
    assert cleaned.dtype == np.int16
    np.testing.assert_array_equal(
        cleaned, [-1024, -1024, -1024, -1024, -1024, -1024, -1024, -1, 0, 3071, 32767]
    )


def test_the_box_contains_the_body_with_its_lungs():
    top, left, bottom, right = box = preprocess.body_box(body())
    assert near(box, BODY)
    assert top <= 60 and left <= 50 and bottom >= 181 and right >= 207


def test_a_box_does_not_depend_on_the_resolution():
    small = body()[::2, ::2]
    assert near(np.multiply(preprocess.body_box(small), 2), BODY)


@pytest.mark.parametrize("gap", [20, 3, 0])
def test_a_table_is_excluded_whether_it_touches_the_body_or_not(gap):
    hu = body()
    hu[181 + gap : 184 + gap, 20:236] = 100  # a shell
    hu[184 + gap : 204 + gap, 20:236] = -900  # foam
    hu[204 + gap : 207 + gap, 20:236] = 100
    assert near(preprocess.body_box(hu), BODY)


def test_a_thick_table_is_excluded():
    hu = body()
    hu[190:210, 10:246] = -200
    assert near(preprocess.body_box(hu), BODY)


def test_blankets_and_tubes_are_excluded():
    hu = body()
    hu[40:42, 30:220] = -100
    hu[42:150, 228:230] = -100
    assert near(preprocess.body_box(hu), BODY)


def test_both_legs_and_both_arms_are_included():
    legs = ellipse(ellipse(air(), 120, 80, 40, 38, 40), 122, 178, 36, 36, 40)
    assert near(preprocess.body_box(legs), (80, 42, 161, 215))
    arms = ellipse(ellipse(body(), 130, 24, 20, 16, 40), 130, 232, 20, 16, 40)
    assert near(preprocess.body_box(arms), (60, 8, 181, 249))


@pytest.mark.parametrize("value", [-1024, -3024, 40])
def test_a_constant_slice_is_not_cropped(value):
    assert preprocess.body_box(np.full((S, 200), value, np.int16)) == (0, 0, S, 200)


def test_a_body_clipped_to_a_display_window_is_cropped_without_its_mattress():
    hu = np.clip(body(), -175, 275)
    hu[182:190, 20:236] = -172  # a mattress, just above black
    threshold = preprocess.body_threshold(hu, (-175, 275))
    assert -175 < threshold < -160
    assert near(preprocess.body_box(hu, threshold=threshold), BODY)
    assert not near(preprocess.body_box(hu), BODY)
    # Unclipped CT keeps the usual threshold even if a window is passed.
    assert preprocess.body_threshold(body(), (-175, 275)) < -175


@pytest.mark.parametrize("value", [-1024, -317, 0, 1500])
def test_a_constant_slice_keeps_its_value(value):
    image, box = preprocess.make_triplet([np.full((70, 50), value, np.int16)] * 3, 32)
    assert box == (0, 0, 70, 50)
    assert image.shape == (32, 32, 3) and image.dtype == np.int16
    assert (image == value).all()


def test_an_uncropped_slice_of_the_right_size_is_exact():
    hu = np.random.default_rng(0).integers(-400, 3000, (64, 64)).astype(np.int16)
    image, box = preprocess.make_triplet([hu, hu, hu], 64)
    assert box == (0, 0, 64, 64)
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], hu)


def test_halving_a_ramp_gives_its_means():
    # Antialiased bilinear resizing keeps a linear ramp linear, except at the edges.
    ramp = np.tile(np.arange(64, dtype=np.int16) * 10, (64, 1))
    small = preprocess.resize(ramp, (0, 0, 64, 64), 32)
    np.testing.assert_allclose(small[:, 2:-2], np.tile(np.arange(2, 30) * 20 + 5, (32, 1)), atol=1)


def test_a_crop_contains_the_pixels_of_the_box():
    hu = np.random.default_rng(1).integers(-1000, 1000, (80, 90)).astype(np.int16)
    np.testing.assert_array_equal(preprocess.resize(hu, (10, 20, 42, 52), 32), hu[10:42, 20:52])


def test_channels_run_from_head_to_feet_and_share_the_box_of_the_middle():
    first, last = np.roll(body(), -40, axis=0), np.roll(body(), 40, axis=0)
    image, box = preprocess.make_triplet([first, body(), last], 32)
    assert box == preprocess.body_box(body())
    for channel, hu in enumerate((first, body(), last)):
        np.testing.assert_array_equal(image[..., channel], preprocess.resize(hu, box, 32))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (1, []), (2, []), (3, [1]), (5, [1]), (6, [1, 4]), (112, list(range(1, 110, 3)))],
)
def test_centres_without_overlap_use_every_slice_at_most_once(count, expected):
    centres = list(preprocess.centres(count, overlap=False))
    assert centres == expected and len(centres) == count // 3
    used = [centre + offset for centre in centres for offset in (-1, 0, 1)]
    assert used == list(range(3 * (count // 3)))
    assert list(preprocess.centres(count, overlap=True)) == list(range(count))


def test_neighbours_repeat_the_edge():
    hu = np.arange(4, dtype=np.int16)[:, None, None]
    triplets = [[int(plane[0, 0]) for plane in preprocess.neighbours(hu, k)] for k in range(4)]
    assert triplets == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    assert [int(plane[0, 0]) for plane in preprocess.neighbours(hu[:1], 0)] == [0, 0, 0]


def runs(line):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line.view(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def rows_of_body_and_table(hu):
    """(last row of the back, first row of the table) in the middle columns of a slice.

    Tables are thin shells around foam: the last runs of dense rows, each of 3 to 10 rows of 512.
    """
    dense = hu > -500
    middle = int(np.flatnonzero(dense.sum(0) > 0.25 * len(hu)).mean())
    half = hu.shape[1] // 64
    bands = runs(dense[:, middle - half : middle + half + 1].mean(1) > 0.5)
    thin = 10 * len(hu) / 512
    body = max(k for k, (start, stop) in enumerate(bands) if stop - start > thin)
    shells = [start for start, stop in bands[body + 1 :] if stop - start >= 0.006 * len(hu)]
    return bands[body][1], shells[0]


def test_the_real_table_lies_outside_the_box(shared_data):
    (ref,), _ = search.find_series(shared_data / "dicom" / "liver_j2k_20")
    slices = list(volumes.load_series(ref).hu[::5])
    flat = sorted((shared_data / "deeplesion" / "key_slices_flat").glob("*.png"))
    slices += [png.read_png(path) for path in flat[::3]]
    for hu in slices:
        back, table = rows_of_body_and_table(hu)
        bottom = preprocess.body_box(hu)[2]
        assert table > back + 10, "the test did not locate the table"
        assert back <= bottom < table


def test_the_box_of_a_real_series_does_not_jump(shared_data):
    # Both arms touch the body in some slices only; a box with one arm would shift the middle.
    (ref,), _ = search.find_series(shared_data / "dicom" / "liver_j2k_20")
    boxes = np.array([preprocess.body_box(hu) for hu in volumes.load_series(ref).hu])
    assert np.ptp(boxes, axis=0).max() <= 8


def test_the_real_torso_is_cropped_at_its_back(shared_data):
    path = shared_data / "nifti" / "torso_112" / "example_ct.nii.gz"
    volume, _ = volumes.load_series_of(path)
    # The patient lies in a curved table, which merges with the back at the midline. Its wings do
    # not: they alone reach the last rows and are the same in all slices.
    wings = (volume.hu > -800).all(0).any(1)
    assert wings[-3:].all() and not (volume.hu[:, -2:, 30:90] > -500).any()
    for hu in volume.hu[::8]:
        dense = (hu > -500).sum(1)
        back = int(np.flatnonzero(dense > 0.3 * hu.shape[1])[-1])
        bottom = preprocess.body_box(hu)[2]
        assert back <= bottom <= min(back + 4, 99)
