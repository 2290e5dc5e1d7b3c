"""Windowing and the student's noise, on the device inside the jitted step (paper, section 4.2).

All random numbers of an example are drawn from one key, which the step derives from (seed, step,
example): the augmentation of an example at a given step is the same on any mesh.

The paper names only the kinds of noise. Our choices: all ranges and probabilities, a joint stretch
of the three slices in `auto_contrast`, the middle slice in `grayscale`, air outside the image.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maknet_jax.errors import InputError

_STRIDE = 8  # pixels, of the coarse part of a shift: about the square root of the longest shift
_AT_ONCE = 8  # images; on v5e, 8 images of 256 x 256 fit into VMEM, 16 do not

# images [B, S, S, 3] -> float32 images in [0, 1]
ToInput = Callable[[jax.Array], jax.Array]
# images [B, S, S, 3], keys [B] -> float32 images in [0, 1]
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def to_unit(image: jax.Array, window: tuple[float, float]) -> jax.Array:
    """HU -> float32 in [0, 1], as LesaNet maps the same window to 0..255.

    Args:
      image: int16 `[..., S, S, 3]` in HU.
      window: (low, high) in HU; values outside are clipped. 0, the baseline of attributions, is
        `low`.

    Returns:
      float32 of the same shape.
    """
    low, high = window
    return jnp.clip((image.astype(jnp.float32) - low) * (1.0 / (high - low)), 0.0, 1.0)


def rotate_and_crop(
    image: jax.Array,
    angle: jax.Array | float,
    scale: jax.Array | float,
    aspect: jax.Array | float,
    centre: jax.Array,
    *,
    shift: jax.Array | None = None,
    reach: float | None = None,
) -> jax.Array:
    """Rotates, shifts and crops with bilinear interpolation, in one of two forms.

    With `reach` None every pixel is gathered from its four neighbours: one interpolation. Gathers
    are slow on TPUs; there the rotation is three shears (Paeth 1986), each two sums over shifted
    copies, and the crop is two small matrix products. The results are the same except for the blur
    of three more interpolations. A shift only moves the sampled rows and columns of the crop and
    needs no further interpolation.

    Args:
      image: float32 `[S, S, C]`.
      angle: radians, counter-clockwise.
      scale: share of the area that the crop keeps, up to 1.
      aspect: width over height of the crop.
      centre: `[2]` in [0, 1], the position (row, column) of the crop within its possible range.
      shift: `[2]`, shift of the rotated image (down, right), as shares of the edge; pixels that
        leave the frame are cut off. None for no shift.
      reach: the largest angle in radians, a Python float, for the second form.

    Returns:
      float32 `[S, S, C]`; pixels from outside the image are 0, air.
    """
    size = image.shape[0]
    height = jnp.sqrt(scale / aspect)
    width = jnp.sqrt(scale * aspect)
    # Coordinates in [-1, 1] over the crop, then in the image, then rotated around its middle.
    line = (jnp.arange(size) + 0.5) / size * 2 - 1
    rows = line * height + (2 * centre[0] - 1) * (1 - height)
    columns = line * width + (2 * centre[1] - 1) * (1 - width)
    if shift is not None:
        rows, columns = rows - 2 * shift[0], columns - 2 * shift[1]
    row, column = jnp.meshgrid(rows, columns, indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source_row = cos * row + sin * column
    source_column = -sin * row + cos * column
    # The outermost half pixel of the image is not blended with the air outside; otherwise a crop at
    # the edge would have a dark seam.
    inside = jnp.maximum(jnp.abs(source_row), jnp.abs(source_column)) <= 1 + 1e-5
    if shift is not None:
        inside &= jnp.maximum(jnp.abs(row), jnp.abs(column)) <= 1 + 1e-5
    if reach is None:
        sampled = _bilinear(image, _to_pixels(source_row, size), _to_pixels(source_column, size))
    else:
        rotated = _shear_thrice(image, angle, reach)
        sampled = _crop(rotated, _to_pixels(rows, size), _to_pixels(columns, size))
    return jnp.where(inside[..., None], sampled, 0.0)


def _to_pixels(coordinate: jax.Array, size: int) -> jax.Array:
    """Coordinates in [-1, 1] over the image -> pixels, 0 at the centre of the first."""
    return (coordinate + 1) / 2 * size - 0.5


def _hat(distance: jax.Array) -> jax.Array:
    """The weight of a neighbour at this distance in linear interpolation."""
    return jnp.maximum(0.0, 1 - jnp.abs(distance))


def _shear_thrice(image: jax.Array, angle: jax.Array | float, reach: float) -> jax.Array:
    """Rotates `[S, S, C]` by `angle`, at most `reach`; the edge is repeated outside."""
    half = image.shape[0] / 2 + 1
    wide = math.ceil(math.tan(reach / 2) * half)
    high = math.ceil(math.sin(reach) * (half + wide))
    # Between the first and the last shear, columns beside the image are needed too.
    image = jnp.pad(image, ((1, 1), (wide, wide), (0, 0)), "edge")
    rows, columns = (jnp.arange(edge) - (edge - 1) / 2 for edge in image.shape[:2])
    image = _shift_rows(image, -jnp.tan(angle / 2) * rows, wide)
    image = _shift_rows(image.swapaxes(0, 1), jnp.sin(angle) * columns, high).swapaxes(0, 1)
    image = _shift_rows(image, -jnp.tan(angle / 2) * rows, wide)
    return image[1:-1, wide : image.shape[1] - wide]


def _shift_rows(image: jax.Array, shift: jax.Array, reach: int) -> jax.Array:
    """out[r, c] = image[r, c + shift[r]], linearly interpolated; 0 outside the image.

    The absolute `shift` is at most `reach`. Each row is first shifted by a multiple of 8, then by
    the remainder, as a sum.
    """
    coarse = jnp.round(shift / _STRIDE)
    fine = shift - coarse * _STRIDE  # at most half a stride; its second neighbour is one further
    most, margin = math.ceil(reach / _STRIDE), _STRIDE // 2 + 1
    width = image.shape[1] + 2 * margin
    first = most * _STRIDE
    padded = jnp.pad(image, ((0, 0), (first + margin, first + margin), (0, 0)))
    near = jnp.zeros_like(padded[:, :width])
    for multiple in range(-most, most + 1):
        start = first + multiple * _STRIDE
        selected = (coarse == multiple)[:, None, None]
        near = jnp.where(selected, padded[:, start : start + width], near)
    terms = [
        _hat(fine - whole)[:, None, None]
        * near[:, margin + whole : margin + whole + image.shape[1]]
        for whole in range(-margin + 1, margin)
    ]
    return jnp.asarray(sum(terms))


def _crop(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The outer product of two linear interpolations: out[i, j] = image[rows[i], columns[j]]."""
    grid = jnp.arange(image.shape[0])
    down, across = (
        _hat(jnp.clip(places, 0, image.shape[0] - 1)[:, None] - grid) for places in (rows, columns)
    )
    return jnp.einsum("ir,jc,rck->ijk", down, across, image)


