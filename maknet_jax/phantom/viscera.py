"""Paints the chest and the abdomen in one axial slice; `torso.paint_body` calls it."""

import dataclasses
import math

import numpy as np

from maknet_jax.phantom import reference
from maknet_jax.phantom.anatomy import Anatomy
from maknet_jax.phantom.canvas import Canvas


def _lung_floor(canvas: Canvas, anatomy: Anatomy, side: str) -> np.ndarray:
    """The level of the diaphragm, float32 `[rows, columns]`: lung above, abdomen below."""
    dome = anatomy.shift[f"{side} dome"]
    sign, top = (-1, 0.365) if side == "right" else (1, 0.378)
    dx, dy = canvas.x - sign * 78 - dome[0], canvas.y + 8
    return top + dome[2] + (np.square(dx / 68) + np.square(dy / 82)) * 0.062 * dome[3]


@dataclasses.dataclass(frozen=True)
class TrunkSection:
    """An axial section of the trunk.

    Attributes:
      tissue: HU of every name in `reference.TISSUE_HU`.
      level: 0 to 1 from the neck to the thigh, in the reference adult.
      cavity: bool `[rows, columns]`, the inside of the wall.
      width: half width of the wall in mm.
      depth: half depth of the wall in mm.
      spine: y of the middle of the vertebrae in mm.
    """

    tissue: dict[str, float]
    level: float
    cavity: np.ndarray
    width: float
    depth: float
    spine: float


def paint_chest(canvas: Canvas, anatomy: Anatomy, section: TrunkSection) -> None:
    """Paints shoulder girdle, ribs, lungs, heart and great vessels.

    Args:
      canvas: the slice, on which the wall of the body is painted.
      anatomy: the patient.
      section: where the slice lies.
    """
    tissue, level, cavity = section.tissue, section.level, section.cavity
    width, depth, spine = section.width, section.depth, section.spine
    if not 0.07 < level < 0.56:
        return
    x, y = canvas.x, canvas.y
    if 0.09 < level < 0.16:  # shoulder girdle
        for sign in (-1, 1):
            reach = width - 25
            canvas.bone(canvas.bar(sign * reach, 18, sign * 62, 52, 5), None, 300)
            canvas.bone(canvas.bar(sign * 14, -52, sign * (reach - 8), -20, 6), None, 300)
            if level < 0.145:
                canvas.bone(canvas.ellipse(sign * (reach - 2), 4, 22, 22), "arm", 280)
    if 0.15 < level < 0.25:  # scapulae, with fat in the axillae
        out = width - 12 - 180 * (level - 0.15)
        for sign in (-1, 1):
            canvas.paint(canvas.ellipse(sign * (width - 8), -6, 11, 30), -95)
            canvas.paint(canvas.bar(sign * out, 44, sign * (out - 52), 80, 4.5), 330)
    # Ribs run forwards and downwards, so an axial slice cuts each rib once.
    ring = canvas.ellipse(0, -4, width - 6, depth - 8, power=2.3) & ~cavity
    around = np.arctan2(np.abs(x), y) / math.pi  # 0 at the back, 1 in front
    order = level - 0.1 * around
    pitch = 0.026 * anatomy.height
    if level > 0.1:
        ribs = ring & (np.mod(order + 0.01, pitch) < 0.45 * pitch) & (order > 0.095)
        canvas.bone(ribs & (order < 0.43 - 0.1 * around) & (around < 0.9), "rib", 320, 480)
    if 0.17 < level < 0.335:
        canvas.bone(canvas.ellipse(0, -depth + 15, 19, 7), "sternum", 160, 420)
    apex = 0.122 + anatomy.shift["apex"][2]
    chest = cavity & (level < 0.5)
    middle = 20 + 14 * reference.section(level, 0.2, 0.5)
    lungs = np.zeros_like(cavity)
    for side, sign in (("right", -1), ("left", 1)):
        floor = _lung_floor(canvas, anatomy, side)
        roof = apex + (np.square((x - sign * 62) / 60) + np.square((y - 15) / 72)) * 0.055
        inside = chest & (x * sign > 0) & (level < floor) & (level > roof)
        inside &= ~canvas.ellipse(0, 0, middle, depth + 20, power=3)
        inside &= ~canvas.ellipse(0, spine, 27, 30)
        lungs |= inside
        if f"{side} lung" in anatomy.absent:
            canvas.paint(inside, 12)
        else:
            density = -845 + 0.5 * y + 30 * np.sin(x / 9) * np.sin(y / 11)
            canvas.paint(inside, density.astype(np.float32), f"{side} lung")
    centre = canvas.ellipse(0, -8, middle + 4, depth - 22, power=3)
    centre &= (level > apex + 0.01) & (level < 0.41) & ~(lungs)
    canvas.paint(centre & cavity, -70, "mediastinum")
    _vessels(canvas, anatomy, lungs & (canvas.hu < -500), level)
    heart, top = anatomy.shift["cardiac"], 0.268 + anatomy.shift["cardiac"][2]
    part = reference.section(level, top, top + 0.135 * heart[3])
    if part > 0:
        place = (20 + heart[0], -24 + heart[1])
        size = (62 * part * heart[3], 45 * part * heart[3])
        canvas.paint(canvas.ellipse(*place, *size, 0.6), tissue["myocardium"], "cardiac")
        for dx, dy in ((-18, -8), (14, -14), (20, 16), (-10, 18)):  # the four chambers
            chamber = canvas.ellipse(place[0] + dx, place[1] + dy, size[0] * 0.3, size[1] * 0.34)
            canvas.paint(chamber, tissue["blood"])
    _great_vessels(canvas, anatomy, tissue, level, spine)


