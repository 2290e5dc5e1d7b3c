"""Paints the body in one axial slice: skin, muscle, limbs, spine and pelvis.

Everything is in millimetres of the reference adult (see `reference`): x from the patient's
right to left, y from front to back, both from the middle of the body, and the level from 0 (top
of the neck) to 1 (middle of the thigh). Later shapes cover earlier ones.
"""

import math

import numpy as np

from maknet_jax.phantom import reference, viscera
from maknet_jax.phantom.anatomy import Anatomy
from maknet_jax.phantom.canvas import Canvas


def paint_body(canvas: Canvas, anatomy: Anatomy, tissue: dict[str, float], level: float) -> None:
    """Paints the patient in the slice.

    Args:
      canvas: the empty slice.
      anatomy: the patient.
      tissue: HU of every name in `reference.TISSUE_HU`.
      level: 0 to 1 from the neck to the thigh, in the reference adult.
    """
    width, depth, fat = reference.outline(level, anatomy.fat)
    if level > 0.885:
        _thighs(canvas, tissue, level, fat)
        return
    _arms(canvas, anatomy, tissue, level, width, fat)
    canvas.paint(canvas.ellipse(0, 0, width + fat, depth + fat, power=2.3), -102, "soft tissue")
    wall = canvas.ellipse(0, 0, width, depth, power=2.3)
    canvas.paint(wall, tissue["muscle"])
    spine = depth - 45 + 0.5 * anatomy.shift["spine"][1]
    if level < 0.13:
        _neck(canvas, tissue, level, spine)
    cavity = canvas.ellipse(0, -6, width - 17, depth - 20, power=2.3)
    section = viscera.TrunkSection(tissue, level, cavity, width, depth, spine)
    viscera.paint_chest(canvas, anatomy, section)
    viscera.paint_abdomen(canvas, anatomy, section)
    _pelvis(canvas, anatomy, tissue, level, depth)
    _spine(canvas, anatomy, level, spine)


def _thighs(canvas: Canvas, tissue: dict[str, float], level: float, fat: float) -> None:
    gap = 60 * (level - 0.885)
    for sign in (-1, 1):
        middle = sign * (80 + 0.4 * fat + gap)
        leg = canvas.ellipse(middle, 4, 78 + 0.4 * fat, 88 + 0.3 * fat)
        canvas.paint(leg, -102, "thigh")
        canvas.paint(canvas.ellipse(middle, 4, 72 - 0.4 * fat, 80 - 0.4 * fat), tissue["muscle"])
        for turn in np.arange(5) * 1.26 + 0.4:  # fat between the muscles
            end = (middle + 62 * math.cos(turn), 4 + 66 * math.sin(turn))
            canvas.paint(canvas.bar(middle + 6, 0, *end, 2.2), -70)
        artery = (middle - sign * 22, -38)
        canvas.paint(canvas.ellipse(*artery, 6, 6), tissue["aorta"])
        canvas.paint(canvas.ellipse(artery[0], artery[1] + 14, 7, 6), tissue["blood"])
        shaft = canvas.ellipse(middle + sign * 8, -2, 15, 15)
        canvas.paint(shaft, 1050, "femur")
        canvas.paint(canvas.ellipse(middle + sign * 8, -2, 7, 7), -40)


def _arms(
    canvas: Canvas,
    anatomy: Anatomy,
    tissue: dict[str, float],
    level: float,
    width: float,
    fat: float,
) -> None:
    for sign, down in zip((-1, 1), anatomy.arms, strict=True):
        if not (0.13 < level < 0.8 if down else level < 0.1):
            continue
        middle = sign * (width + fat + 42) if down else sign * (118 + 300 * level)
        side = 15 if down else 25
        radius = 40 - 18 * max(0.0, level - 0.3) if down else 40
        canvas.paint(canvas.ellipse(middle, side, radius, radius + 6), -100, "arm")
        canvas.paint(canvas.ellipse(middle, side, radius - 7, radius - 2), tissue["muscle"])
        bones = [(-9, 4, 8), (10, -2, 8)] if down and level > 0.42 else [(0, 0, 11)]
        for dx, dy, thick in bones:
            canvas.paint(canvas.ellipse(middle + dx, side + dy, thick, thick), 950)
            canvas.paint(canvas.ellipse(middle + dx, side + dy, thick / 2, thick / 2), 60)


def _neck(canvas: Canvas, tissue: dict[str, float], level: float, spine: float) -> None:
    for sign in (-1, 1):
        if level < 0.1:  # fat between the muscles, carotid artery and jugular vein
            canvas.paint(canvas.bar(sign * 12, -6, sign * 40, 6, 4), -80)
            canvas.paint(canvas.bar(sign * 20, spine + 22, sign * 44, spine - 4, 2.5), -80)
            canvas.paint(canvas.ellipse(sign * 24, -12, 6, 6), tissue["aorta"])
            canvas.paint(canvas.ellipse(sign * 34, -12, 8, 7), tissue["blood"])
        if 0.05 < level < 0.09:  # thyroid gland
            canvas.paint(canvas.ellipse(sign * 15, -26, 9, 13), 110)