def _bilinear(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Values of `[S, S, C]` at fractional pixels, the edge repeated."""
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


def _first_and_share(place: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The first of the two neighbours of a fractional pixel and the share of the second.

    At the last pixel the share is 1. Positions are rounded to 1/256 of a pixel, as in texture
    units. XLA may compute a position more than once, with different last bits: a position at a
    whole pixel (without a crop, or with one of full width) could then be rounded down for one
    neighbour and not for the other, which would shift the image by a pixel.
    """
    place = jnp.round(place * 256) / 256
    first = jnp.clip(jnp.floor(place), 0, size - 2)
    return first.astype(jnp.int32), jnp.clip(place - first, 0, 1)[..., None]


def auto_contrast(image: jax.Array) -> jax.Array:
    """Stretches `[S, S, C]` to minimum 0 and maximum 1; a constant image is not changed.

    All channels are stretched jointly, which preserves the differences between them; our choice.
    """
    low, high = image.min(), image.max()
    span = high - low
    return jnp.where(span > 1e-6, (image - low) / jnp.maximum(span, 1e-6), image)


def grayscale(image: jax.Array) -> jax.Array:
    """Replaces all channels of `[S, S, 3]` by the middle slice, the labelled one; our choice."""
    return jnp.broadcast_to(image[..., 1:2], image.shape)


def make_augment(
    *,
    rotation_probability: float,
    rotation_degrees: float,
    crop_probability: float,
    crop_scale: tuple[float, float],
    crop_aspect: tuple[float, float],
    contrast_probability: float,
    grayscale_probability: float,
    translation_probability: float = 0.0,
    translation_range: float = 0.1,
    form: str = "auto",
    to_input: ToInput | None = None,
    devices: int = 1,
) -> Augment | None:
    """Builds the augmentation as one function; None if every kind of noise is off.

    In the form "shear" it processes a few images per device at a time: the largest divisor of
    the device's share that is at most 8. At 256 x 256 and 15 degrees they stay in the VMEM of a
    TPU v5e, and main memory is read and written once.

    Args:
      rotation_probability: of a rotation.
      rotation_degrees: the largest angle in either direction.
      crop_probability: of a random resized crop.
      crop_scale: (smallest, largest) share of the area, in (0, 1].
      crop_aspect: (smallest, largest) width over height; drawn log-uniformly.
      contrast_probability: of `auto_contrast`.
      grayscale_probability: of `grayscale`.
      translation_probability: of a translation. At 0 the other kinds of noise use the same random
        numbers as in versions without translation.
      translation_range: the largest shift in each direction as a share of the edge, below 1.
      form: of the rotation, "gather" or "shear"; "auto" shears on TPUs. See `rotate_and_crop`.
      to_input: images -> float32 images in [0, 1], applied first; None if images are in that form.
      devices: number of devices over which the images are split in equal contiguous parts.

    Returns:
      augment(images `[B, S, S, 3]`, keys `[B]`) -> float32 `[B, S, S, 3]`. It raises InputError for
      integer images without `to_input`.

    Raises:
      InputError: a range is empty or out of bounds.
    """
    for name, (low, high) in {"crop_scale": crop_scale, "crop_aspect": crop_aspect}.items():
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            rule = "0 < smallest <= largest" + " <= 1" * (name == "crop_scale")
            raise InputError(f"augment.{name} ({low}, {high}) should satisfy {rule}")
    if form not in ("auto", "gather", "shear"):
        raise InputError(f"augment form {form!r} should be auto, gather or shear")
    if not 0 <= rotation_degrees <= 180:
        raise InputError(f"augment.rotation_degrees {rotation_degrees} should be in 0..180")
    if not 0 <= translation_range < 1:
        raise InputError(
            f"augment.translation_range {translation_range} should be at least 0 and below 1"
        )
    if form == "auto":
        form = "shear" if jax.default_backend() == "tpu" else "gather"
    reach = math.radians(rotation_degrees) if form == "shear" else None
    if reach is not None and rotation_degrees > 90:
        raise InputError(
            f"augment.rotation_degrees {rotation_degrees} should be at most 90 in the form shear"
        )
    geometry = max(rotation_probability, crop_probability, translation_probability) > 0
    if not geometry and contrast_probability <= 0 and grayscale_probability <= 0:
        return None

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
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
            shift = None
            if translation_probability > 0:
                move, where = jax.random.split(jax.random.fold_in(key, 8))
                moved = jax.random.bernoulli(move, translation_probability)
                limit = translation_range
                shift = jax.random.uniform(where, (2,), minval=-limit, maxval=limit) * moved
            image = rotate_and_crop(
                image,
                angle,
                jnp.where(cropped, scale, 1.0),
                jnp.where(cropped, aspect, 1.0),
                jax.random.uniform(centre, (2,)),
                shift=shift,
                reach=reach,
            )
            if reach is None:
                # Else XLA gathers again for the minimum, the maximum and the result of the stretch.
                image = jax.lax.optimization_barrier(image)
        if contrast_probability > 0:
            stretched = jax.random.bernoulli(contrast, contrast_probability)
            image = jnp.where(stretched, auto_contrast(image), image)
        if grayscale_probability > 0:
            flat = jax.random.bernoulli(gray, grayscale_probability)
            image = jnp.where(flat, grayscale(image), image)
        return image

    def augment(images: jax.Array, keys: jax.Array) -> jax.Array:
        if to_input is not None:
            images = to_input(images)
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images of dtype {images.dtype} should be floats in [0, 1]: pass to_input"
            )
        return jax.vmap(one)(images.astype(jnp.float32), keys)

    return augment if form == "gather" else _few_at_a_time(augment, devices)


def _few_at_a_time(augment: Augment, devices: int) -> Augment:
    """The same function in a loop over at most `_AT_ONCE` images per device."""

    def looped(images: jax.Array, keys: jax.Array) -> jax.Array:
        share, remainder = divmod(len(images), devices)
        if remainder or not share:
            return augment(images, keys)
        few = max(count for count in range(1, _AT_ONCE + 1) if share % count == 0)
        # The first axis stays split over the devices; the loop is over the second.
        rows, turns = devices * few, share // few
        images = images.reshape(rows, turns, *images.shape[1:])
        keys = keys.reshape(rows, turns)

        def augment_some(turn: jax.Array, done: jax.Array) -> jax.Array:
            some, their_keys = (
                jax.lax.dynamic_index_in_dim(array, turn, 1, False) for array in (images, keys)
            )
            return jax.lax.dynamic_update_index_in_dim(done, augment(some, their_keys), turn, 1)

        done = jax.lax.fori_loop(0, turns, augment_some, jnp.zeros(images.shape, jnp.float32))
        return done.reshape(-1, *images.shape[2:])

    return looped
