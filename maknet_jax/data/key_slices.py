"""DeepLesion's key slices and lesion patches as records (paper, sections 2 and 4.1)."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from maknet_jax.ct import png, preprocess, reading, volumes
from maknet_jax.data import deeplesion, lesions, overview, unit_results
from maknet_jax.data.labels import Vocabulary, ontology_vocabulary, read_ontology
from maknet_jax.data.triplets import encode_with_labels
from maknet_jax.errors import InputError, Rejected


# An unfinished data set resumes only if the `repr` of its units is unchanged: do not rename the
# class or its fields.
@dataclasses.dataclass(frozen=True)
class _KeySlice:
    id: str
    path: str
    labels: bytes
    label_mask: bytes
    meta: tuple[tuple[str, Any], ...]
    size: int
    overrides: reading.Overrides
    count: int = 1

    @property
    def source(self) -> str:
        """The path of its input."""
        return self.path


@dataclasses.dataclass(frozen=True)
class RecordPlan:
    """One record to make from DeepLesion.

    Attributes:
      split: the split of the record.
      id: the id of the record.
      row: the row of DL_info.csv.
      labels: uint8 [K] as bytes; empty if unlabelled.
      label_mask: uint8 [K] as bytes, 0 where a label is unknown; empty if unlabelled.
      lesion_idx: LesaNet's lesion number, for labelled records.
    """

    split: str
    id: str
    row: deeplesion.Lesion
    labels: bytes = b""
    label_mask: bytes = b""
    lesion_idx: int | None = None


def plan_unlabelled(rows: Iterable[deeplesion.Lesion], *, patches: bool) -> list[RecordPlan]:
    """One record of the split `unlabelled` for each key slice, or for each lesion if `patches`."""
    if patches:
        return [RecordPlan("unlabelled", f"{row.slice_id}#{row.row + 1}", row) for row in rows]
    slices = {row.slice_id: row for row in rows}
    return [RecordPlan("unlabelled", name, row) for name, row in slices.items()]


def plan_labelled(
    labelled: Iterable[deeplesion.LabelledLesion], vocabulary: Vocabulary
) -> list[RecordPlan]:
    """One record per lesion, as in the paper's counts: two lesions on one slice are two records."""
    return [
        RecordPlan(
            lesion.split,
            f"{lesion.lesion.slice_id}#{lesion.lesion_idx}",
            lesion.lesion,
            *label_vectors(vocabulary, lesion.names, lesion.unknown),
            lesion.lesion_idx,
        )
        for lesion in labelled
    ]


def label_vectors(
    vocabulary: Vocabulary, names: Sequence[str], unknown: Sequence[str]
) -> tuple[bytes, bytes]:
    """The labels of a lesion and the mask of those that are known.

    As in LesaNet, labels are those that the label files list, without added ancestors (the mined
    lists contain most of them). Uncertain labels and their ancestors are unknown, except those
    that are also certain and those that a certain label excludes.

    This is our choice and differs from LesaNet's dataset_DeepLesion.py, which adds only the direct
    parents of an uncertain label, not all ancestors, and applies the closure of the exclusions over
    parents and children, not the exclusions as the ontology lists them. More labels are therefore
    unknown here, including all that are unknown in LesaNet. On the published label files: 28
    instead of 21 in val and 50 instead of 47 in test for the 115 body parts; 831 instead
    of 780 in train, 204 instead of 194 in val and 185 instead of 181 in test for all 171 labels.

    Args:
      vocabulary: the labels in column order.
      names: the labels of the lesion.
      unknown: its uncertain labels.

    Returns:
      (labels, mask): uint8 [K] each, as bytes.
    """
    certain = set(names)
    masked = [
        name
        for name in vocabulary.with_ancestors(unknown)
        if name in vocabulary.index
        and name not in certain
        and not vocabulary.excludes(name, certain)
    ]
    return vocabulary.vector(names).tobytes(), (1 - vocabulary.vector(masked)).tobytes()


