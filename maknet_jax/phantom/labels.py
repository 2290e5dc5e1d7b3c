"""The phantom's vocabulary, and its label files in LesaNet's three formats.

The true labels of a slice are its contents (`visible_terms`). The text-mined labels lack about 12 %
of them, a third of which are uncertain labels, and have about 3 % wrong ones in addition; the hand
labels are complete.
"""

import dataclasses
import io
import pathlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import openpyxl

from maknet_jax.files import write_json
from maknet_jax.phantom import reference

SPLITS = ("train", "val", "test")


class Term(NamedTuple):
    """One term of the ontology; synonyms and parents are separated by " | "."""

    label_class: str
    synonyms: str
    parents: str


@dataclasses.dataclass(frozen=True)
class LabelledLesion:
    """One lesion of the phantom.

    Attributes:
      split: one of `SPLITS`.
      terms: all true labels of the lesion and its slice, parents included.
      info: its columns of DL_info.csv except the split and Possibly_noisy.
    """

    split: str
    terms: set[str]
    info: dict[str, str | int]


# The terms are those of LesaNet's ontology. Its parents are used where they are valid for whole
# slices (there are ribs beside the liver, so "chest" is not a parent of rib).
# "bone", "airway" and "gastrointestinal" are not labels, like some terms of the real ontology.
ONTOLOGY: dict[str, Term] = {
    "bone": Term("bodypart", "osseous", ""),
    "airway": Term("bodypart", "", ""),
    "chest": Term("bodypart", "thorax | thoracic", ""),
    "abdomen": Term("bodypart", "abdominal", ""),
    "pelvis": Term("bodypart", "pelvic", ""),
    "neck": Term("bodypart", "", ""),
    "extremity": Term("bodypart", "limb", ""),
    "upper abdomen": Term("bodypart", "upper abdominal", "abdomen"),
    "lung": Term("bodypart", "pulmonary", "chest"),
    "right lung": Term("bodypart", "right pulmonary", "chest | lung"),
    "left lung": Term("bodypart", "left pulmonary", "chest | lung"),
    "mediastinum": Term("bodypart", "mediastinal", "chest"),
    "cardiac": Term("bodypart", "heart", "chest"),
    "trachea": Term("bodypart", "tracheal", "airway"),
    "liver": Term("bodypart", "hepatic", "abdomen | upper abdomen"),
    "spleen": Term("bodypart", "splenic", "abdomen | upper abdomen"),
    "stomach": Term("bodypart", "gastric", "gastrointestinal | abdomen | upper abdomen"),
    "intestine": Term("bodypart", "bowel | intestinal", "gastrointestinal"),
    "kidney": Term("bodypart", "renal", "abdomen | upper abdomen"),
    "right kidney": Term("bodypart", "right renal", "abdomen | kidney"),
    "left kidney": Term("bodypart", "left renal", "abdomen | kidney"),
    "urinary bladder": Term("bodypart", "bladder", "pelvis"),
    "thoracic spine": Term("bodypart", "", "bone"),
    "lumbar": Term("bodypart", "lumbar spine", "bone | abdomen"),
    "sacrum": Term("bodypart", "sacral", "bone | pelvis"),
    "rib": Term("bodypart", "", "bone"),
    "pelvic bone": Term("bodypart", "innominate bone", "bone | pelvis"),
    "thigh": Term("bodypart", "", "extremity"),
    "nodule": Term("type", "nodular", ""),
    "mass": Term("type", "", ""),
    "cyst": Term("type", "cystic", ""),
    "lung nodule": Term("type", "pulmonary nodule", "lung | chest | nodule"),
    "liver mass": Term("type", "hepatic mass", "liver | abdomen | mass"),
    "kidney cyst": Term("type", "renal cyst", "cyst | abdomen | kidney"),
    "large": Term("attribute", "bulky", ""),
    "subcentimeter": Term("attribute", "", ""),
    "calcified": Term("attribute", "calcification", ""),
    "cavitary": Term("attribute", "", ""),
    "hypoattenuation": Term("attribute", "hypodense | low density", ""),
    "hyperattenuation": Term("attribute", "hyperdense | high density", ""),
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
VISIBLE_MM2 = 100.0  # organs with a smaller area in a slice are not labelled
_ORGAN_TERMS = {"cervical spine": "neck", "arm": "extremity"}


def visible_terms(organs: np.ndarray, pixel_mm2: float) -> set[str]:
    """The body parts in a slice, parents included.

    Args:
      organs: uint8 `[rows, columns]`, values of `reference.ORGANS`.
      pixel_mm2: area of a pixel.

    Returns:
      The terms of organs with at least `VISIBLE_MM2`, and their parents.
    """
    area = np.bincount(organs.ravel(), minlength=len(reference.ORGANS)) * pixel_mm2
    names = [name for name, mm2 in zip(reference.ORGANS, area, strict=True) if mm2 >= VISIBLE_MM2]
    return with_parents(_ORGAN_TERMS.get(name, name) for name in names)


def with_parents(terms: Iterable[str]) -> set[str]:
    """`terms` and all their ancestors, restricted to `TERMS`."""
    closure: set[str] = set()
    queue = list(terms)
    while queue:
        term = queue.pop()
        if term in ONTOLOGY and term not in closure:
            closure.add(term)
            queue += [parent for parent in ONTOLOGY[term].parents.split(" | ") if parent]
    return closure & set(TERMS)


def write_labels(
    folder: pathlib.Path, lesions: Sequence[LabelledLesion], rng: np.random.Generator
) -> dict[str, int]:
    """Writes text-mined labels, hand labels and the ontology; lesions are numbered from 1.

    Args:
      folder: the output folder.
      lesions: in the order of DL_info.csv.
      rng: a `numpy.random.Generator`.

    Returns:
      Lesions per split with text-mined labels, and lesions with hand labels.
    """
    labels: dict[str, list] = {"term_list": list(TERMS)}
    for split in SPLITS:
        for kind in ("relevant_labels", "uncertain_labels", "lesion_idxs"):
            labels[f"{split}_{kind}"] = []
    labels["train_irrelevant_labels"] = []  # LesaNet lists them for train only
    hand, detected = [], dict.fromkeys(ONTOLOGY, 0)
    for number, lesion in enumerate(lesions, start=1):
        split, draw = lesion.split, rng.random()
        if split == "test" and draw < 0.6:
            terms = [str(term) for term in rng.permutation(sorted(lesion.terms))]
            hand.append({"text": "; ".join(terms), "lesion_idx": number, "expanded_terms": terms})
        if 0.96 < draw or split == "test" and draw < 0.3:
            continue  # no sentence was mined for this lesion
        mined = mine_terms(lesion.terms, rng)
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


def mine_terms(terms: set[str], rng: np.random.Generator) -> tuple[list[str], list[str], list[str]]:
    """Simulated text mining of the true terms: (relevant, uncertain, irrelevant)."""
    relevant, uncertain = [], []
    for term in rng.permutation(sorted(terms)).tolist():
        chance = rng.random()
        if chance > 0.12:
            relevant.append(term)
        elif chance > 0.08:
            uncertain.append(term)
    absent = sorted(set(TERMS) - terms)
    relevant += [str(rng.choice(absent)) for _ in range(rng.binomial(len(relevant), 0.03))]
    if relevant and rng.random() < 0.1:  # like the real lists, which repeat terms
        relevant.append(relevant[0])
    irrelevant = [str(rng.choice(absent))] if rng.random() < 0.03 else []
    return relevant, uncertain, irrelevant


def _write_ontology(path: pathlib.Path, detected: dict[str, int]) -> None:
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
    for number, (name, term) in enumerate(ONTOLOGY.items(), start=1):
        exclusive = [b if a == name else a for a, b in EXCLUSIVE if name in (a, b)]
        children = [other for other, row in ONTOLOGY.items() if name in row.parents.split(" | ")]
        sheet.append(
            (
                number,
                term.label_class,
                name,
                " | ".join([name] + ([term.synonyms] if term.synonyms else [])),
                detected[name],
                " | ".join(exclusive) or None,
                term.parents or None,
                " | ".join(children) or None,
            )
        )
    buffer = io.BytesIO()
    book.save(buffer)
    # The archive stores the time of writing in two places; fix both for reproducible bytes.
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry_name in sorted(source.namelist()):
            content = source.read(entry_name)
            if entry_name == "docProps/core.xml":
                content = re.sub(rb"[-0-9]{10}T[0-9:]{8}Z", b"2018-10-22T00:00:00Z", content)
            entry = zipfile.ZipInfo(entry_name, (2018, 10, 22, 0, 0, 0))
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)
