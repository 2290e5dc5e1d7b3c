"""Paints the organs of one axial slice of the phantom's torso; `anatomy.draw_slice` calls it.

Everything is in reference millimetres of an average adult (see `anatomy`): x from the patient's
right to left, y from front to back, both from the middle of the body, and the level from 0 (top
of the neck) to 1 (middle of the thigh). Later paint covers earlier paint.
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

# Half width and half depth (mm) of the muscle wall, and how much of the fat lies over it.
_Z = (0.0, 0.05, 0.085, 0.115, 0.15, 0.2, 0.28, 0.36, 0.44, 0.52, 0.6, 0.66, 0.72, 0.8, 0.86, 1.0)
_WIDTH = (54, 56, 76, 150, 172, 162, 152, 150, 147, 140, 136, 142, 152, 162, 164, 164)
_DEPTH = (60, 58, 62, 76, 90, 98, 104, 107, 104, 97, 90, 90, 95, 98, 98, 92)
_FAT = (0.3, 0.3, 0.4, 0.5, 0.5, 0.6, 0.6, 0.65, 0.8, 0.95, 1.1, 1.1, 1.15, 1.2, 1.1, 0.9)
LENGTH = 950.0  # mm from z = 0 to z = 1 in the reference adult
BACK = 112.0  # y of the skin of the back: patients lie flat
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


def _ball(z, top, bottom):
    """Size of an ellipsoid's section at z relative to its largest one; 0 outside."""
    t = (z - (top + bottom) / 2) / ((bottom - top) / 2)
    return math.sqrt(max(0.0, 1 - t * t))


def _outline(level, fat):
    width, depth, share = (float(np.interp(level, _Z, curve)) for curve in (_WIDTH, _DEPTH, _FAT))
    return width, depth, share * fat


def middle(level, fat):
    """Where the middle of the body lies (mm): patients lie flat on their backs."""
    _, depth, fat = _outline(level, fat)
    return BACK - depth - fat


def paint_body(canvas, anatomy, tissue, level):
    """Paints all of the patient that the slice shows.

    Args:
      canvas: an `anatomy.Canvas`.
      anatomy: an `anatomy.Anatomy`.
      tissue: HU of every name in `TISSUE_HU`.
      level: 0 to 1 from the neck to the thigh, in the reference adult.
    """
    width, depth, fat = _outline(level, anatomy.fat)
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
    _chest(canvas, anatomy, tissue, level, cavity, width, depth, spine)
    _abdomen(canvas, anatomy, tissue, level, cavity, depth, spine)
    _pelvis(canvas, anatomy, tissue, level, depth)
    _spine(canvas, anatomy, level, spine)


def _thighs(canvas, tissue, level, fat):
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


def _arms(canvas, anatomy, tissue, level, width, fat):
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


def _neck(canvas, tissue, level, spine):
    for sign in (-1, 1):
        if level < 0.1:  # fat between the muscles, carotid artery and jugular vein
            canvas.paint(canvas.bar(sign * 12, -6, sign * 40, 6, 4), -80)
            canvas.paint(canvas.bar(sign * 20, spine + 22, sign * 44, spine - 4, 2.5), -80)
            canvas.paint(canvas.ellipse(sign * 24, -12, 6, 6), tissue["aorta"])
            canvas.paint(canvas.ellipse(sign * 34, -12, 8, 7), tissue["blood"])
        if 0.05 < level < 0.09:  # thyroid gland
            canvas.paint(canvas.ellipse(sign * 15, -26, 9, 13), 110)


def _lung_floor(canvas, anatomy, side):
    """Where the diaphragm lies at every pixel: lung above, abdomen below."""
    dome = anatomy.shift[f"{side} dome"]
    sign, top = (-1, 0.365) if side == "right" else (1, 0.378)
    dx, dy = canvas.x - sign * 78 - dome[0], canvas.y + 8
    return top + dome[2] + (np.square(dx / 68) + np.square(dy / 82)) * 0.062 * dome[3]


def _chest(canvas, anatomy, tissue, level, cavity, width, depth, spine):
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
    # Ribs run forwards and downwards, so an axial slice cuts each of them once.
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
    middle = 20 + 14 * _ball(level, 0.2, 0.5)
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
    part = _ball(level, top, top + 0.135 * heart[3])
    if part > 0:
        place = (20 + heart[0], -24 + heart[1])
        size = (62 * part * heart[3], 45 * part * heart[3])
        canvas.paint(canvas.ellipse(*place, *size, 0.6), tissue["myocardium"], "cardiac")
        for dx, dy in ((-18, -8), (14, -14), (20, 16), (-10, 18)):  # the four chambers
            chamber = canvas.ellipse(place[0] + dx, place[1] + dy, size[0] * 0.3, size[1] * 0.34)
            canvas.paint(chamber, tissue["blood"])
    _great_vessels(canvas, anatomy, tissue, level, spine)


