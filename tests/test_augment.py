"""The window and the student's noise: identities, and scipy as an independent reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from maknet_jax.errors import InputError
from maknet_jax.training import augment

S = 32
OFF = {
    "rotation_probability": 0.0,
    "rotation_degrees": 15.0,
    "crop_probability": 0.0,
    "crop_scale": (0.5, 1.0),
    "crop_aspect": (0.75, 4 / 3),
    "contrast_probability": 0.0,
    "grayscale_probability": 0.0,
    "translation_probability": 0.0,
    "translation_range": 0.1,
}
ON = OFF | {
    "rotation_probability": 0.5,
    "crop_probability": 0.5,
    "contrast_probability": 0.5,
    "grayscale_probability": 0.5,
    "translation_probability": 0.5,
}
MIDDLE = jnp.array([0.5, 0.5])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 1, (8, S, S, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(3), 8)


def geometry(image, angle=0.0, scale=1.0, aspect=1.0, centre=MIDDLE, **options):
    return np.asarray(augment.rotate_and_crop(image, angle, scale, aspect, centre, **options))


REACHES = {"gather": None, "shear": math.radians(45)}


def smooth(size=S):
    noise = np.random.default_rng(1).uniform(0, 1, (size, size, 3))
    return ndimage.gaussian_filter(noise, (3, 3, 0)).astype(np.float32)


def test_the_window_maps_low_to_0_and_high_to_1():
    hu = jnp.array([-3000, -1024, -1023, 0, 1023, 1024, 3071], jnp.int16)
    unit = np.asarray(augment.to_unit(hu, (-1024.0, 1024.0)))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [0, 0, 1 / 2048, 0.5, 2047 / 2048, 1, 1], rtol=1e-6)
    # LesaNet's window: its 0..255 over -1024..3071 HU is one grey level per 16 HU.
    np.testing.assert_allclose(augment.to_unit(jnp.int16(3071), (-1024.0, 3071.0)), 1, rtol=1e-6)


def test_angle_0_without_a_crop_is_the_identity(images):
    np.testing.assert_allclose(geometry(images[0]), images[0], atol=1e-6)
    # A crop of the whole image has no room to move in.
    np.testing.assert_allclose(geometry(images[0], centre=jnp.zeros(2)), images[0], atol=1e-6)


@pytest.mark.parametrize("quarter", [1, 2, 3, -1])
def test_quarter_turns_equal_rot90_which_is_counter_clockwise(images, quarter):
    turned = geometry(images[0], angle=quarter * np.pi / 2)
    np.testing.assert_allclose(turned, np.rot90(images[0], quarter), atol=1e-4)


@pytest.mark.parametrize("degrees", [-40, -7, 3, 15])
def test_rotation_equals_scipys(degrees):
    image = smooth()
    turned = geometry(image, angle=np.deg2rad(degrees))
    expected = ndimage.rotate(image, degrees, axes=(0, 1), reshape=False, order=1, mode="constant")
    # Only the convention for the last half pixel differs.
    inside = ndimage.rotate(np.ones((S, S)), degrees, reshape=False, order=1) > 0.999
    assert inside.mean() > 0.5
    np.testing.assert_allclose(turned[inside], expected[inside], atol=1e-4)
    assert geometry(np.ones((S, S, 3), np.float32), angle=np.deg2rad(30))[0, 0, 0] == 0


@pytest.mark.parametrize("degrees", [0, 15, -15, 40])
@pytest.mark.parametrize(
    "scale, centre, shift",
    [(1.0, (0.5, 0.5), None), (0.6, (0.1, 0.9), None), (0.6, (0.1, 0.9), (-0.09, 0.23))],
)
def test_shears_equal_the_gathered_form(degrees, scale, centre, shift):
    """They interpolate three more times, so a smooth image is compared; the frame is exact."""
    image = smooth()
    shift = None if shift is None else jnp.array(shift)
    where = (math.radians(degrees), scale, 1.1, jnp.array(centre))
    gathered = geometry(image, *where, shift=shift)
    sheared = geometry(image, *where, shift=shift, reach=math.radians(45))
    assert np.abs(gathered - image).max() > 0.1 or (degrees, scale) == (0, 1.0)
    np.testing.assert_array_equal(gathered == 0, sheared == 0)
    np.testing.assert_allclose(sheared, gathered, atol=0.035)
    assert np.abs(sheared - gathered).mean() < 0.004


@pytest.mark.parametrize("reach", [3, 8, 21])
def test_shifted_rows_equal_numpys_interpolation_with_0_outside(reach):
    """Fractions, halves, whole strides and both ends, each row its own."""
    shift = np.float32([-1, -0.7, -0.5, -0.2, 0, 0.1, 0.25, 0.5, 0.9, 1]) * reach
    shift = np.append(shift, np.float32([4, 4.5, 8, -8, 7.99])).clip(-reach, reach)
    image = np.random.default_rng(0).uniform(0, 1, (len(shift), 20, 3)).astype(np.float32)
    shifted = np.asarray(augment._shift_rows(jnp.asarray(image), jnp.asarray(shift), reach))
    wide = np.pad(image, ((0, 0), (1, 1), (0, 0)))
    for row, by in enumerate(shift):
        for channel in range(3):
            places = np.arange(20) + by
            expected = np.interp(places, np.arange(-1, 21), wide[row, :, channel])
            np.testing.assert_allclose(shifted[row, :, channel], expected, atol=1e-5)


@pytest.mark.parametrize(
    "count, devices, few",
    [(8, 1, 8), (8, 4, 8), (16, 1, 8), (24, 4, 24), (48, 4, 24), (22, 2, 2), (5, 2, 5), (0, 1, 0)],
)
def test_the_loop_equals_augmenting_all_at_once(monkeypatch, count, devices, few):
    """22 images on 2 devices are augmented one by one (11 is prime), 5 on 2 all at once."""
    rng = np.random.default_rng(0)
    images = rng.integers(-1000, 2000, (count, S, S, 3)).astype(np.int16)
    keys = jax.random.split(jax.random.key(0), count)

    def to_input(images):
        return augment.to_unit(images, (-1024.0, 3071.0))

    sizes = []

    def counting(images):
        sizes.append(len(images))
        return to_input(images)

    looped = augment.make_augment(**ON, form="shear", to_input=counting, devices=devices)
    monkeypatch.setattr(augment, "_few_at_a_time", lambda augment, devices: augment)
    whole = augment.make_augment(**ON, form="shear")
    expected = whole(to_input(images), keys)
    np.testing.assert_allclose(looped(images, keys), expected, atol=1e-5)
    assert set(sizes) == {few}


@pytest.mark.parametrize("form", ["gather", "shear"])
def test_integer_images_need_to_input_and_the_result_is_float32(form, images, keys):
    noise = augment.make_augment(**OFF | {"grayscale_probability": 0.5}, form=form)
    with pytest.raises(InputError, match="int16"):
        noise(np.zeros((8, S, S, 3), np.int16), keys)
    assert noise(jnp.asarray(images, jnp.bfloat16), keys).dtype == jnp.float32


def test_the_loop_has_no_communication_between_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    noise = augment.make_augment(**ON, form="shear", devices=8)
    images = np.random.default_rng(0).uniform(0, 1, (128, S, S, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 128)
    program = jax.jit(noise, in_shardings=rows, out_shardings=rows).lower(images, keys).compile()
    text = program.as_text()
    assert " while(" in text
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text
    spread = program(*jax.device_put((images, keys), rows))
    np.testing.assert_allclose(spread, jax.jit(noise)(images, keys), atol=1e-5)


def test_shears_by_angle_0_keep_every_pixel(images):
    whole = (0.0, 1.0, 1.0, MIDDLE)
    unchanged = augment.rotate_and_crop(images[0], *whole, reach=math.radians(15))
    np.testing.assert_allclose(unchanged, images[0], atol=1e-6)


def test_the_platform_chooses_the_form_of_the_rotation(images, keys):
    gather, shear, auto = (
        augment.make_augment(**ON | {"contrast_probability": 0.0}, form=form)(images, keys)
        for form in ("gather", "shear", "auto")
    )
    np.testing.assert_array_equal(auto, gather)
    assert 0 < np.abs(shear - gather).mean() < 0.1
    for wrong, named in ({"form": "warp"}, "warp"), ({"rotation_degrees": 200.0}, "200"):
        with pytest.raises(InputError, match=named):
            augment.make_augment(**ON | wrong)
    with pytest.raises(InputError, match="rotation_degrees 91"):
        augment.make_augment(**ON | {"rotation_degrees": 91.0}, form="shear")


@pytest.mark.parametrize("form", ["gather", "shear"])
@pytest.mark.parametrize("down, right", [(3, 0), (0, -5), (-2, 7), (0, 0), (-S + 1, 0)])
def test_a_shift_by_whole_pixels_moves_the_image_and_fills_with_air(images, form, down, right):
    shift = jnp.array([down, right]) / S
    shifted = geometry(images[0], shift=shift, reach=REACHES[form])
    expected = np.zeros_like(images[0])
    expected[max(down, 0) : S + down, max(right, 0) : S + right] = images[0][
        max(-down, 0) : S - down, max(-right, 0) : S - right
    ]
    np.testing.assert_allclose(shifted, expected, atol=1e-5)
    np.testing.assert_array_equal(shifted == 0, expected == 0)


@pytest.mark.parametrize("form", ["gather", "shear"])
@pytest.mark.parametrize("shift", [(0.4, 0.0), (-2.75, 1.25)])
def test_a_shift_by_fractions_of_a_pixel_equals_scipys(form, shift):
    image = smooth()
    shifted = geometry(image, shift=jnp.array(shift) / S, reach=REACHES[form])
    expected = ndimage.shift(image, (*shift, 0), order=1, mode="nearest")
    # 1/256 pixel of rounding; the outermost half pixel is not blended with air.
    np.testing.assert_allclose(shifted[shifted > 0], expected[shifted > 0], atol=1e-3)
    outside = [math.ceil(abs(by) - 0.5) for by in shift]
    assert (shifted == 0).sum() == 3 * (S * S - (S - outside[0]) * (S - outside[1]))


@pytest.mark.parametrize("form", ["gather", "shear"])
def test_an_image_is_rotated_then_shifted_then_cropped(form):
    image, angle, shift = smooth(), math.radians(20), jnp.array([5, -3]) / S
    crop = {"scale": 0.5, "aspect": 1.0, "centre": jnp.array([0.2, 0.7])}
    steps = image
    for options in ({"angle": angle}, {"shift": shift}, crop):
        steps = geometry(steps, **options, reach=REACHES[form])
    at_once = geometry(image, angle, **crop, shift=shift, reach=REACHES[form])
    # Step by step, air is blended into the edge of the image.
    inside = ndimage.binary_erosion((at_once > 0) & (steps > 0), np.ones((7, 7, 1)))
    assert inside.mean() > 0.3
    np.testing.assert_allclose(at_once[inside], steps[inside], atol=0.05)
    assert np.abs(at_once - steps)[inside].mean() < 0.005


@pytest.mark.parametrize("form", ["gather", "shear"])
def test_translations_are_uniform_within_their_range(form):
    """The centre of a square moves by 0 on average, by at most the range, and not further."""
    image = np.zeros((1, S, S, 3), np.float32)
    image[:, 12:20, 12:20] = 1  # its centre is that of the image
    options = {"translation_probability": 1.0, "translation_range": 0.25}
    noise = jax.jit(augment.make_augment(**OFF | options, form=form))
    count = 512
    moved = noise(np.repeat(image, count, axis=0), jax.random.split(jax.random.key(2), count))
    weight = np.asarray(moved)[..., 0]
    np.testing.assert_allclose(weight.sum((1, 2)), 64, rtol=1e-3)  # nothing leaves the frame
    grid = np.arange(S) - (S - 1) / 2
    centres = np.stack([weight.sum(2) @ grid, weight.sum(1) @ grid], axis=1) / 64
    assert np.abs(centres).max() <= 8.01 and np.abs(centres).max() > 7.9
    np.testing.assert_allclose(centres.mean(0), 0, atol=3 * 8 / math.sqrt(3 * count))
    np.testing.assert_allclose(centres.std(0), 8 / math.sqrt(3), rtol=0.1)
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.15


@pytest.mark.parametrize("form", ["gather", "shear"])
def test_translation_does_not_change_the_other_draws(images, keys, form):
    without = augment.make_augment(**ON | {"translation_probability": 0.0}, form=form)
    by_nothing = {"translation_probability": 1.0, "translation_range": 0.0}
    within = augment.make_augment(**ON | by_nothing, form=form)
    np.testing.assert_allclose(within(images, keys), without(images, keys), atol=1e-5)


@pytest.mark.parametrize("wrong", [-0.1, 1.0])
def test_a_translation_range_out_of_bounds_is_refused(wrong):
    with pytest.raises(InputError, match=f"translation_range {wrong}"):
        augment.make_augment(**ON | {"translation_range": wrong})


def test_a_crop_of_half_the_size_shows_the_rectangle(images):
    # A quarter of the area in a corner: rows 0..16, columns 16..32, twice as large.
    corner = geometry(images[0], scale=0.25, centre=jnp.array([0.0, 1.0]))
    rectangle = images[0][:16, 16:]
    expected = ndimage.map_coordinates(
        rectangle[..., 0], np.mgrid[:S, :S] / 2 - 0.25, order=1, mode="nearest"
    )
    # Where the crop ends inside the image, its last half pixel takes part of the next.
    np.testing.assert_allclose(corner[:-1, 1:, 0], expected[:-1, 1:], atol=1e-5)


def test_aspect_is_width_over_height():
    rows, columns = np.mgrid[:S, :S].astype(np.float32)
    ramps = np.stack([rows, columns, rows], -1)
    wide = geometry(ramps, scale=0.25, aspect=4.0)
    # The whole width, a quarter of the height, in the middle.
    np.testing.assert_allclose(wide[0, :, 1], np.arange(S), atol=1e-4)
    np.testing.assert_allclose(wide[[0, -1], 5, 0], [12 - 0.375, 20 - 0.625], atol=1e-4)


def test_auto_contrast_reaches_from_0_to_1(images):
    image = jnp.asarray(images[0]) * 0.3 + 0.2
    stretched = np.asarray(augment.auto_contrast(image))
    assert stretched.min() == 0 and stretched.max() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(np.argsort(stretched.ravel()), np.argsort(np.ravel(image)))
    np.testing.assert_allclose(augment.auto_contrast(jnp.asarray(stretched)), stretched, atol=1e-6)
    flat = jnp.full((4, 4, 3), 0.4)
    np.testing.assert_array_equal(augment.auto_contrast(flat), flat)


def test_grayscale_shows_the_middle_slice_three_times(images):
    gray = np.asarray(augment.grayscale(jnp.asarray(images[0])))
    assert gray.shape == (S, S, 3)
    for channel in range(3):
        np.testing.assert_array_equal(gray[..., channel], images[0][..., 1])


def test_zero_probabilities_disable_augmentation():
    assert augment.make_augment(**OFF) is None
    assert augment.make_augment(**(OFF | {"grayscale_probability": 0.1})) is not None


@pytest.mark.parametrize(
    "one",
    [name for name in OFF if name.endswith("probability")],
)
def test_each_noise_acts_alone_with_its_probability(one, images):
    noise = jax.jit(augment.make_augment(**(OFF | {one: 0.5})))
    many = np.tile(images[:1] * 0.5, (256, 1, 1, 1))
    changed = np.asarray(noise(many, jax.random.split(jax.random.key(0), 256)))
    share = (np.abs(changed - many).max(axis=(1, 2, 3)) > 1e-3).mean()
    assert 0.4 < share < 0.6
    if one == "grayscale_probability":
        gray = np.abs(changed - many[..., 1:2]).max(axis=(1, 2, 3)) == 0
        assert gray.mean() == share


def test_the_noise_of_an_example_does_not_depend_on_its_row(images, keys):
    noise = jax.jit(augment.make_augment(**ON))
    whole = np.asarray(noise(images, keys))
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(noise(images[order], keys[order]), whole[order])
    np.testing.assert_allclose(noise(images[2:4], keys[2:4]), whole[2:4], atol=1e-6)
    assert (np.abs(whole - images).max(axis=(1, 2, 3)) > 1e-3).sum() >= 4


def test_noise_depends_on_the_key_only(images, keys):
    noise = jax.jit(augment.make_augment(**(ON | {"rotation_probability": 1.0})))
    np.testing.assert_array_equal(noise(images, keys), noise(images, keys))
    assert np.abs(noise(images, keys) - noise(images, keys[::-1])).max() > 0.1


def test_crops_stay_inside_the_image():
    wild = OFF | {"crop_probability": 1.0, "crop_scale": (0.05, 1.0), "crop_aspect": (0.1, 10.0)}
    noise = jax.jit(augment.make_augment(**wild))
    white = jnp.ones((128, S, S, 3))
    np.testing.assert_allclose(noise(white, jax.random.split(jax.random.key(1), 128)), 1, atol=1e-6)


def test_values_stay_between_0_and_1(images, keys):
    noisy = np.asarray(jax.jit(augment.make_augment(**ON))(images, keys))
    assert noisy.min() >= 0 and noisy.max() <= 1 + 1e-6
    assert noisy.dtype == np.float32 and noisy.shape == images.shape
