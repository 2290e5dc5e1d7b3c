"""Selects CT series, alone or with their segmentations, from the index of IDC.

The index does not have a column for the series that a segmentation refers to. But the description
of TotalSegmentator's results, "Segmentation of Series 2", names the SeriesNumber of a series of the
same study.
"""

import collections
import dataclasses
import fnmatch
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from maknet_jax.ct import dicom_pixels
from maknet_jax.data.idc import Series, unknown
from maknet_jax.errors import InputError

UNSPECIFIED = "unspecified"  # the body part of series without one
_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_SERIES_NUMBER = re.compile(r"\bseries:?\s*(\d+)\s*$", re.IGNORECASE)
_Rule = tuple[str, Callable[[Series], bool]]


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which CT series to select.

    Patterns are compared without regard to case, and may contain the wildcards * and ?.

    Attributes:
      body_parts: patterns of BodyPartExamined; `UNSPECIFIED` selects series that have none.
      collections: patterns of collection ids.
      exclude_collections: patterns of collection ids to leave out.
      licences: names of licences; a name without its version selects all versions.
      min_slices: minimum number of slices; the paper uses volumes of more than 50.
      phantoms: also select phantoms and animals, as far as the index tells.
      per_patient: maximum number of series per patient.
      per_collection: maximum number of series per collection.
      total: maximum number of series.
      seed: of the random order in which series are taken.
    """

    body_parts: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    exclude_collections: tuple[str, ...] = ()
    licences: tuple[str, ...] = ("CC BY",)
    min_slices: int = 51
    phantoms: bool = False
    per_patient: int | None = None
    per_collection: int | None = None
    total: int | None = None
    seed: int = 0


class Selection(NamedTuple):
    """Selected series.

    Attributes:
      ct: the CT series, in random order.
      segmentations: SeriesInstanceUID of a CT series -> its segmentations.
      left_out: reason -> number of CT series; a series counts under its first reason only.
      segmentations_left_out: reason -> number of segmentations without a CT series.
    """

    ct: list[Series]
    segmentations: dict[str, list[Series]]
    left_out: dict[str, int]
    segmentations_left_out: dict[str, int]


def select(
    index: Iterable[Series],
    filters: Filters,
    *,
    paired: bool = False,
    references: Mapping[str, str] | None = None,
    nonhuman: Collection[str] = (),
) -> Selection:
    """Selects CT series.

    Series are taken in a random order that depends only on the seed and on their UIDs, so a
    smaller selection is a part of a larger one. Every patient has one series before any has two.

    Args:
      index: the rows of `read_index`.
      filters: which series to select.
      paired: select only CT series with a segmentation in the index.
      references: of `read_references`, for `paired`; None infers pairs from the index.
      nonhuman: collections of phantoms and animals.

    Raises:
      InputError: a pattern matches nothing in the index.
    """
    rows = list(index)
    ct = [row for row in rows if row.modality == "CT"]
    segmentations = [row for row in rows if row.modality == "SEG"]
    licences = _licences(filters.licences, {row.licence for row in rows})
    licensed: _Rule = ("another licence", lambda row: row.licence in licences)
    technical = _technical_rules(filters)
    rules = [*_content_rules(ct, filters, nonhuman), licensed]
    left_out = collections.Counter(dict.fromkeys((name for name, _ in (*technical, *rules)), 0))
    unpaired: collections.Counter[str] = collections.Counter()
    # Pairs are made before patients are selected: a study of two series has two candidates, even
    # if only one of them has the wanted body part.
    usable = _keep(ct, technical, left_out)
    pairs: dict[str, list[Series]] = {}
    if paired:
        pairs = _pair(usable, _keep(segmentations, [licensed], unpaired), references, unpaired)
        rules.append(("without a segmentation", lambda row: row.uid in pairs))
    remaining = _keep(usable, rules, left_out)
    remaining.sort(key=lambda row: hashlib.sha256(f"{filters.seed}:{row.uid}".encode()).digest())
    chosen = _limit(remaining, filters, left_out)
    return Selection(
        chosen,
        {row.uid: pairs[row.uid] for row in chosen if paired},
        {reason: count for reason, count in left_out.items() if count},
        dict(unpaired),
    )


def _technical_rules(filters: Filters) -> list[_Rule]:
    """(reason to leave a series out, whether it is kept) for series that cannot be prepared."""
    lossy = set(map(str, dicom_pixels.LOSSY_JPEG))
    return [
        ("not CT Image Storage", lambda row: row.sop_class == _CT_IMAGE_STORAGE),
        ("lossy JPEG", lambda row: lossy.isdisjoint(row.transfer_syntax.split(","))),
        (f"fewer than {filters.min_slices} slices", lambda row: row.slices >= filters.min_slices),
    ]


def _content_rules(
    ct: Sequence[Series], filters: Filters, nonhuman: Collection[str]
) -> list[_Rule]:
    """(reason to leave a series out, whether it is kept) for series that are not wanted."""

    def body_part(row: Series) -> str:
        return row.body_part or UNSPECIFIED

    def human(row: Series) -> bool:
        text = f"{row.collection} {row.body_part}".lower()
        return "phantom" not in text and row.collection not in nonhuman

    parts = _matching("--body-parts", filters.body_parts, map(body_part, ct))
    names = {row.collection for row in ct}
    included = _matching("--collections", filters.collections, names)
    excluded = _matching("--exclude-collections", filters.exclude_collections, names)
    return [
        ("a phantom or an animal", lambda row: filters.phantoms or human(row)),
        ("another body part", lambda row: not parts or body_part(row) in parts),
        ("another collection", lambda row: not included or row.collection in included),
        ("an excluded collection", lambda row: row.collection not in excluded),
    ]


def _matching(option: str, patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that match some pattern; each pattern must match a name."""
    names = set(names)
    matched: set[str] = set()
    for pattern in patterns:
        of_pattern = {n for n in names if fnmatch.fnmatchcase(n.lower(), pattern.lower())}
        if not of_pattern:
            raise InputError(unknown(option, pattern, names))
        matched |= of_pattern
    return matched