def _vessels(canvas: Canvas, anatomy: Anatomy, lungs: np.ndarray, level: float) -> None:
    """Paints tubes that run outwards from the hilum and taper."""
    z = level * reference.LENGTH
    tubes = anatomy.vessels
    low, high = np.minimum(tubes[:, 2], tubes[:, 5]), np.maximum(tubes[:, 2], tubes[:, 5])
    tubes = tubes[(low < z + 5) & (z - 5 < high)]
    if not lungs.any() or not len(tubes):
        return
    points = np.stack([canvas.x[lungs], canvas.y[lungs], np.full(lungs.sum(), z)], -1)
    along = tubes[:, 3:6] - tubes[:, :3]
    away = points[:, None] - tubes[None, :, :3]
    t = ((away * along).sum(-1) / np.square(along).sum(-1)).clip(0, 1)
    distance = np.linalg.norm(away - t[..., None] * along, axis=-1)
    hit = (distance < tubes[:, 6] * (1.15 - 0.8 * t)).any(1)
    values = canvas.hu[lungs]
    values[hit] = 10
    canvas.hu[lungs] = values


def _great_vessels(
    canvas: Canvas, anatomy: Anatomy, tissue: dict[str, float], level: float, spine: float
) -> None:
    blood, aorta = tissue["blood"], tissue["aorta"]
    front = spine - 34
    if 0.2 < level < 0.29:  # vena cava, ascending aorta, pulmonary trunk
        canvas.paint(canvas.ellipse(-30, -18, 10, 10), blood + 20)
        canvas.paint(canvas.ellipse(-10, -24, 16, 16), aorta, "aorta")
    if 0.243 < level < 0.268:
        canvas.paint(canvas.bar(14, -28, 24, 8, 12), blood)
        canvas.paint(canvas.bar(14, 0, -38, 10, 8), blood)
    if 0.198 < level < 0.216:  # the arch
        canvas.paint(canvas.bar(-8, -26, 24, front + 4, 12), aorta, "aorta")
    elif 0.15 < level < 0.2:
        for dx, dy in ((-18, -22), (-4, -24), (12, -16)):
            canvas.paint(canvas.ellipse(dx, dy, 6, 6), aorta)
    if 0.21 < level < 0.65:
        side = 22 - 18 * min(1.0, max(0.0, (level - 0.3) / 0.12))
        canvas.paint(canvas.ellipse(side, front + 4, 11.5, 11.5), aorta, "aorta")
        if level > 0.4:
            canvas.paint(canvas.ellipse(-22, front + 4, 12, 9), blood)
    if level < 0.236:  # trachea in front of the spine, then its two branches
        place = (0, -14 + 120 * min(level, 0.2) - 4)
        canvas.paint(canvas.ellipse(*place, 12.5, 12.5), 45)
        canvas.paint(canvas.ellipse(*place, 9.5, 9), -985, "trachea")
    elif level < 0.265:
        for sign in (-1, 1):
            out = sign * (9 + 900 * (level - 0.236))
            canvas.paint(canvas.ellipse(out, 8, 6.5, 6.5), -980, "trachea")


