"""Perturbed images on small arrays, and maps as pictures."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from maknet_jax.attribution import perturbation
from maknet_jax.ct import preprocess
from maknet_jax.errors import InputError, Rejected
from maknet_jax.figures import overlay


def image_of(plane):
    return np.repeat(np.asarray(plane, np.int16)[..., None], 3, axis=-1)


def test_neighbours_are_mirrored_at_the_regions_edge():
    image = image_of([[1, 2, 3, 90, 91, 92, 7, 8, 9]])
    region = np.array([[False] * 3 + [True] * 3 + [False] * 3])
    changed = perturbation.neighbour(image, region)
    # 90 is next to the left edge, 92 to the right one; 91 is as near to either.
    assert changed[0, :, 1].tolist()[:4] == [1, 2, 3, 2]
    assert changed[0, :, 1].tolist()[5:] == [8, 7, 8, 9]
    assert changed[0, 4, 1] in (1, 9)
    np.testing.assert_array_equal(image[0, 3:6, 0], [90, 91, 92])  # the original is untouched


def test_places_outside_the_image_take_the_edge():
    image = image_of([[4, 50, 51, 52]])
    region = np.array([[False, True, True, True]])
    assert perturbation.neighbour(image, region)[0, :, 0].tolist() == [4, 4, 4, 4]


def test_neighbours_replace_all_of_an_organ():
    rng = np.random.default_rng(0)
    plane = rng.integers(0, 100, (40, 40))
    region = (np.indices((40, 40)) - 20).__pow__(2).sum(0) < 100
    plane[region] = 1000
    changed = perturbation.neighbour(image_of(plane), region)
    assert changed.max() < 100
    np.testing.assert_array_equal(changed[~region], image_of(plane)[~region])
    assert changed[region].std() > 20  # texture, not a flat patch
    np.testing.assert_array_equal(
        perturbation.neighbour(image_of(plane), np.zeros_like(region)), image_of(plane)
    )
    with pytest.raises(Rejected):
        perturbation.neighbour(image_of(plane), np.ones_like(region))


def test_each_connected_part_gets_a_black_box():
    region = np.zeros((6, 6), bool)
    region[0, 0] = region[3, 3] = region[4, 4] = region[4, 3] = True
    changed = perturbation.patch(image_of(np.ones((6, 6))), region)
    expected = np.ones((6, 6))
    expected[0, 0] = expected[3:5, 3:5] = -1024
    np.testing.assert_array_equal(changed, image_of(expected))


def test_only_the_most_influential_pixels_are_deleted():
    attribution = np.array([[0.0, 5.0, 1.0], [-9.0, 4.0, 0.0]])
    mask = perturbation.most_influential(attribution, 1 / 3)
    assert mask.tolist() == [[False, True, False], [False, True, False]]
    # Pixels that do not raise the output are never taken.
    assert perturbation.most_influential(attribution, 1.0).sum() == 3
    image = image_of(np.ones((2, 3)))
    changed = perturbation.delete(image, mask, perturbation.make_baseline(image, "black"))
    assert (changed == -1024).all(axis=-1).tolist() == mask.tolist()
    assert changed.dtype == np.int16


def test_baselines_are_in_hu():
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (32, 32, 3)).astype(np.int16)
    assert (perturbation.make_baseline(image, "black") == -1024).all()
    assert (perturbation.make_baseline(image, "40") == 40).all()
    blurred = perturbation.make_baseline(image, "blurred")
    assert blurred.dtype == np.int16 and blurred.std() < image.std() / 4
    assert abs(float(blurred.mean()) - image.mean()) < 30
    for kind in ("white", "99999999"):
        with pytest.raises(InputError, match=kind):
            perturbation.make_baseline(image, kind)


def test_noise_in_air_is_not_a_difference():
    image = image_of([[-1024, -990, -900, 3000]])
    image[0, 0, 2] = 40  # in one channel only
    black = perturbation.make_baseline(image, "black")
    assert perturbation.differs(image, black).tolist() == [[True, False, True, True]]


def test_regions_follow_the_crop_and_the_resize():
    hu = np.full((64, 96), -1000, np.int16)
    hu[10:50, 20:90] = 0  # the body
    hu[24:32, 40:56] = 900  # inside the box and the mask
    image, crop = preprocess.make_triplet([hu, hu, hu], 32)
    bright = image[..., 1] > 450
    box = perturbation.box_region((40, 24, 56, 32), crop, 32)
    mask = perturbation.mask_region(hu == 900, crop, 32)
    for region in (box, mask):
        overlap = (region & bright).sum() / (region | bright).sum()
        assert overlap > 0.7
    assert mask.dtype == bool and box.shape == mask.shape == (32, 32)
    assert perturbation.box_region((0, 0, 5, 5), crop, 32).sum() == 0  # outside the crop


def test_colours_show_sign_and_magnitude():
    attribution = np.array([[1.0, -1.0], [0.0, 0.25]])
    rgba = overlay.colours(attribution, 1.0)
    assert tuple(rgba[0, 0]) == (*overlay.RAISES, 255)
    assert tuple(rgba[0, 1]) == (*overlay.LOWERS, 255)
    assert rgba[1, 0, 3] == 0 and 0 < rgba[1, 1, 3] < 255
    grey = np.full((2, 2), 100, np.uint8)
    mixed = overlay.over(grey, rgba)
    assert tuple(mixed[0, 0]) == overlay.RAISES and tuple(mixed[1, 0]) == (100,) * 3
    assert overlay.scale_of(np.zeros((4, 4))) == 1.0
    spike = np.ones((100, 100))
    spike[0, 0] = 1e6
    assert overlay.scale_of(spike) == 1.0  # one pixel does not hide the rest


def test_pictures_become_data_uris():
    picture = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    head, data = overlay.to_uri(picture, lossy=False).split(",")
    assert head == "data:image/png;base64"
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(read, picture)
    assert overlay.to_uri(np.zeros((4, 4, 4), np.uint8)).startswith("data:image/webp;base64,")