def plan_units(
    plans: Iterable[RecordPlan],
    images: pathlib.Path,
    size: int,
    overrides: reading.Overrides = reading.STRICT,
) -> tuple[dict[str, list[_KeySlice]], list[tuple[str, str]]]:
    """The units of `make_key_slice` or `make_lesion`.

    Args:
      plans: the records to make.
      images: the folder of PNGs.
      size: the edge S of the images.
      overrides: what is read although it would be rejected.

    Returns:
      (split -> units, (file name, reason) of each record whose image is missing).
    """
    splits: dict[str, list[_KeySlice]] = {}
    missing = []
    for plan in plans:
        units, row = splits.setdefault(plan.split, []), plan.row
        path = deeplesion.find_image(images, row.file_name)
        if path is None:
            reason = f"image of {plan.id} ({plan.split}) not found under {images}"
            missing.append((row.file_name, reason))
            continue
        meta: dict[str, Any] = {"file": row.file_name, "slice_box": row.box, "spacing": row.spacing}
        if plan.lesion_idx is not None:
            meta["lesion_idx"] = plan.lesion_idx
        vectors = plan.labels, plan.label_mask
        units.append(_KeySlice(plan.id, str(path), *vectors, tuple(meta.items()), size, overrides))
    return splits, missing


def make_key_slice(unit: _KeySlice) -> unit_results.UnitResult:
    """The key slice with its neighbours, cropped to the body.

    Our choice: neighbours are the adjacent slices at the spacing of the scan (LesaNet interpolates
    slices 2 mm apart); a missing neighbour is replaced by the slice itself and counted.
    """
    try:
        volume, centre = volumes.load_series_of(unit.path, overrides=unit.overrides)
    except (Rejected, InputError) as error:
        return unit_results.UnitResult(failures=((unit.path, png.reason_without_window(error)),))
    slices = volume.neighbours(centre or 0)
    image, box = preprocess.make_triplet(slices, unit.size)
    meta = dict(unit.meta) | {"crop": box}
    record = encode_with_labels(unit.id, image, unit.labels, unit.label_mask, meta)
    counters = overview.of_volume(meta["spacing"][::-1])
    counters["neighbours repeated"] = 3 - len(volume.hu)
    return unit_results.UnitResult((record,), counters=counters)


def make_lesion(unit: _KeySlice) -> unit_results.UnitResult:
    """The patch around a lesion, see `lesions.make_patch`."""
    meta = dict(unit.meta)
    box = [place - 1 for place in meta["slice_box"]]  # DL_info counts pixels from 1
    try:
        image, meta["box"], repeated = lesions.patch_of_png(
            unit.path, box, meta["spacing"], unit.size, unit.overrides
        )
    except (Rejected, InputError) as error:
        return unit_results.UnitResult(failures=((unit.path, png.reason_without_window(error)),))
    record = encode_with_labels(unit.id, image, unit.labels, unit.label_mask, meta)
    counters = overview.of_volume(meta["spacing"][::-1]) | {"neighbours repeated": repeated}
    return unit_results.UnitResult((record,), counters=counters)


def read_labels(
    rows: Sequence[deeplesion.Lesion],
    label_file: str | os.PathLike[str],
    hand_labels: str | os.PathLike[str] | None,
    ontology: str | os.PathLike[str],
    *,
    patches: bool,
) -> tuple[Vocabulary, list[deeplesion.LabelledLesion], dict[str, Any]]:
    """Reads LesaNet's labels of the rows of `DL_info.csv`.

    Args:
      rows: of `deeplesion.read_info`.
      label_file: text-mined labels and split (JSON).
      hand_labels: hand-labelled test set (JSON), or None.
      ontology: the ontology (xlsx).
      patches: use all labels instead of the body parts, and treat uncertain ones as unknown.

    Returns:
      (vocabulary, labelled lesions, counts and the base of the lesion numbers for `dataset.json`).

    Raises:
      InputError: see `deeplesion.number_lesions`, or a term is not in the ontology.
    """
    mined = deeplesion.read_mined_labels(label_file)
    hand = deeplesion.read_hand_labels(hand_labels) if hand_labels else None
    terms = read_ontology(ontology)
    ontology_vocabulary(terms, mined.terms)  # raises if a term is unknown
    names = [term for term in mined.terms if patches or terms[term].label_class == "bodypart"]
    vocabulary = ontology_vocabulary(terms, names)
    numbering = deeplesion.number_lesions(rows, mined)
    labelled, counts = deeplesion.label_lesions(
        numbering, mined, hand, vocabulary, uncertain_unknown=patches
    )
    about = {"numbering": numbering.reason, "label_counts": counts}
    about["direct_parents"] = {
        name: [parent for parent in terms[name].parents if parent in vocabulary.index]
        for name in vocabulary.names
    }
    # The paper counts lesions with a body part only.
    about["paper_counts"] = dict.fromkeys(counts, "-") if patches else deeplesion.PAPER_COUNTS
    return vocabulary, labelled, about
