"""Places one lesion in an organ of a slice, with its terms and its columns of DL_info.csv."""

import math

import numpy as np
from scipy import ndimage

from maknet_jax.phantom import anatomy, reference
from maknet_jax.phantom import labels as phantom_labels

# DeepLesion's coarse types: 1 bone, 2 abdomen, 3 mediastinum, 4 liver, 5 lung, 6 kidney, 7 soft
# tissue, 8 pelvis. Of the organs that a lesion may be in:
_COARSE = {
    "right lung": 5,
    "left lung": 5,
    "mediastinum": 3,
    "cardiac": 3,
    "liver": 4,
    "spleen": 2,
    "intestine": 2,
    "right kidney": 6,
    "left kidney": 6,
    "urinary bladder": 8,
    "sacrum": 1,
    "pelvic bone": 1,
    "thoracic spine": 1,
    "lumbar": 1,
    "soft tissue": 7,
    "thigh": 7,
}


def make_lesion(
    rng: np.random.Generator, hu: np.ndarray, organs: np.ndarray, spacing: float, z: float
) -> tuple[anatomy.Lesion, set[str], dict[str, str | int]]:
    """Places a lesion in one of the slice's organs.

    Args:
      rng: a `numpy.random.Generator`.
      hu: int16 `[size, size]`.
      organs: uint8 `[size, size]`, values of `reference.ORGANS`.
      spacing: mm per pixel.
      z: mm from the top of the neck.

    Returns:
      (lesion, terms, info): `terms` with their parents, `info` the columns of DL_info.csv that
      describe the lesion.
    """
    area = np.bincount(organs.ravel(), minlength=len(reference.ORGANS)) * spacing * spacing
    homes = [
        name for name in _COARSE if area[reference.VALUE[name]] > 4 * phantom_labels.VISIBLE_MM2
    ]
    homes = homes or [max(_COARSE, key=lambda name: area[reference.VALUE[name]])]
    organ = str(rng.choice(homes))
    inside = organs == reference.VALUE[organ]
    depth = ndimage.distance_transform_edt(inside)
    rows, columns = np.nonzero(depth >= min(2.5, depth.max()))
    pick = rng.integers(rows.size)
    room = depth[rows[pick], columns[pick]] * spacing
    radius = float(np.clip(rng.choice([4.5, 9.0, 17.0, 24.0]) * rng.uniform(0.8, 1.2), 3, room + 5))
    base = float(np.median(hu[inside]))
    terms: set[str] = set()
    texture, value = "smooth", base + 45 * (1 if rng.random() < 0.4 else -1)
    size_term = "mass" if radius > 15 else "nodule"
    if "lung" in organ:
        value, texture = 25.0, str(rng.choice(["smooth", "mixed", "calcified", "cavitary"]))
        terms = {"lung nodule" if size_term == "nodule" else "mass"}
    elif "kidney" in organ or organ == "liver" and rng.random() < 0.4:
        value, terms = 6.0, {"kidney cyst" if "kidney" in organ else "cyst", "hypoattenuation"}
    else:
        texture = str(rng.choice(["smooth", "mixed", "calcified"], p=[0.4, 0.45, 0.15]))
        terms = {"liver mass" if organ == "liver" and radius > 15 else size_term}
        terms.add("hyperattenuation" if value > base else "hypoattenuation")
    terms |= {texture} & {"calcified", "cavitary"}
    terms |= {"large"} if radius > 18 else {"subcentimeter"} if radius < 5 else set()
    lesion = anatomy.Lesion(
        z=z,
        row=float(rows[pick]),
        column=float(columns[pick]),
        radius=radius / spacing,
        ratio=float(rng.uniform(0.6, 1)),
        angle=float(rng.uniform(0, math.pi)),
        depth=max(radius, 6.0),
        hu=value,
        texture=texture,
    )
    # Long axis, then short axis, as drawn by radiologists. The box adds a margin of 5 pixels at
    # 512 x 512.
    long = lesion.radius * np.array([math.cos(lesion.angle), math.sin(lesion.angle)])
    short = lesion.ratio * np.array([-long[1], long[0]])
    ends = np.array([lesion.column, lesion.row]) + np.stack([-long, long, -short, short])
    diameters = 2 * lesion.radius, 2 * lesion.radius * lesion.ratio
    edge = 5 * hu.shape[0] / 512
    box = np.concatenate([ends.min(0) - edge, ends.max(0) + edge]).clip(0, hu.shape[0] - 1)
    return (
        lesion,
        phantom_labels.with_parents(terms),
        {
            "Measurement_coordinates": ", ".join(f"{v:.6g}" for v in ends.ravel()),
            "Bounding_boxes": ", ".join(f"{v:.6g}" for v in box),
            "Lesion_diameters_Pixel_": ", ".join(f"{v:.6g}" for v in diameters),
            "Coarse_lesion_type": _COARSE[organ],
            "DICOM_windows": "-1500, 500" if "lung" in organ else "-175, 275",
        },
    )
