"""The reference adult: organs, their HU and the outline of the body.

Everything in the phantom is painted in the millimetres of this adult. `level` runs from 0 (top of
the neck) to 1 (middle of the thigh).
"""

import math

import numpy as np

ORGANS = (
    "background",
    "soft tissue",
    "right lung",
    "left lung",
    "trachea",
    "mediastinum",
    "cardiac",
    "aorta",
    "liver",
    "spleen",
    "stomach",
    "intestine",
    "right kidney",
    "left kidney",
    "urinary bladder",
    "cervical spine",
    "thoracic spine",
    "lumbar",
    "sacrum",
    "rib",
    "sternum",
    "pelvic bone",
    "femur",
    "thigh",
    "arm",
    "table",
)
VALUE = {name: value for value, name in enumerate(ORGANS)}

# At the levels _Z: half width and half depth (mm) of the muscle wall, and the share of the
# patient's fat that covers it.
_Z = (0.0, 0.05, 0.085, 0.115, 0.15, 0.2, 0.28, 0.36, 0.44, 0.52, 0.6, 0.66, 0.72, 0.8, 0.86, 1.0)
_WIDTH = (54, 56, 76, 150, 172, 162, 152, 150, 147, 140, 136, 142, 152, 162, 164, 164)
_DEPTH = (60, 58, 62, 76, 90, 98, 104, 107, 104, 97, 90, 90, 95, 98, 98, 92)
_FAT = (0.3, 0.3, 0.4, 0.5, 0.5, 0.6, 0.6, 0.65, 0.8, 0.95, 1.1, 1.1, 1.15, 1.2, 1.1, 0.9)
LENGTH = 950.0  # mm from level 0 to level 1
BACK = 112.0  # y (mm) of the skin of the back: patients lie flat
# HU without contrast, in the portal and in the arterial phase.
TISSUE_HU = {
    "blood": (44, 145, 130),
    "aorta": (44, 150, 290),
    "liver": (58, 112, 78),
    "spleen": (50, 122, 135),
    "cortex": (34, 190, 175),
    "medulla": (30, 165, 90),
    "muscle": (52, 62, 58),
    "wall": (38, 75, 60),
    "myocardium": (42, 100, 95),
}


def section(z: float, top: float, bottom: float) -> float:
    """The size of an ellipsoid's section at z relative to its largest one; 0 outside."""
    t = (z - (top + bottom) / 2) / ((bottom - top) / 2)
    return math.sqrt(max(0.0, 1 - t * t))


def outline(level: float, fat: float) -> tuple[float, float, float]:
    """The muscle wall and the fat over it.

    Args:
      level: 0 to 1, from the neck to the thigh.
      fat: the patient's subcutaneous fat in mm.

    Returns:
      (half width, half depth, thickness of the fat), all in mm.
    """
    width, depth, share = (float(np.interp(level, _Z, curve)) for curve in (_WIDTH, _DEPTH, _FAT))
    return width, depth, share * fat


def middle(level: float, fat: float) -> float:
    """The y of the middle of the body in mm: patients lie flat on their backs."""
    _, depth, thickness = outline(level, fat)
    return BACK - depth - thickness
