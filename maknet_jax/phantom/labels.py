"""The phantom's vocabulary and the three label files of LesaNet that `phantom` writes.

What a slice is labelled with is what it contains (`visible_terms`). The text-mined labels then
lose about 12 % (a third of those to the uncertain ones) and gain about 3 %; the hand labels are
complete.
"""

import io
import re
import zipfile

import numpy as np
import openpyxl

from maknet_jax.files import write_json
from maknet_jax.phantom import torso

SPLITS = ("train", "val", "test")
# term: (class, synonyms, parents). The words are those of LesaNet's ontology; its parents are
# kept where they hold for whole slices (ribs also lie beside the liver, so rib is not "chest").
# "bone", "airway" and "gastrointestinal" are no labels, as some terms of the real ontology.
ONTOLOGY = {
    "bone": ("bodypart", "osseous", ""),
    "airway": ("bodypart", "", ""),
    "chest": ("bodypart", "thorax | thoracic", ""),
    "abdomen": ("bodypart", "abdominal", ""),
    "pelvis": ("bodypart", "pelvic", ""),
    "neck": ("bodypart", "", ""),
    "extremity": ("bodypart", "limb", ""),
    "upper abdomen": ("bodypart", "upper abdominal", "abdomen"),
    "lung": ("bodypart", "pulmonary", "chest"),
    "right lung": ("bodypart", "right pulmonary", "chest | lung"),
    "left lung": ("bodypart", "left pulmonary", "chest | lung"),
    "mediastinum": ("bodypart", "mediastinal", "chest"),
    "cardiac": ("bodypart", "heart", "chest"),
    "trachea": ("bodypart", "tracheal", "airway"),
    "liver": ("bodypart", "hepatic", "abdomen | upper abdomen"),
    "spleen": ("bodypart", "splenic", "abdomen | upper abdomen"),
    "stomach": ("bodypart", "gastric", "gastrointestinal | abdomen | upper abdomen"),
    "intestine": ("bodypart", "bowel | intestinal", "gastrointestinal"),
    "kidney": ("bodypart", "renal", "abdomen | upper abdomen"),
    "right kidney": ("bodypart", "right renal", "abdomen | kidney"),
    "left kidney": ("bodypart", "left renal", "abdomen | kidney"),
    "urinary bladder": ("bodypart", "bladder", "pelvis"),
    "thoracic spine": ("bodypart", "", "bone"),
    "lumbar": ("bodypart", "lumbar spine", "bone | abdomen"),
    "sacrum": ("bodypart", "sacral", "bone | pelvis"),
    "rib": ("bodypart", "", "bone"),
    "pelvic bone": ("bodypart", "innominate bone", "bone | pelvis"),
    "thigh": ("bodypart", "", "extremity"),
    "nodule": ("type", "nodular", ""),
    "mass": ("type", "", ""),
    "cyst": ("type", "cystic", ""),
    "lung nodule": ("type", "pulmonary nodule", "lung | chest | nodule"),
    "liver mass": ("type", "hepatic mass", "liver | abdomen | mass"),
    "kidney cyst": ("type", "renal cyst", "cyst | abdomen | kidney"),
    "large": ("attribute", "bulky", ""),
    "subcentimeter": ("attribute", "", ""),
    "calcified": ("attribute", "calcification", ""),
    "cavitary": ("attribute", "", ""),
    "hypoattenuation": ("attribute", "hypodense | low density", ""),
    "hyperattenuation": ("attribute", "hyperdense | high density", ""),
}
EXCLUSIVE = (
    ("neck", "abdomen"),
    ("neck", "pelvis"),
    ("neck", "thigh"),
    ("chest", "pelvis"),
    ("chest", "thigh"),
    ("abdomen", "thigh"),
    ("upper abdomen", "urinary bladder"),
    ("nodule", "cyst"),
    ("large", "subcentimeter"),
    ("hypoattenuation", "hyperattenuation"),
)
TERMS = tuple(sorted(set(ONTOLOGY) - {"bone", "airway"}))
VISIBLE_MM2 = 100.0  # an organ with less area in a slice is not labelled
_ORGAN_TERMS = {"cervical spine": "neck", "arm": "extremity"}


def visible_terms(organs, pixel_mm2):
    """The body parts in a slice, parents included.

    Args:
      organs: uint8 [rows, columns], values of `torso.ORGANS`.
      pixel_mm2: area of a pixel.

    Returns:
      A set of terms: of organs with at least `VISIBLE_MM2`, and of all that contain them.
    """
    area = np.bincount(organs.ravel(), minlength=len(torso.ORGANS)) * pixel_mm2
    names = [name for name, mm2 in zip(torso.ORGANS, area, strict=True) if mm2 >= VISIBLE_MM2]
    return with_parents(_ORGAN_TERMS.get(name, name) for name in names)


