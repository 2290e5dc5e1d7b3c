"""Renders one axial slice of a patient: body, couch, lesions, blur and noise."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from maknet_jax.phantom import reference, torso
from maknet_jax.phantom.anatomy import Anatomy, Lesion, Scan
from maknet_jax.phantom.canvas import Canvas


def draw_slice(
    anatomy: Anatomy,
    scan: Scan,
    z: float,
    size: int,
    rng: np.random.Generator,
    lesions: Sequence[Lesion] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Renders one axial slice.

    Args:
      anatomy: the patient.
      scan: the series.
      z: 0 (top of the neck) to 1 (middle of the thigh), in the patient.
      size: rows and columns.
      rng: a `numpy.random.Generator` for the noise of this slice.
      lesions: the lesions of this series; those that do not reach the slice are skipped.

    Returns:
      (hu, organs): int16 `[size, size]` in HU with rows from front to back and columns from the
      patient's right to left, and uint8 `[size, size]` with the values of
      `reference.ORGANS`. A lesion keeps the value of the organ around it.
    """
    axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * (scan.fov / size)
    image_x, image_y = np.meshgrid(axis - scan.centre[0], axis - scan.centre[1])
    c, s = math.cos(scan.rotation), math.sin(scan.rotation)
    x = (c * image_x + s * image_y) / anatomy.width
    y = (c * image_y - s * image_x) / anatomy.depth
    level = float(np.interp(z, *anatomy.levels))
    turns, sway = anatomy.warp[:4], anatomy.warp[4:]
    x, y = (
        x
        + sway[0] * np.sin(y / 38 + 9 * level + turns[0])
        + sway[1] / 3 * np.sin(y / 17 - 14 * level + turns[1]),
        y
        + sway[2] * np.sin(x / 45 + 8 * level + turns[2])
        + sway[3] / 3 * np.sin(x / 19 + 13 * level + turns[3]),
    )
    tissue = {name: hu[scan.phase] + scan.offset[name] for name, hu in reference.TISSUE_HU.items()}
    canvas = Canvas(x, y - reference.middle(level, anatomy.fat))
    torso.paint_body(canvas, anatomy, tissue, level)
    _paint_table(canvas, anatomy, scan, image_x, image_y)
    _paint_lesions(canvas, lesions, z * reference.LENGTH * anatomy.height)
    hu = ndimage.gaussian_filter(canvas.hu, 0.55)
    noise = rng.standard_normal((size, size), np.float32)
    # Shoulders attenuate most, which causes streaks along the rows.
    streak = ndimage.uniform_filter1d(noise, 9, axis=1) * (2.0 if 0.09 < level < 0.15 else 0.6)
    hu += scan.noise * (ndimage.gaussian_filter(noise, 0.4) + streak)
    hu = np.maximum(np.rint(hu), -1024).astype(np.int16)
    if scan.padding is not None:
        outside = np.square(axis)[None, :] + np.square(axis)[:, None] > (scan.fov / 2) ** 2
        hu[outside] = scan.padding
        canvas.organs[outside] = 0
    return hu, canvas.organs


def _paint_table(
    canvas: Canvas, anatomy: Anatomy, scan: Scan, x: np.ndarray, y: np.ndarray
) -> None:
    """Paints `scan.table` outside the body; x, y are mm in the image, `[rows, columns]`."""
    table = scan.table
    top = (reference.BACK + table.gap) * anatomy.depth - table.sag * np.square(x / table.half_width)
    free = (canvas.organs == 0) & (np.abs(x) < table.half_width)
    inside = free & (y > top - 1) & (y < top + 40)
    canvas.paint(inside, -890, "table")
    pixel = float(x[0, 1] - x[0, 0])
    for middle in (1.5, 37):
        # Partial volume: a shell is thinner than a pixel.
        share = (0.5 + (2.5 - np.abs(y - top - middle)) / pixel).clip(0, 1)
        canvas.hu[inside] += (share * (table.shell + 890))[inside]


def _paint_lesions(canvas: Canvas, lesions: Sequence[Lesion], z: float) -> None:
    """Paints the sections of lesions at z mm below the top of the neck."""
    size = canvas.hu.shape[0]
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    for lesion in lesions:
        part = 1 - ((z - lesion.z) / lesion.depth) ** 2
        if part <= 0:
            continue
        c, s = math.cos(lesion.angle), math.sin(lesion.angle)
        dx, dy = columns - lesion.column, rows - lesion.row
        along, across = c * dx + s * dy, (c * dy - s * dx) / lesion.ratio
        turn = np.arctan2(across, along)
        wave = 0.12 * np.sin(5 * turn + lesion.z) if lesion.texture == "mixed" else 0.0
        near = np.hypot(along, across) / (lesion.radius * math.sqrt(part)) + wave
        inside = (near < 1) & (canvas.organs != 0)
        canvas.paint(inside, lesion.hu)
        if lesion.texture == "mixed":
            canvas.hu[inside] += 22 * np.sin(dx * 1.9 + lesion.z)[inside] * np.sin(dy * 1.7)[inside]
        elif lesion.texture == "calcified":
            canvas.paint(inside & (near < 0.6), 480)
        elif lesion.texture == "cavitary":
            canvas.paint(inside & (near < 0.55), -850)