def _licences(wanted: Iterable[str], known: Collection[str]) -> set[str]:
    """The known licences with a wanted name, with or without its version."""
    matched: set[str] = set()
    for name in wanted:
        of_name = {n for n in known if name in (n, re.sub(r" [\d.]+$", "", n))}
        if not of_name:
            raise InputError(unknown("--licences", name, known))
        matched |= of_name
    return matched


def _keep(
    series: Iterable[Series], rules: Sequence[_Rule], left_out: collections.Counter[str]
) -> list[Series]:
    """The series that all rules keep; the others are counted under their first reason."""
    kept = []
    for row in series:
        reason = next((name for name, keeps in rules if not keeps(row)), None)
        if reason is None:
            kept.append(row)
        else:
            left_out[reason] += 1
    return kept


def _pair(
    ct: Iterable[Series],
    segmentations: Iterable[Series],
    references: Mapping[str, str] | None,
    left_out: collections.Counter[str],
) -> dict[str, list[Series]]:
    """UID of a CT series -> its segmentations; those without a CT series are counted."""
    by_uid: dict[str, Series] = {}
    by_study: dict[str, list[Series]] = {}
    for row in ct:
        by_uid[row.uid] = row
        by_study.setdefault(row.study, []).append(row)
    pairs: dict[str, list[Series]] = {}
    for row in segmentations:
        if references is not None:
            target = by_uid.get(references.get(row.uid, ""))
            candidates = [] if target is None else [target]
        else:
            candidates = by_study.get(row.study, [])
            named = _SERIES_NUMBER.search(row.description)
            if named:
                number = int(named[1])
                candidates = [c for c in candidates if _integer(c.number) == number]
        if len(candidates) == 1:
            pairs.setdefault(candidates[0].uid, []).append(row)
        else:
            left_out["several CT series fit" if candidates else "no usable CT series fits"] += 1
    return pairs


def _integer(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _limit(
    order: Sequence[Series], filters: Filters, left_out: collections.Counter[str]
) -> list[Series]:
    """Applies the limits per patient, per collection and in all."""
    ranked: list[tuple[int, Series]] = []
    of_patient: collections.Counter[tuple[str, str]] = collections.Counter()
    for row in order:
        patient = row.collection, row.patient
        ranked.append((of_patient[patient], row))
        of_patient[patient] += 1
    ranked.sort(key=lambda pair: pair[0])  # stable: each patient's first series before any second
    limits = {
        "patient": f"more than {filters.per_patient} per patient",
        "collection": f"more than {filters.per_collection} per collection",
        "total": f"more than {filters.total} in all",
    }
    left_out.update(dict.fromkeys(limits.values(), 0))
    chosen: list[Series] = []
    of_collection: collections.Counter[str] = collections.Counter()
    for rank, row in ranked:
        if filters.per_patient is not None and rank >= filters.per_patient:
            left_out[limits["patient"]] += 1
        elif of_collection[row.collection] == filters.per_collection:
            left_out[limits["collection"]] += 1
        elif len(chosen) == filters.total:
            left_out[limits["total"]] += 1
        else:
            chosen.append(row)
            of_collection[row.collection] += 1
    return chosen
