"""Generated patients, scans and lesions, drawn from a random generator.

Coordinates: `z` runs from 0 (top of the neck) to 1 (middle of the thigh). Everything is painted
in millimetres of the reference adult, x from the patient's right to left, y from front to back,
with the origin in the middle of the body; the patient's size scales them. The phantom is not a
medical model: it only has to look like CT and to vary like patients.
"""

import dataclasses
import math

import numpy as np

from maknet_jax.phantom import reference

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
    """One patient: everything that is the same in all scans.

    Attributes:
      width, depth, height: size relative to the reference adult.
      fat: thickness of the subcutaneous fat in mm.
      arms: (right, left): True if the arm is beside the body, False if it is raised.
      absent: removed organs; an absent lung is filled with fluid.
      shift: per organ (dx, dy in mm, dz, size); see `_ORGAN_JITTER`.
      levels: float64 `[2, n]`: the patient's z and the reference z it corresponds to.
      warp: float64 `[8]`: four phases and four amplitudes that make outlines irregular.
      vessels: float32 `[n, 7]`: tubes in the lungs: start (x, y, z in mm), end (x, y, z), radius.
      bowel: float64 `[n, 6]`: loops: centre (x, y, z in mm), radius, elongation, content in HU.
    """

    width: float
    depth: float
    height: float
    fat: float
    arms: tuple[bool, bool]
    absent: frozenset[str]
    shift: dict[str, np.ndarray]
    levels: np.ndarray
    warp: np.ndarray
    vessels: np.ndarray
    bowel: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """The couch: a trough of two thin shells with foam between them.

    Attributes:
      gap: between the back and the couch, mm.
      half_width: mm.
      sag: depth of the middle below the edges, mm.
      shell: HU of the shells.
    """

    gap: float
    half_width: float
    sag: float
    shell: float


@dataclasses.dataclass(frozen=True)
class Scan:
    """One series: position of the patient, contrast, noise and couch.

    Attributes:
      phase: 0 without contrast, 1 portal, 2 arterial.
      fov: width of the square image in mm.
      centre: (x, y) of the patient in the image, mm.
      rotation: of the patient in radians.
      noise: standard deviation in HU.
      offset: HU added to each tissue of `reference.TISSUE_HU`.
      table: the couch below the patient.
      padding: HU outside the circular field of view, or None for a square one.
    """

    phase: int
    fov: float
    centre: tuple[float, float]
    rotation: float
    noise: float
    offset: dict[str, float]
    table: Table
    padding: int | None


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A blob in one series.

    Attributes:
      z: mm from the top of the neck, along the body.
      row, column: centre in pixels.
      radius: long half axis in pixels.
      ratio: short over long axis.
      angle: of the long axis to the rows, radians.
      depth: half height along z in mm.
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


def make_patient(rng: np.random.Generator, absence: float | None = None) -> Anatomy:
    """Draws an `Anatomy`.

    Args:
      rng: a `numpy.random.Generator`.
      absence: the probability that each removable organ is missing (default: 0.15 to 0.25). If the
        right one of a pair is missing, the left one is present.
    """
    knots = np.array([0.0, 0.12, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0])
    moved = knots + rng.normal(0, 0.012, knots.size).clip(-0.025, 0.025)
    moved[[0, -1]] = 0.0, 1.0
    shift = {
        name: np.append(rng.normal(0, (8, 6, 0.01)).clip(-16, 16), rng.uniform(0.78, 1.22))
        for name in _ORGAN_JITTER
    }
    # More often than in real patients: otherwise z alone would predict nearly every label.
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
    for side in ("lung", "kidney"):  # one of each pair remains
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


def make_scan(rng: np.random.Generator, anatomy: Anatomy) -> Scan:
    """Draws a `Scan` of a patient from a `numpy.random.Generator`."""
    body = 2 * (165 * anatomy.width + anatomy.fat)
    # Some scans show only a part of the body, like those of the spine or the heart.
    part = rng.random() < 0.25
    scale = rng.uniform(0.6, 0.85) if part else rng.uniform(0.9, 1.28) + 0.15 * any(anatomy.arms)
    spread = (40, 24) if part else (12, 16)
    return Scan(
        phase=int(rng.choice(3, p=[0.3, 0.5, 0.2])),
        fov=float(body * scale),
        centre=(float(rng.normal(0, spread[0])), float(rng.normal(0, spread[1]))),
        rotation=math.radians(float(np.clip(rng.normal(0, 9), -22, 22))),
        noise=float(rng.uniform(8, 30)),
        offset={name: float(rng.normal(0, 9)) for name in reference.TISSUE_HU},
        table=Table(
            gap=float(rng.choice([0.0, 4.0, 12.0])),
            half_width=float(rng.uniform(170, 250)),
            sag=float(rng.uniform(5, 40)),
            shell=float(rng.uniform(50, 400)),
        ),
        padding=(None, None, -2000, -3024)[rng.choice(4)],
    )