def with_parents(terms):
    """The labels among `terms` and all their parents, as a set."""
    found, queue = set(), list(terms)
    while queue:
        term = queue.pop()
        if term in ONTOLOGY and term not in found:
            found.add(term)
            queue += [parent for parent in ONTOLOGY[term][2].split(" | ") if parent]
    return found & set(TERMS)


def write_labels(folder, lesions, rng):
    """Writes text-mined labels, hand labels and the ontology; lesions are numbered from 1.

    Args:
      folder: where to.
      lesions: dicts with `split` and `terms` (a set), in the order of DL_info.csv.
      rng: a `numpy.random.Generator`.

    Returns:
      A dict of counts.
    """
    labels = {"term_list": list(TERMS)}
    for split in SPLITS:
        for kind in ("relevant_labels", "uncertain_labels", "lesion_idxs"):
            labels[f"{split}_{kind}"] = []
    labels["train_irrelevant_labels"] = []  # LesaNet has no others
    hand, detected = [], dict.fromkeys(ONTOLOGY, 0)
    for number, lesion in enumerate(lesions, start=1):
        split, fate = lesion["split"], rng.random()
        if split == "test" and fate < 0.6:
            terms = [str(term) for term in rng.permutation(sorted(lesion["terms"]))]
            hand.append({"text": "; ".join(terms), "lesion_idx": number, "expanded_terms": terms})
        if 0.96 < fate or split == "test" and fate < 0.3:
            continue  # no sentence was mined for this lesion
        mined = mine_terms(lesion["terms"], rng)
        for kind, terms in zip(("relevant", "uncertain", "irrelevant"), mined, strict=True):
            if f"{split}_{kind}_labels" in labels:
                labels[f"{split}_{kind}_labels"].append([TERMS.index(term) for term in terms])
        labels[f"{split}_lesion_idxs"].append(number)
        for term in mined[0]:
            detected[term] += 1
    write_json(folder / "text_mined_labels.json", labels)
    write_json(folder / "hand_labeled.json", hand)
    _write_ontology(folder / "ontology.xlsx", detected)
    counts = {f"{split}_text_mined": len(labels[f"{split}_lesion_idxs"]) for split in SPLITS}
    return counts | {"hand_labelled": len(hand)}


def mine_terms(terms, rng):
    """What text mining makes of the true terms: (relevant, uncertain, irrelevant) lists."""
    relevant, uncertain = [], []
    for term in rng.permutation(sorted(terms)).tolist():
        chance = rng.random()
        if chance > 0.12:
            relevant.append(term)
        elif chance > 0.08:
            uncertain.append(term)
    absent = sorted(set(TERMS) - terms)
    relevant += [str(rng.choice(absent)) for _ in range(rng.binomial(len(relevant), 0.03))]
    if relevant and rng.random() < 0.1:  # the real lists repeat terms
        relevant.append(relevant[0])
    irrelevant = [str(rng.choice(absent))] if rng.random() < 0.03 else []
    return relevant, uncertain, irrelevant


def _write_ontology(path, detected):
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(
        (
            "id",
            "class",
            "term",
            "synonyms",
            "num_detected",
            "term_exclusive",
            "term_parents",
            "term_children",
        )
    )
    for number, (term, (kind, synonyms, parents)) in enumerate(ONTOLOGY.items(), start=1):
        pairs = [pair for pair in EXCLUSIVE if term in pair]
        exclusive = [b if a == term else a for a, b in pairs]
        children = [name for name, row in ONTOLOGY.items() if term in row[2].split(" | ")]
        synonyms = " | ".join([term] + ([synonyms] if synonyms else []))
        sheet.append(
            (
                number,
                kind,
                term,
                synonyms,
                detected[term],
                " | ".join(exclusive) or None,
                parents or None,
                " | ".join(children) or None,
            )
        )
    buffer = io.BytesIO()
    book.save(buffer)
    # The archive holds the time of writing in two places: the same phantom must be the same bytes.
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in sorted(source.namelist()):
            content = source.read(name)
            if name == "docProps/core.xml":
                content = re.sub(rb"[-0-9]{10}T[0-9:]{8}Z", b"2018-10-22T00:00:00Z", content)
            entry = zipfile.ZipInfo(name, (2018, 10, 22, 0, 0, 0))
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)
