"""Body parts as DICOM's defined terms and SNOMED CT codes, and the audit of BodyPartExamined.

`body_parts.csv` lists labels (LesaNet's 115 body parts, and common organs of segmentations) with

- `region`: the part of the body that alone contains the organ; empty where several do;
- `body_part_examined`: the defined term of BodyPartExamined (0018,0015), PS3.16 Annex L;
- `sct_code`, `sct_meaning`: the code in CID 4 (Anatomic Region), as in pydicom's dictionary.

Only equal concepts are matched: a lobe of the lung is not coded as a lung. A label that the table
does not list, or lists without a code, has no code.
"""

import csv
import functools
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

NO_CODE = "no code"
REGIONS = ("HEAD", "NECK", "CHEST", "ABDOMEN", "PELVIS", "EXTREMITY")  # head to feet

_TABLE = pathlib.Path(__file__).with_name("body_parts.csv")
# Several regions together, from head to feet: defined term, code in CID 4 and its meaning.
_COMBINED = {
    ("HEAD", "NECK"): ("HEADNECK", "774007", "Head and Neck"),
    ("NECK", "CHEST"): ("NECKCHEST", "417437006", "Neck and Chest"),
    ("NECK", "CHEST", "ABDOMEN"): ("NECKCHESTABDOMEN", "416152001", "Neck, Chest and Abdomen"),
    ("NECK", "CHEST", "ABDOMEN", "PELVIS"): (
        "NECKCHESTABDPELV",
        "416319003",
        "Neck, Chest, Abdomen and Pelvis",
    ),
    ("CHEST", "ABDOMEN"): ("CHESTABDOMEN", "416550000", "Chest and Abdomen"),
    ("CHEST", "ABDOMEN", "PELVIS"): ("CHESTABDPELVIS", "416775004", "Chest, Abdomen and Pelvis"),
    ("ABDOMEN", "PELVIS"): ("ABDOMENPELVIS", "818982008", "Abdomen and Pelvis"),
    ("PELVIS", "EXTREMITY"): (
        "PELVISLOWEXTREMT",
        "1231522001",
        "Pelvis and lower extremities",
    ),
    REGIONS: ("WHOLEBODY", "38266002", "Entire body"),
}
# Beginnings of words in the tags of scanners: CHESTABDPELVIS, CHEST_ABD, THORAX, HEAD-NECK.
_STEMS = {
    "HEAD": "HEAD",
    "NECK": "NECK",
    "CHEST": "CHEST",
    "THORA": "CHEST",
    "ABD": "ABDOMEN",
    "PELV": "PELVIS",
    "EXTREM": "EXTREMITY",
}


class BodyPart(NamedTuple):
    """A label or a range of the body in DICOM's terms.

    Attributes:
      term: the defined term of BodyPartExamined; "" if there is none.
      code: the SNOMED CT code in CID 4, or `NO_CODE`.
      meaning: of the code; "" without one.
      laterality: "L", "R" or "".
      regions: those of `REGIONS` that it belongs to, from head to feet.
    """

    term: str = ""
    code: str = NO_CODE
    meaning: str = ""
    laterality: str = ""
    regions: tuple[str, ...] = ()


@functools.cache
def _rows() -> dict[str, BodyPart]:
    """Label -> its row in the table, without laterality."""
    with _TABLE.open(newline="", encoding="utf-8") as file:
        return {
            row["label"]: BodyPart(
                row["body_part_examined"],
                row["sct_code"] or NO_CODE,
                row["sct_meaning"],
                regions=(row["region"],) if row["region"] else (),
            )
            for row in csv.DictReader(file)
        }


def of_label(label: str) -> BodyPart:
    """The body part of a label; an empty one if the table does not list it.

    Case and underscores do not matter, and a side may come first or last: "left kidney" and
    "kidney_left" are KIDNEY with laterality L.

    >>> of_label("left kidney")[:4]
    ('KIDNEY', '64033007', 'Kidney', 'L')
    >>> of_label("lymph node").code
    'no code'
    """
    words = label.lower().replace("_", " ").split()
    rows = _rows()
    if row := rows.get(" ".join(words)):
        return row
    for side in ("left", "right"):
        if words and side in (words[0], words[-1]):
            rest = words[1:] if words[0] == side else words[:-1]
            if row := rows.get(" ".join(rest)):
                return row._replace(laterality=side[0].upper())
    return BodyPart()


def of_regions(regions: Iterable[str]) -> BodyPart:
    """The body part that several regions form; several terms joined by | where none covers all.

    >>> of_regions({"PELVIS", "ABDOMEN"}).term
    'ABDOMENPELVIS'
    >>> of_regions({"HEAD", "PELVIS"})[:2]
    ('HEAD|PELVIS', 'no code')
    """
    members = set(regions)
    ordered = tuple(region for region in REGIONS if region in members)
    if len(ordered) == 1:
        return of_label(ordered[0])._replace(regions=ordered)
    combined = _COMBINED.get(ordered, ("|".join(ordered), NO_CODE, ""))
    return BodyPart(*combined, regions=ordered)


def regions_of_tag(tag: str) -> frozenset[str]:
    """The regions that a value of BodyPartExamined names; empty if it names none.

    >>> sorted(regions_of_tag("Chest_Abd")), sorted(regions_of_tag("LSPINE"))
    (['ABDOMEN', 'CHEST'], ['ABDOMEN'])
    """
    letters = re.sub(r"[^A-Z]", "", tag.upper())
    if letters in ("WHOLEBODY", "BODY"):
        return frozenset(REGIONS)
    for row in _rows().values():
        if letters and row.term == letters:
            return frozenset(row.regions)
    return frozenset(region for stem, region in _STEMS.items() if stem in letters)


def audit(tag: str, seen: frozenset[str], known: frozenset[str]) -> str:
    """Compares a tag with what a network sees.

    Args:
      tag: the value of BodyPartExamined, or "".
      seen: the regions that are seen in the series.
      known: the regions for which the network has labels.

    Returns:
      "contradicts" if none of the regions of the tag is seen, but others are; "agrees" if one of
      them is seen; otherwise why the two cannot be compared: "no tag", "tag names no region",
      "nothing seen", or "no label for the tag" if the network has none in the regions of the tag.
    """
    if not tag:
        return "no tag"
    named = regions_of_tag(tag)
    if not named:
        return "tag names no region"
    if not seen:
        return "nothing seen"
    if named & seen:
        return "agrees"
    return "contradicts" if named & known else "no label for the tag"