def _pelvis(
    canvas: Canvas, anatomy: Anatomy, tissue: dict[str, float], level: float, depth: float
) -> None:
    if level < 0.62:
        return
    crest = level - anatomy.shift["crest"][2]
    muscle = tissue["muscle"]
    for sign in (-1, 1):
        if crest > 0.66:  # gluteal muscles with fat in between
            canvas.paint(canvas.bar(sign * 20, depth + 2, sign * 30, depth - 30, 4), -100)
        if 0.64 < crest < 0.785:  # iliac wing, from the sacrum to the front
            t = (crest - 0.64) / 0.145
            back, front = (48 + 4 * t, 46 + 6 * t), (118 - 14 * t, -32 + 22 * t)
            start = 0.55 * max(0.0, 1 - t / 0.25)
            x0, y0 = (b + start * (f - b) for b, f in zip(back, front, strict=True))
            wing = canvas.bar(sign * x0, y0, sign * front[0], front[1], 6.5 + 4 * t)
            canvas.bone(wing, "pelvic bone", 260)
        if 0.775 < crest < 0.85:  # hip joint
            cup = canvas.ellipse(sign * 94, 6, 35, 35)
            canvas.bone(cup & (canvas.x * sign < 96), "pelvic bone", 300)
            head = reference.section(crest, 0.785, 0.855)
            canvas.paint(canvas.ellipse(sign * 98, 4, 28 * head + 1, 28 * head + 1), 60)
            canvas.bone(canvas.ellipse(sign * 98, 4, 25 * head, 25 * head), "femur", 330)
        if crest > 0.825:  # the neck of the femur, the trochanter, then the shaft
            end = 138 - 260 * max(0.0, crest - 0.85)
            canvas.bone(canvas.bar(sign * 104, 6, sign * end, 14, 13), "femur", 260)
            if crest < 0.87:
                canvas.bone(canvas.bar(sign * 8, -46, sign * 62, -26, 8), "pelvic bone", 260)
        if crest > 0.79:  # fat between the muscles of the hip and of the pelvic floor
            canvas.paint(canvas.bar(sign * 66, -62, sign * 112, -40, 6), -95)
            canvas.paint(canvas.ellipse(sign * 34, 46, 15, 24, 0.5 * sign), -95)
            canvas.paint(canvas.bar(sign * 84, 62, sign * 130, 38, 3), -85)
        if crest > 0.83:
            canvas.bone(canvas.ellipse(sign * 56, 38, 13, 20), "pelvic bone", 260)
        if crest > 0.8:
            canvas.paint(canvas.ellipse(sign * 78, -48, 6.5, 6.5), tissue["blood"])
    dx, dy, dz, size = anatomy.shift["urinary bladder"]
    part = reference.section(level, 0.795 + dz, 0.795 + dz + 0.065 * size * size)
    if 0.8 < level < 0.87:
        canvas.paint(canvas.ellipse(0, 14, 24, 18), muscle)
    if part > 0 and "urinary bladder" not in anatomy.absent:
        shape = (44 * part * size, 34 * part * size)
        canvas.paint(canvas.ellipse(dx, -24 + dy, *shape), muscle, "urinary bladder")
        canvas.paint(canvas.ellipse(dx, -24 + dy, shape[0] - 4, shape[1] - 4), 6)


def _spine(canvas: Canvas, anatomy: Anatomy, level: float, spine: float) -> None:
    if level > 0.83:
        return
    bone = level + anatomy.shift["spine"][2]
    name = ("cervical spine", "thoracic spine", "lumbar", "sacrum")[
        int(np.searchsorted((0.125, 0.485, 0.665), bone))
    ]
    if name == "sacrum":
        t = (bone - 0.665) / 0.165
        place = (0, spine + 4 + 26 * t)
        canvas.bone(canvas.ellipse(*place, 46 * (1 - 0.8 * t), 24 - 14 * t), name, 210)
        if t < 0.8:
            canvas.paint(canvas.ellipse(0, place[1] + 13, 10, 5), 25)
        return
    a = float(np.interp(bone, (0, 0.12, 0.5, 0.66), (10, 12, 19, 25)))
    b = a * 0.8
    disc = np.mod(bone, 0.033) < 0.007
    canvas.bone(canvas.ellipse(0, spine + b + 14, 4, 14), name, 250)
    for sign in (-1, 1):
        if not disc:
            canvas.bone(canvas.bar(0, spine + b + 14, sign * (a + 12), spine + b + 8, 5), name, 260)
    canvas.bone(canvas.ellipse(0, spine + b + 5, 15, 13), name, 300)
    canvas.paint(canvas.ellipse(0, spine + b + 4, 9, 7.5), 25)
    body = canvas.ellipse(0, spine, a, b, power=2.3)
    if disc:
        canvas.paint(body, 95, name)
    else:
        canvas.bone(body, name, 190, 420)