def paint_abdomen(canvas: Canvas, anatomy: Anatomy, section: TrunkSection) -> None:
    """Paints the muscles, vessels and organs below the diaphragm; arguments as `paint_chest`."""
    tissue, level, cavity = section.tissue, section.level, section.cavity
    depth, spine = section.depth, section.spine
    if not 0.33 < level < 0.87:
        return
    x, y, shift = canvas.x, canvas.y, anatomy.shift
    floors = [_lung_floor(canvas, anatomy, side) for side in ("right", "left")]
    below = (
        cavity
        & (level > np.where(x < 0, *floors))
        & (canvas.organs == reference.VALUE["soft tissue"])
    )
    below &= ~canvas.ellipse(0, spine, 27, 30)
    canvas.paint(below, -98)
    for sign in (-1, 1):
        back = canvas.ellipse(sign * 34, depth - 24, 26, 18)
        canvas.paint(back & (level < 0.72), tissue["muscle"])
        if 0.54 < level < 0.8:
            out = 34 + 190 * (level - 0.54)
            place = (sign * out, spine - 4 - 240 * max(0.0, level - 0.68))
            thick = 9 + 70 * (min(level, 0.64) - 0.54)
            canvas.paint(canvas.ellipse(*place, thick, thick + 5), tissue["muscle"])
    if 0.4 < level < 0.65:
        front = depth - 79
        canvas.paint(canvas.ellipse(4, front + 4, 11.5, 11.5), tissue["aorta"], "aorta")
        canvas.paint(canvas.ellipse(-22, front + 4, 13, 9), tissue["blood"])
    elif 0.65 <= level < 0.83:
        for sign in (-1, 1):
            out = 14 + 420 * (level - 0.65)
            canvas.paint(
                canvas.ellipse(sign * out, depth - 80 - 250 * (level - 0.65), 7, 7), tissue["blood"]
            )
    if level > 0.48:
        _bowel(canvas, anatomy, tissue, level, below)
    for side, sign, top in (("right", -1, 0.492), ("left", 1, 0.47)):
        dx, dy, dz, size = shift[f"{side} kidney"]
        part = reference.section(level, top + dz, top + dz + 0.125 * size)
        if part > 0.15 and f"{side} kidney" not in anatomy.absent:
            place = (sign * (66 - 5 * part) + dx, spine - 18 + dy)
            shape = (29 * part * size, 34 * part * size, -0.5 * sign)
            canvas.paint(canvas.ellipse(*place, *shape), tissue["cortex"], f"{side} kidney")
            inner = (place[0] - sign * 4, place[1], shape[0] * 0.6, shape[1] * 0.62, shape[2])
            canvas.paint(canvas.ellipse(*inner), tissue["medulla"])
            if part > 0.75:
                hilum = canvas.bar(*place, place[0] - sign * 26 * size, place[1] - 12, 8)
                canvas.paint(hilum & below, -70)
    dx, dy, dz, size = shift["spleen"]
    part = reference.section(level, 0.4 + dz, 0.4 + dz + 0.13 * size)
    if part > 0 and "spleen" not in anatomy.absent:
        spleen = canvas.ellipse(106 + dx, 34 + dy, 30 * size * part, 56 * size * part, 0.35)
        canvas.paint(spleen & below, tissue["spleen"], "spleen")
    dx, dy, dz, size = shift["stomach"]
    part = reference.section(level, 0.4 + dz, 0.4 + dz + 0.155 * size)
    if part > 0 and "stomach" not in anatomy.absent:
        place = (60 - 200 * (level - 0.42) + dx, -38 + dy)
        outer = canvas.ellipse(*place, 54 * part * size, 38 * part * size, 0.4) & below
        canvas.paint(outer, tissue["wall"], "stomach")
        inner = canvas.ellipse(*place, 54 * part * size - 6, 38 * part * size - 6, 0.4) & below
        canvas.paint(inner, 18 if size > 0.95 else 190)
        canvas.paint(inner & (y < place[1] - 8 - 8 * dy / 5), -960)
    dx, dy, dz, size = shift["liver"]
    part = reference.section(level, 0.335 + dz, 0.6 + dz + 0.04 * (size - 1))
    if part > 0:
        left = max(0.0, 1 - abs(level - 0.44 - dz) / 0.085)
        right = canvas.ellipse(-74 + dx, 4 + dy, 76 * part * size, 96 * part * size, power=2.4)
        both = right | canvas.ellipse(-14 + dx, -50, 84 * left * size + 0.1, 34 * left + 0.1)
        both &= below & (canvas.organs != reference.VALUE["right kidney"]) & (x < 62)
        veins = np.sin(x / 7 + 40 * level) * np.sin(y / 8 - 55 * level) > 0.88
        canvas.paint(both, tissue["liver"], "liver")
        canvas.paint(both & veins, tissue["liver"] + (34 if tissue["blood"] > 90 else -10))
        if 0.49 < level - dz < 0.545:
            canvas.paint(canvas.ellipse(-62 + dx, -52 + dy, 15, 21), 8)


def _bowel(
    canvas: Canvas, anatomy: Anatomy, tissue: dict[str, float], level: float, below: np.ndarray
) -> None:
    loops = [tuple(loop) for loop in anatomy.bowel]
    if level < 0.76:  # the ascending and the descending colon
        loops += [
            (-98, 14, level * reference.LENGTH, 24, 1.0, -600),
            (102, 20, level * reference.LENGTH, 20, 1.0, -300),
        ]
    if level > 0.77:
        loops = [(0, 46, level * reference.LENGTH, 20, 1.1, -500)]
    for cx, cy, cz, radius, longer, content in loops:
        part = 1 - ((level * reference.LENGTH - cz) / (radius * 1.3)) ** 2
        if part <= 0.05:
            continue
        a, b = radius * longer * math.sqrt(part), radius * math.sqrt(part)
        canvas.paint(canvas.ellipse(cx, cy, a, b) & below, tissue["wall"], "intestine")
        inner = canvas.ellipse(cx, cy, max(a - 5, 1), max(b - 5, 1)) & below
        canvas.paint(inner, content)
        if content < -100:  # gas is in front of the fluid
            canvas.paint(inner & (canvas.y > cy + 0.25 * b), 35)
