"""Windowing and the student's noise, on the device inside the jitted step (paper, section 4.2).

Every random choice is drawn from one key an example, which the step derives from (seed, step,
example): the same example at the same step is changed in the same way on any mesh.
"""

import math

import jax
import jax.numpy as jnp

from maknet_jax.errors import InputError

_STRIDE = 8  # of the coarse part of a shift in pixels: about the root of how far shears reach
_AT_ONCE = 8  # images; on v5e 8 of 256 x 256 fit into the fast memory, 16 do not


def to_unit(image, window):
    """HU -> [0, 1] float32: `window` (low, high) in HU, as LesaNet maps it to 0..255.

    Args:
      image: int16 `[..., S, S, 3]` in HU.
      window: (low, high) in HU; values outside are clipped. Black, the baseline of attributions,
        is `low`.
    """
    low, high = window
    return jnp.clip((image.astype(jnp.float32) - low) * (1.0 / (high - low)), 0.0, 1.0)


def rotate_and_crop(image, angle, scale, aspect, centre, *, reach=None):
    """Rotates and crops, bilinear, in one of two forms.

    With `reach` None every pixel is gathered from its four neighbours: one interpolation. TPUs
    gather slowly: there the rotation is three shears (Paeth 1986), each two sums over shifted
    copies, and the crop two small matrix products. The pictures are the same but for the blur of
    interpolating three times more.

    Args:
      image: float32 `[S, S, C]`.
      angle: radians, counter-clockwise.
      scale: the share of the area that is kept, 1 keeps all.
      aspect: width over height of the crop.
      centre: `[2]` in [0, 1]: where the crop lies in the room that it leaves (row, column).
      reach: the largest angle in radians, a Python float, for the second form.

    Returns:
      float32 `[S, S, C]`; what lies outside the image is 0, black.
    """
    size = image.shape[0]
    height = jnp.sqrt(scale / aspect)
    width = jnp.sqrt(scale * aspect)
    # Coordinates in [-1, 1] over the crop, then in the image, then turned around its middle.
    line = (jnp.arange(size) + 0.5) / size * 2 - 1
    rows = line * height + (2 * centre[0] - 1) * (1 - height)
    columns = line * width + (2 * centre[1] - 1) * (1 - width)
    row, column = jnp.meshgrid(rows, columns, indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned_row = cos * row + sin * column
    turned_column = -sin * row + cos * column
    # Within its outermost half pixel the image is not blended with what lies outside: a crop at
    # the edge would get a dark seam.
    inside = jnp.maximum(jnp.abs(turned_row), jnp.abs(turned_column)) <= 1 + 1e-5
    if reach is None:
        places = ((turned + 1) / 2 * size - 0.5 for turned in (turned_row, turned_column))
        changed = _bilinear(image, *places)
    else:
        places = ((line + 1) / 2 * size - 0.5 for line in (rows, columns))
        changed = _crop(_shear_thrice(image, angle, reach), *places)
    return jnp.where(inside[..., None], changed, 0.0)


def _hat(distance):
    """The weight of a neighbour at this distance in linear interpolation."""
    return jnp.maximum(0.0, 1 - jnp.abs(distance))


def _shear_thrice(image, angle, reach):
    """The rotation of `[S, S, C]` by `angle`, at most `reach`; the edge is repeated outside."""
    half = image.shape[0] / 2 + 1
    wide = math.ceil(math.tan(reach / 2) * half)
    high = math.ceil(math.sin(reach) * (half + wide))
    # Between the first and the last shear columns beside the image are needed too.
    image = jnp.pad(image, ((1, 1), (wide, wide), (0, 0)), "edge")
    rows, columns = (jnp.arange(edge) - (edge - 1) / 2 for edge in image.shape[:2])
    image = _shift_rows(image, -jnp.tan(angle / 2) * rows, wide)
    image = _shift_rows(image.swapaxes(0, 1), jnp.sin(angle) * columns, high).swapaxes(0, 1)
    image = _shift_rows(image, -jnp.tan(angle / 2) * rows, wide)
    return image[1:-1, wide : image.shape[1] - wide]


def _shift_rows(image, shift, reach):
    """out[r, c] = image[r, c + shift[r]], linearly, `shift` up to `reach`; 0 from outside.

    First by whole multiples of 8, chosen for each row, then by what is left, as a sum.
    """
    coarse = jnp.round(shift / _STRIDE)
    left = shift - coarse * _STRIDE  # at most half a stride, whose neighbours lie one further
    most, rest = math.ceil(reach / _STRIDE), _STRIDE // 2 + 1
    width = image.shape[1] + 2 * rest
    first = most * _STRIDE
    padded = jnp.pad(image, ((0, 0), (first + rest, first + rest), (0, 0)))
    near = jnp.zeros_like(padded[:, :width])
    for multiple in range(-most, most + 1):
        start = first + multiple * _STRIDE
        there = (coarse == multiple)[:, None, None]
        near = jnp.where(there, padded[:, start : start + width], near)
    return sum(
        _hat(left - whole)[:, None, None] * near[:, rest + whole : rest + whole + image.shape[1]]
        for whole in range(-rest + 1, rest)
    )


def _crop(image, rows, columns):
    """The outer product of two linear interpolations: out[i, j] = image[rows[i], columns[j]]."""
    grid = jnp.arange(image.shape[0])
    down, across = (
        _hat(jnp.clip(places, 0, image.shape[0] - 1)[:, None] - grid) for places in (rows, columns)
    )
    return jnp.einsum("ir,jc,rck->ijk", down, across, image)


def _bilinear(image, row, column):
    """Values of `[S, S, C]` at fractional places, the edge repeated."""
    size = image.shape[0]
    row, down = _first_and_share(row, size)
    column, across = _first_and_share(column, size)
    corner = row * size + column
    pixels = jnp.asarray(image).reshape(size * size, -1)
    above, right, below, both = (
        pixels.at[corner + step].get(mode="clip") for step in (0, 1, size, size + 1)
    )
    return (above * (1 - across) + right * across) * (1 - down) + (
        below * (1 - across) + both * across
    ) * down


def _first_and_share(place, size):
    """The first of a place's two neighbours and the share of the second; at the end it is 1.

    Places are taken to 1/256 of a pixel, as texture units take them. XLA may compute a place more
    than once, with other last bits; whole pixels (a crop of full width, or none) would then be
    rounded down for one neighbour and not for another, a shift by a pixel.
    """
    place = jnp.round(place * 256) / 256
    first = jnp.clip(jnp.floor(place), 0, size - 2)
    return first.astype(jnp.int32), jnp.clip(place - first, 0, 1)[..., None]


def auto_contrast(image):
    """Stretches `[S, S, C]` so that its darkest value is 0 and its brightest 1; flat stays."""
    low, high = image.min(), image.max()
    span = high - low
    return jnp.where(span > 1e-6, (image - low) / jnp.maximum(span, 1e-6), image)


def grayscale(image):
    """All channels become the middle slice: `[S, S, 3]` -> `[S, S, 3]`."""
    return jnp.broadcast_to(image[..., 1:2], image.shape)


def make_augment(
    *,
    rotation_probability,
    rotation_degrees,
    crop_probability,
    crop_scale,
    crop_aspect,
    contrast_probability,
    grayscale_probability,
    form="auto",
    to_input=None,
    devices=1,
):
    """The noise as one callable, or None where all of it is off.

    In the form "shear" a loop takes a few images of every device at a time, as many as divide its
    share, at most 8: at 256 x 256 and 15 degrees they stay in a TPU v5e's fast memory, and main
    memory is read and written once.

    Args:
      rotation_probability: how often an image is turned.
      rotation_degrees: the largest angle to either side.
      crop_probability: how often a random resized crop is taken.
      crop_scale: (least, most) share of the area kept, in (0, 1].
      crop_aspect: (least, most) width over height; drawn log-uniformly.
      contrast_probability: how often auto-contrast is applied.
      grayscale_probability: how often all channels become the middle slice.
      form: of the rotation, "gather" or "shear"; "auto" shears on TPUs. See `rotate_and_crop`.
      to_input: images -> float32 in [0, 1], applied first; None: they are that already.
      devices: over which the images lie in equal parts, one after the other.

    Raises:
      InputError: a range is empty or out of bounds; later, that integers came without `to_input`.

    Returns:
      augment(images [B, S, S, 3], keys [B]) -> float32 of the same shape.
    """
    for name, (low, high) in {"crop_scale": crop_scale, "crop_aspect": crop_aspect}.items():
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            raise InputError(f"augment {name} ({low}, {high}) should ascend above 0, a scale to 1")
    if form not in ("auto", "gather", "shear") or not 0 <= rotation_degrees <= 180:
        raise InputError(
            f"augment form {form!r} should be auto, gather or shear, and rotation_degrees "
            f"{rotation_degrees} between 0 and 180"
        )
    if form == "auto":
        form = "shear" if jax.default_backend() == "tpu" else "gather"
    reach = math.radians(rotation_degrees) if form == "shear" else None
    if reach is not None and rotation_degrees > 90:
        raise InputError(f"rotation_degrees {rotation_degrees} should be 90 or less with shears")
    geometry = rotation_probability > 0 or crop_probability > 0
    if not geometry and contrast_probability <= 0 and grayscale_probability <= 0:
        return None

    def one(image, key):
        turn, angle, crop, scale, aspect, centre, contrast, gray = jax.random.split(key, 8)
        if geometry:
            turned = jax.random.bernoulli(turn, rotation_probability)
            limit = math.radians(rotation_degrees)
            angle = jax.random.uniform(angle, minval=-limit, maxval=limit) * turned
            cropped = jax.random.bernoulli(crop, crop_probability)
            scale = jax.random.uniform(scale, minval=crop_scale[0], maxval=crop_scale[1])
            logs = jnp.log(jnp.asarray(crop_aspect))
            aspect = jnp.exp(jax.random.uniform(aspect, minval=logs[0], maxval=logs[1]))
            # A crop cannot be wider or higher than the image.
            aspect = jnp.clip(aspect, scale, 1 / scale)
            image = rotate_and_crop(
                image,
                angle,
                jnp.where(cropped, scale, 1.0),
                jnp.where(cropped, aspect, 1.0),
                jax.random.uniform(centre, (2,)),
                reach=reach,
            )
        if contrast_probability > 0:
            stretched = jax.random.bernoulli(contrast, contrast_probability)
            image = jnp.where(stretched, auto_contrast(image), image)
        if grayscale_probability > 0:
            flat = jax.random.bernoulli(gray, grayscale_probability)
            image = jnp.where(flat, grayscale(image), image)
        return image

    def augment(images, keys):
        if to_input is not None:
            images = to_input(images)
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images to augment are {images.dtype}: give to_input, or [0, 1]")
        return jax.vmap(one)(images.astype(jnp.float32), keys)

    return augment if form == "gather" else _few_at_a_time(augment, devices)


def _few_at_a_time(augment, devices):
    """The same, in a loop over at most `_AT_ONCE` images of every device."""

    def looped(images, keys):
        each, beside = divmod(len(images), devices)
        if beside or not each:
            return augment(images, keys)
        few = max(count for count in range(1, _AT_ONCE + 1) if each % count == 0)
        # The first axis stays split over the devices; the loop is over the second.
        rows, turns = devices * few, each // few
        images = images.reshape(rows, turns, *images.shape[1:])
        keys = keys.reshape(rows, turns)

        def few_more(number, done):
            taken = (jax.lax.dynamic_index_in_dim(a, number, 1, False) for a in (images, keys))
            return jax.lax.dynamic_update_index_in_dim(done, augment(*taken), number, 1)

        made = jax.lax.fori_loop(0, turns, few_more, jnp.zeros(images.shape, jnp.float32))
        return made.reshape(-1, *images.shape[2:])

    return looped