def _vessels(canvas, anatomy, lungs, level):
    """Tubes that run from the hilum outwards and get thinner."""
    z = level * LENGTH
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


def _great_vessels(canvas, anatomy, tissue, level, spine):
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
            place = (sign * (9 + 900 * (level - 0.236)), 8)
            canvas.paint(canvas.ellipse(*place, 6.5, 6.5), -980, "trachea")


def _abdomen(canvas, anatomy, tissue, level, cavity, depth, spine):
    if not 0.33 < level < 0.87:
        return
    x, y, shift = canvas.x, canvas.y, anatomy.shift
    floors = [_lung_floor(canvas, anatomy, side) for side in ("right", "left")]
    below = cavity & (level > np.where(x < 0, *floors)) & (canvas.organs == VALUE["soft tissue"])
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
        part = _ball(level, top + dz, top + dz + 0.125 * size)
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
    part = _ball(level, 0.4 + dz, 0.4 + dz + 0.13 * size)
    if part > 0 and "spleen" not in anatomy.absent:
        place = canvas.ellipse(106 + dx, 34 + dy, 30 * size * part, 56 * size * part, 0.35)
        canvas.paint(place & below, tissue["spleen"], "spleen")
    dx, dy, dz, size = shift["stomach"]
    part = _ball(level, 0.4 + dz, 0.4 + dz + 0.155 * size)
    if part > 0 and "stomach" not in anatomy.absent:
        place = (60 - 200 * (level - 0.42) + dx, -38 + dy)
        outer = canvas.ellipse(*place, 54 * part * size, 38 * part * size, 0.4) & below
        canvas.paint(outer, tissue["wall"], "stomach")
        inner = canvas.ellipse(*place, 54 * part * size - 6, 38 * part * size - 6, 0.4) & below
        canvas.paint(inner, 18 if size > 0.95 else 190)
        canvas.paint(inner & (y < place[1] - 8 - 8 * dy / 5), -960)
    dx, dy, dz, size = shift["liver"]
    part = _ball(level, 0.335 + dz, 0.6 + dz + 0.04 * (size - 1))
    if part > 0:
        left = max(0.0, 1 - abs(level - 0.44 - dz) / 0.085)
        right = canvas.ellipse(-74 + dx, 4 + dy, 76 * part * size, 96 * part * size, power=2.4)
        both = right | canvas.ellipse(-14 + dx, -50, 84 * left * size + 0.1, 34 * left + 0.1)
        both &= below & (canvas.organs != VALUE["right kidney"]) & (x < 62)
        veins = np.sin(x / 7 + 40 * level) * np.sin(y / 8 - 55 * level) > 0.88
        canvas.paint(both, tissue["liver"], "liver")
        canvas.paint(both & veins, tissue["liver"] + (34 if tissue["blood"] > 90 else -10))
        if 0.49 < level - dz < 0.545:
            canvas.paint(canvas.ellipse(-62 + dx, -52 + dy, 15, 21), 8)


def _bowel(canvas, anatomy, tissue, level, below):
    loops = [tuple(loop) for loop in anatomy.bowel]
    if level < 0.76:  # the ascending and the descending colon
        loops += [
            (-98, 14, level * LENGTH, 24, 1.0, -600),
            (102, 20, level * LENGTH, 20, 1.0, -300),
        ]
    if level > 0.77:
        loops = [(0, 46, level * LENGTH, 20, 1.1, -500)]
    for cx, cy, cz, radius, longer, content in loops:
        part = 1 - ((level * LENGTH - cz) / (radius * 1.3)) ** 2
        if part <= 0.05:
            continue
        a, b = radius * longer * math.sqrt(part), radius * math.sqrt(part)
        canvas.paint(canvas.ellipse(cx, cy, a, b) & below, tissue["wall"], "intestine")
        inner = canvas.ellipse(cx, cy, max(a - 5, 1), max(b - 5, 1)) & below
        canvas.paint(inner, content)
        if content < -100:  # gas lies in front of what is fluid
            canvas.paint(inner & (canvas.y > cy + 0.25 * b), 35)


def _pelvis(canvas, anatomy, tissue, level, depth):
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
            head = _ball(crest, 0.785, 0.855)
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
    part = _ball(level, 0.795 + dz, 0.795 + dz + 0.065 * size * size)
    if 0.8 < level < 0.87:
        canvas.paint(canvas.ellipse(0, 14, 24, 18), muscle)
    if part > 0 and "urinary bladder" not in anatomy.absent:
        shape = (44 * part * size, 34 * part * size)
        canvas.paint(canvas.ellipse(dx, -24 + dy, *shape), muscle, "urinary bladder")
        canvas.paint(canvas.ellipse(dx, -24 + dy, shape[0] - 4, shape[1] - 4), 6)


def _spine(canvas, anatomy, level, spine):
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
