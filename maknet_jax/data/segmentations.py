"""Organ masks as labels of slices: present, absent or unknown.

The label of a record is that of its middle slice. It is *present* if its area is at least a given
minimum, *absent* if the area is zero, and *unknown* in between, because a few voxels of an organ
often depend on how it was contoured. It is also unknown in the whole case if the mask of the organ
is missing or empty (it was not contoured), and, for chosen labels, below the lowest contoured slice
(the contour ends before the organ does). Unknown labels have a `label_mask` of 0: the loss, the
class weights, the thresholds and the metrics ignore them.
"""

import collections
import dataclasses
import enum
import importlib.resources
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maknet_jax import files
from maknet_jax.ct import dicom, dicom_seg, nifti, preprocess, pseudonym, reading, volumes
from maknet_jax.ct.search import SeriesRef
from maknet_jax.data import csv_rows, overview, unit_results
from maknet_jax.data.labels import Vocabulary
from maknet_jax.data.segmentation_cases import Case, Mask
from maknet_jax.data.triplets import encode_with_labels
from maknet_jax.errors import InputError, Rejected, did_you_mean

MIN_AREA = 50.0  # mm2, the area of a disc of 8 mm diameter
TOTALSEGMENTATOR = "totalsegmentator"  # the name of the table in the package


class State(enum.IntEnum):
    """The state of a label in a slice; all except PRESENT and ABSENT are unknown."""

    PRESENT = 1
    ABSENT = 0
    SMALL = -1
    BELOW = -2
    EMPTY = -3
    MISSING = -4


