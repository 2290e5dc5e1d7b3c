"""A generated torso: patients, scanners, and the CT slices with organ maps that they give.

Coordinates. `z` runs from 0 (top of the neck) to 1 (middle of the thigh). Everything is painted
in reference millimetres of an average adult: x from the patient's right to left, y from the front
to the back, zero in the middle of the body; the patient's size scales them. Nothing here is
meant for medicine: the shapes only have to look like CT and to move like patients do.
"""

import dataclasses
import math

import numpy as np
from scipy import ndimage

from maknet_jax.phantom import torso

_ORGAN_JITTER = (
    "liver",
    "spleen",
    "stomach",
    "right kidney",
    "left kidney",
    "cardiac",
    "urinary bladder",
    "right dome",
    "left dome",
    "apex",
    "crest",
    "spine",
)
_ARMS = ((False, False), (True, True), (True, False), (False, True))
_ARMS_P = (0.5, 0.26, 0.12, 0.12)


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """One patient: what stays the same in all of the patient's scans.

    Attributes:
      width, depth, height: size relative to the reference adult.
      fat: thickness of the subcutaneous fat in mm.
      arms: (right, left): whether the arm lies beside the body, else it is raised.
      absent: organs that were removed; an absent lung is filled with fluid.
      shift: per organ (dx, dy in mm, dz, size); see `_ORGAN_JITTER`.
      levels: [2, n] the patient's z and the reference z that belongs to it.
      warp: [8] phases and amplitudes that make outlines irregular.
      vessels: [n, 7] tubes in the lungs: start (x, y, z in mm), end (x, y, z), radius.
      bowel: [n, 6] loops: centre (x, y, z in mm), radius, elongation, content in HU.
    """

    width: float
    depth: float
    height: float
    fat: float
    arms: tuple
    absent: frozenset
    shift: dict
    levels: np.ndarray
    warp: np.ndarray
    vessels: np.ndarray
    bowel: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scan:
    """One series: how the scanner saw the patient.

    Attributes:
      phase: 0 without contrast, 1 portal, 2 arterial.
      fov: width of the square image in mm.
      centre: (x, y) of the patient in the image, mm.
      rotation: of the patient, radians.
      noise: standard deviation in HU.
      offset: per tissue of `torso.TISSUE_HU`, added HU.
      table: (gap below the back in mm, half width in mm, sag in mm, HU of the shell).
      padding: HU outside of the circular field of view, or None for a full square.
    """

    phase: int
    fov: float
    centre: tuple
    rotation: float
    noise: float
    offset: dict
    table: tuple
    padding: int | None


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A blob in one series.

    Attributes:
      z: mm from the top of the neck, along the body.
      row, column: centre in pixels.
      radius, ratio, angle: long half axis in pixels, short over long, radians to the columns.
      depth: half height in mm.
      hu: mean value.
      texture: "smooth", "mixed", "calcified" or "cavitary".
    """

    z: float
    row: float
    column: float
    radius: float
    ratio: float
    angle: float
    depth: float
    hu: float
    texture: str


def make_patient(rng, absence=None):
    """Draws an `Anatomy`.

    Args:
      rng: a `numpy.random.Generator`.
      absence: the probability that an organ is missing, of those that may be (default: 0.15 to
        0.25 each); of a pair the left one stays where the right one is missing.
    """
    knots = np.array([0.0, 0.12, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0])
    moved = knots + rng.normal(0, 0.012, knots.size).clip(-0.025, 0.025)
    moved[[0, -1]] = 0.0, 1.0
    shift = {
        name: np.append(rng.normal(0, (8, 6, 0.01)).clip(-16, 16), rng.uniform(0.78, 1.22))
        for name in _ORGAN_JITTER
    }
    # More often than in any hospital: else the height in the body would tell nearly every label.
    risk = {
        "right lung": 0.15,
        "left lung": 0.15,
        "right kidney": 0.25,
        "left kidney": 0.25,
        "spleen": 0.25,
        "stomach": 0.2,
        "urinary bladder": 0.2,
    }
    risk = risk if absence is None else dict.fromkeys(risk, absence)
    absent = {name for name, p in risk.items() if rng.random() < p}
    for side in ("lung", "kidney"):  # nobody lives without both
        if {f"right {side}", f"left {side}"} <= absent:
            absent.discard(f"left {side}")
    tubes = []
    for sign in (-1, 1):
        for _ in range(34):
            reach, turn = rng.uniform(45, 105), rng.uniform(0, 2 * math.pi)
            start = np.array([sign * 30, 5, 245]) + rng.normal(0, (6, 8, 12))
            out = (sign * abs(math.cos(turn)) * 75 + sign * 15, math.sin(turn) * reach * 0.8)
            end = start + (out[0], out[1], rng.uniform(-110, 120))
            tubes.append((*start, *end, rng.uniform(2.5, 6)))
    count = 64
    contents = rng.choice([25, 40, -900, 250, -40], count, p=[0.4, 0.25, 0.15, 0.12, 0.08])
    bowel = np.column_stack(
        [
            rng.uniform(-100, 100, count),
            rng.uniform(-75, 40, count),
            rng.uniform(510, 800, count),
            rng.uniform(13, 25, count),
            rng.uniform(0.8, 1.8, count),
            contents,
        ]
    )
    return Anatomy(
        width=rng.uniform(0.86, 1.16),
        depth=rng.uniform(0.86, 1.16),
        height=rng.uniform(0.9, 1.1),
        fat=float(rng.choice([5, 14, 30]) * rng.uniform(0.7, 1.3)),
        arms=_ARMS[rng.choice(4, p=_ARMS_P)],
        absent=frozenset(absent),
        shift=shift,
        levels=np.stack([moved, knots]),
        warp=np.concatenate([rng.uniform(0, 2 * math.pi, 4), rng.uniform(2, 6, 4)]),
        vessels=np.array(tubes, np.float32),
        bowel=bowel,
    )


def make_scan(rng, anatomy):
    """Draws a `Scan` of a patient from a `numpy.random.Generator`."""
    body = 2 * (165 * anatomy.width + anatomy.fat)
    # Some images show only a part of the body, as when they are made for the spine or the heart.
    part = rng.random() < 0.25
    scale = rng.uniform(0.6, 0.85) if part else rng.uniform(0.9, 1.28) + 0.15 * any(anatomy.arms)
    spread = (40, 24) if part else (12, 16)
    return Scan(
        phase=int(rng.choice(3, p=[0.3, 0.5, 0.2])),
        fov=float(body * scale),
        centre=(float(rng.normal(0, spread[0])), float(rng.normal(0, spread[1]))),
        rotation=math.radians(float(np.clip(rng.normal(0, 9), -22, 22))),
        noise=float(rng.uniform(8, 30)),
        offset={name: float(rng.normal(0, 9)) for name in torso.TISSUE_HU},
        table=(
            float(rng.choice([0.0, 4.0, 12.0])),
            float(rng.uniform(170, 250)),
            float(rng.uniform(5, 40)),
            float(rng.uniform(50, 400)),
        ),
        padding=rng.choice([None, None, -2000, -3024]),
    )


class Canvas:
    """A slice being painted.

    Attributes:
      x, y: [rows, columns] mm from the middle of the body.
      hu: [rows, columns] float32.
      organs: [rows, columns] uint8, values of `ORGANS`.
    """

    def __init__(self, x, y):
        """Starts with air everywhere."""
        self.x, self.y = x, y
        self.hu = np.full(x.shape, -1000, np.float32)
        self.organs = np.zeros(x.shape, np.uint8)

    def ellipse(self, cx, cy, a, b, angle=0.0, power=2.0):
        """Mask of an ellipse or, above power 2, of a rounder box (mm, radians)."""
        if min(a, b) <= 0:
            return np.zeros(self.x.shape, bool)
        dx, dy = self.x - cx, self.y - cy
        if angle:
            c, s = math.cos(angle), math.sin(angle)
            dx, dy = c * dx + s * dy, c * dy - s * dx
        if power == 2.0:
            return np.square(dx / a) + np.square(dy / b) < 1
        return np.abs(dx / a) ** power + np.abs(dy / b) ** power < 1

    def bar(self, x0, y0, x1, y1, radius):
        """Mask of what is nearer than `radius` to a line (mm)."""
        along = np.array([x1 - x0, y1 - y0])
        t = ((self.x - x0) * along[0] + (self.y - y0) * along[1]) / max(along @ along, 1e-6)
        t = t.clip(0, 1)
        return np.hypot(self.x - x0 - t * along[0], self.y - y0 - t * along[1]) < radius

    def paint(self, where, hu, organ=None):
        """Sets HU (a number or an image) and, if named, the organ."""
        self.hu[where] = hu[where] if isinstance(hu, np.ndarray) else hu
        if organ is not None:
            self.organs[where] = torso.VALUE[organ]

    def bone(self, where, organ, inside=230, cortex=620):
        """A cortex of about a pixel around spongy bone."""
        self.paint(where, cortex, organ)
        self.paint(ndimage.binary_erosion(where), inside)


def draw_slice(anatomy, scan, z, size, rng, lesions=()):
    """Renders one axial slice.

    Args:
      anatomy: the patient.
      scan: the series.
      z: 0 (top of the neck) to 1 (middle of the thigh).
      size: rows and columns.
      rng: a `numpy.random.Generator` for the noise of this slice.
      lesions: the `Lesion`s of this series; those that do not reach the slice leave no trace.

    Returns:
      (hu, organs): int16 [size, size] in HU with rows from front to back and columns from the
      patient's right to left, and uint8 [size, size] with the values of `ORGANS`. A lesion keeps
      the value of the organ it sits in.
    """
    axis = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * (scan.fov / size)
    page_x, page_y = np.meshgrid(axis - scan.centre[0], axis - scan.centre[1])
    c, s = math.cos(scan.rotation), math.sin(scan.rotation)
    x = (c * page_x + s * page_y) / anatomy.width
    y = (c * page_y - s * page_x) / anatomy.depth
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
    tissue = {name: hu[scan.phase] + scan.offset[name] for name, hu in torso.TISSUE_HU.items()}
    canvas = Canvas(x, y - torso.middle(level, anatomy.fat))
    torso.paint_body(canvas, anatomy, tissue, level)
    _table(canvas, anatomy, scan, page_x, page_y)
    _lesions(canvas, lesions, z * torso.LENGTH * anatomy.height)
    hu = ndimage.gaussian_filter(canvas.hu, 0.55)
    noise = rng.standard_normal((size, size), np.float32)
    # Rays through the shoulders and the hips are weakened most: streaks along the rows.
    streak = ndimage.uniform_filter1d(noise, 9, axis=1) * (2.0 if 0.09 < level < 0.15 else 0.6)
    hu += scan.noise * (ndimage.gaussian_filter(noise, 0.4) + streak)
    hu = np.maximum(np.rint(hu), -1024).astype(np.int16)
    if scan.padding is not None:
        outside = np.square(axis)[None, :] + np.square(axis)[:, None] > (scan.fov / 2) ** 2
        hu[outside] = scan.padding
        canvas.organs[outside] = 0
    return hu, canvas.organs


def _table(canvas, anatomy, scan, x, y):
    """A trough of two thin shells with foam between them, painted only outside the body."""
    gap, half, rise, shell = scan.table
    top = (torso.BACK + gap) * anatomy.depth - rise * np.square(x / half)
    free = (canvas.organs == 0) & (np.abs(x) < half)
    inside = free & (y > top - 1) & (y < top + 40)
    canvas.paint(inside, -890, "table")
    pixel = float(x[0, 1] - x[0, 0])
    for middle in (1.5, 37):
        # A shell is thinner than a pixel: it takes its share, as in a scanner.
        share = (0.5 + (2.5 - np.abs(y - top - middle)) / pixel).clip(0, 1)
        canvas.hu[inside] += (share * (shell + 890))[inside]


def _lesions(canvas, lesions, z):
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