REASONS = {
    State.SMALL: "area below --min-area",
    State.BELOW: "below the lowest contour",
    State.EMPTY: "empty mask",
    State.MISSING: "no mask",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How masks become labels.

    Attributes:
      min_area: minimum area in mm2 of a label that is present; at 0 any voxel is enough.
      every: distance between the middle slices of records, in slices.
      missing_is_absent: an organ without a mask, or with an empty one, is absent, not unknown.
      unknown_below: labels that are unknown below their lowest contoured slice.
    """

    min_area: float = MIN_AREA
    every: int = 1
    missing_is_absent: bool = False
    unknown_below: tuple[str, ...] = ()


# An unfinished data set resumes only if the `repr` of its units is unchanged: do not rename the
# classes or their fields.
@dataclasses.dataclass(frozen=True)
class _Part:
    name: str
    mask: Mask | None


@dataclasses.dataclass(frozen=True)
class _CaseUnit:
    name: str
    patient: str
    ref: SeriesRef
    labels: tuple[tuple[str, tuple[_Part, ...]], ...]
    rules: Rules
    size: int
    count: int
    overrides: reading.Overrides

    @property
    def source(self) -> str:
        """The path of its input."""
        return self.ref.paths[0]


def read_label_table(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Reads which masks form which label, from a CSV with the columns `mask` and `label`.

    A label with several masks is their union, and a mask may belong to several labels. Masks in
    rows with an empty label are not used.

    Args:
      path: the file, or `totalsegmentator` for the package's table from TotalSegmentator's names to
        DeepLesion's body parts.

    Returns:
      Label -> mask names, both in the order of the file.

    Raises:
      InputError: the file is missing or invalid, or has no label.
    """
    if str(path) == TOTALSEGMENTATOR:
        resource = importlib.resources.files("maknet_jax.data") / "totalsegmentator.csv"
        content = resource.read_bytes()
    else:
        try:
            content = pathlib.Path(path).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(
                f"--labels {path} is not a file: pass a CSV with the columns mask, label, or "
                f"{TOTALSEGMENTATOR}"
            ) from None
    rows = csv_rows.read_rows(f"--labels {path}", content)
    if not {"mask", "label"} <= set(rows.columns):
        raise InputError(
            f"--labels {path} has the columns {', '.join(rows.columns)}: expected mask and label"
        )
    table: dict[str, list[str]] = {}
    for line, row in rows.cells:
        mask, label = (files.printable(row[column]) for column in ("mask", "label"))
        if not mask:
            raise InputError(f"--labels {path} line {line}: the mask has no name")
        if label and mask not in table.setdefault(label, []):
            table[label].append(mask)
    if not table:
        raise InputError(f"--labels {path} has no label: expected rows of mask,label")
    return {label: tuple(masks) for label, masks in table.items()}


def choose_labels(
    cases: Iterable[Case], table: Mapping[str, Sequence[str]] | None
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The labels of a data set and the masks that form them.

    Args:
      cases: all cases.
      table: of `read_label_table`; None makes every mask a label of the same name.

    Returns:
      (label -> mask names, the masks of the table that no case has). Labels without any existing
      mask are dropped.

    Raises:
      InputError: no mask exists, or none of the table.
    """
    existing = sorted({name for case in cases for name, _ in case.masks})
    if not existing:
        raise InputError("no case has a mask: expected CASE/segmentations/ORGAN.nii.gz")
    if table is None:
        return {name: (name,) for name in existing}, []
    labels = {
        label: tuple(masks) for label, masks in table.items() if not set(existing).isdisjoint(masks)
    }
    listed = dict.fromkeys(mask for masks in table.values() for mask in masks)
    absent = [mask for mask in listed if mask not in existing]
    if not labels:
        raise InputError(
            f"none of the {len(listed)} masks of --labels exists: the cases have "
            f"{', '.join(existing[:10])}{', ...' if len(existing) > 10 else ''}"
        )
    return labels, absent


def check_rules(rules: Rules, labels: Iterable[str]) -> None:
    """Checks rules against the labels of a data set.

    Raises:
      InputError: a number is out of range, or `unknown_below` contains an unknown label.
    """
    if not 0 <= rules.min_area < float("inf"):
        raise InputError(f"--min-area {rules.min_area} should be 0 or above, in mm2")
    if rules.every < 1:
        raise InputError(f"--every {rules.every} should be 1 or above")
    labels = list(labels)
    for name in rules.unknown_below:
        if name not in labels:
            raise InputError(f"--unknown-below {name} is not a label: {did_you_mean(name, labels)}")


def middle_slices(count: int, every: int) -> range:
    """The middle slices of the records of a volume of `count` slices: every `every`-th.

    A volume that is too short for the first of them has one record, at its own middle slice.
    """
    return range(min(every // 2, count // 2), count, every)


def plan_cases(
    members: Iterable[tuple[Case, str]],
    labels: Mapping[str, Sequence[str]],
    *,
    rules: Rules,
    size: int,
    salt: str = "",
    pseudonyms: bool = False,
    overrides: reading.Overrides = reading.STRICT,
) -> dict[str, list[_CaseUnit]]:
    """The units of `make_case` by split.

    Args:
      members: (case, split) pairs.
      labels: label -> mask names, in column order.
      rules: how masks become labels.
      size: the edge S of the images.
      salt: the secret of the pseudonyms of DICOM cases.
      pseudonyms: NIfTI cases have pseudonyms, too.
      overrides: what is read although it would be rejected.
    """
    splits: dict[str, list[_CaseUnit]] = {}
    for case, split in members:
        masks = dict(case.masks)
        parts = tuple(
            (label, tuple(_Part(name, masks.get(name)) for name in names))
            for label, names in labels.items()
        )
        name, patient = case.name, case.patient
        if pseudonyms or case.ref.kind == "dicom":
            name, patient = (pseudonym.pseudonym(salt, text) for text in (name, patient))
        count = len(middle_slices(case.ref.count, rules.every))
        unit = _CaseUnit(name, patient, case.ref, parts, rules, size, count, overrides)
        splits.setdefault(split, []).append(unit)
    return splits


def make_case(unit: _CaseUnit) -> unit_results.UnitResult:
    """The records of a case. A mask that cannot be used rejects the whole case."""
    try:
        volume = volumes.load_series(unit.ref, overrides=unit.overrides)
        if not np.isfinite(volume.spacing[1:]).all():
            raise Rejected("no PixelSpacing: areas are unknown")
        areas, complete, counters = _areas(unit, volume)
    except Rejected as error:
        return unit_results.UnitResult(failures=((unit.ref.paths[0], str(error)),))
    counters.update(overview.of_volume(volume.spacing, len(volume.hu)))
    rules, centres = unit.rules, middle_slices(len(volume.hu), unit.rules.every)
    states = np.stack(
        [
            label_states(
                areas[column],
                complete[column],
                min_area=rules.min_area,
                unknown_below=label in rules.unknown_below,
            )
            for column, (label, _) in enumerate(unit.labels)
        ],
        axis=1,
    )
    examples = []
    for centre in centres:
        slices = volume.neighbours(centre)
        image, box = preprocess.make_triplet(slices, unit.size)
        meta = {"case": unit.name, "patient": unit.patient, "slice": centre}
        meta |= {"slices": len(volume.hu), "crop": box, "spacing": volume.json_spacing}
        row = states[centre]
        present, known = row == State.PRESENT, row >= State.ABSENT
        name = f"{unit.name}-{centre:04d}"
        examples.append(encode_with_labels(name, image, present.tobytes(), known.tobytes(), meta))
    chosen = states[list(centres)]
    for state, reason in REASONS.items():
        counters[f"labels unknown: {reason}"] += int((chosen == state).sum())
    return unit_results.UnitResult(tuple(examples), counters=dict(counters))


def label_states(
    areas: np.ndarray, complete: State, *, min_area: float, unknown_below: bool
) -> np.ndarray:
    """The state of one label in every slice of a case.

    Args:
      areas: float `[Z]`, mm2 of the union of the label's masks, head to feet.
      complete: ABSENT if the label is known to be absent in slices with zero area; else EMPTY or
        MISSING, the reason why it is unknown there: a part of the label has no mask.
      min_area: minimum area in mm2 of a label that is present.
      unknown_below: whether slices below the lowest contoured one are unknown.

    Returns:
      int8 `[Z]` of `State`.
    """
    states = np.full(areas.shape, complete, np.int8)
    contoured = np.flatnonzero(areas > 0)
    if unknown_below and contoured.size and complete == State.ABSENT:
        states[contoured[-1] + 1 :] = State.BELOW
    states[contoured] = State.SMALL
    states[(areas > 0) & (areas >= min_area)] = State.PRESENT
    return states


def _areas(
    unit: _CaseUnit, volume: volumes.Volume
) -> tuple[np.ndarray, list[State], collections.Counter[str]]:
    """The areas of all labels, float `[K, Z]` in mm2; whether they are complete; counters."""
    owners: dict[str, list[int]] = {}
    masks: dict[str, Mask | None] = {}
    for column, (_, parts) in enumerate(unit.labels):
        for part in parts:
            owners.setdefault(part.name, []).append(column)
            masks[part.name] = part.mask
    remaining = [len(parts) for _, parts in unit.labels]
    areas = np.zeros((len(unit.labels), len(volume.hu)))
    complete = [State.ABSENT] * len(unit.labels)
    counters: collections.Counter[str] = collections.Counter()
    unions: dict[int, np.ndarray] = {}
    pixel = _pixel_area(volume)
    for name, bits in _read_masks(unit, volume.hu.shape, masks):
        if bits is None or not bits.any():
            counters["organs without a mask" if bits is None else "empty masks"] += 1
        for column in owners[name]:
            remaining[column] -= 1
            if bits is not None and bits.any():
                union = unions.get(column)
                unions[column] = bits if union is None else union | bits
            elif not unit.rules.missing_is_absent:
                reason = State.MISSING if bits is None else State.EMPTY
                complete[column] = min(complete[column], reason)
            if not remaining[column] and column in unions:
                pixels = np.bitwise_count(unions.pop(column)).sum(axis=1, dtype=np.int64)
                areas[column] = pixels * pixel
    return areas, complete, counters


def _pixel_area(volume: volumes.Volume) -> float:
    """Area of a pixel in mm2: that of a parallelogram if the affine has a shear."""
    area = volume.spacing[1] * volume.spacing[2]
    if volume.affine is None:  # of DICOM, whose rows and columns are perpendicular
        return area
    cosine = volume.affine[:3, 0] @ volume.affine[:3, 1] / area
    return area * float(np.sqrt(1 - cosine**2))


def _read_masks(
    unit: _CaseUnit, shape: tuple[int, ...], masks: Mapping[str, Mask | None]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields the masks, one at a time: (name, uint8 `[Z, bytes]` with a bit per voxel, or None).

    Raises:
      Rejected: a mask cannot be used; the message names it.
    """
    ct = unit.ref.paths[0]
    slices: list[dicom.Header] = []
    maps: dict[str, np.ndarray] = {}
    segs: dict[str, dicom_seg.Segmentation] = {}
    for name, mask in masks.items():
        if mask is None:
            yield name, None
            continue
        path = mask.path
        try:
            if mask.kind == "file":
                inside = nifti.load_label_map(path, ct) > 0
            elif mask.kind == "value":
                if path not in maps:
                    maps[path] = nifti.load_label_map(path, ct)
                inside = np.equal(maps[path], mask.number)
            else:
                headers = (dicom.read_header(path, unit.overrides) for path in unit.ref.paths)
                slices = slices or list(filter(None, headers))
                if path not in segs:
                    segs[path] = dicom_seg.Segmentation(path, slices)
                inside = segs[path].mask(mask.number)
        except Rejected as error:
            raise Rejected(f"mask {name} ({path}): {error}") from error
        except OSError as error:  # the file was removed or is not readable
            raise Rejected(f"mask {name} ({path}): {error.strerror or error}") from error
        if inside.shape != shape:
            raise Rejected(f"mask {name} ({path}): {inside.shape} voxels, but the CT has {shape}")
        yield name, np.packbits(inside.reshape(len(inside), -1), axis=1)


def label_rows(
    vocabulary: Vocabulary, splits: Mapping[str, Mapping[str, Any]]
) -> list[list[str | int]]:
    """Rows of `overview.LABEL_COLUMNS` from the splits of a `dataset.json`."""
    rows = []
    for column, name in enumerate(vocabulary.names):
        for split, entry in splits.items():
            count, known = entry["count"], entry["known_counts"][column]
            present = entry["label_counts"][column]
            rows.append([name, split, count, known, present, count - known])
    return rows
