"""Masks to labels: the rules, the tables of labels, and the units of a case."""

import csv
import importlib.resources

import nibabel
import numpy as np
import organ_cases
import pytest

from maknet_jax.ct import search
from maknet_jax.data import deeplesion, labels, overview, records, segmentations
from maknet_jax.data.segmentation_cases import Case, Mask, find_cases
from maknet_jax.data.segmentations import Rules, State
from maknet_jax.errors import InputError

P, A, S, B, E, M = (
    State.PRESENT,
    State.ABSENT,
    State.SMALL,
    State.BELOW,
    State.EMPTY,
    State.MISSING,
)
AREAS = np.array([0.0, 30.0, 50.0, 400.0, 49.9, 0.0, 0.0])


@pytest.mark.parametrize(
    ("complete", "options", "expected"),
    [
        (A, {}, [A, S, P, P, S, A, A]),
        (A, {"min_area": 0.0}, [A, P, P, P, P, A, A]),
        (A, {"min_area": 1000.0}, [A, S, S, S, S, A, A]),
        (A, {"unknown_below": True}, [A, S, P, P, S, B, B]),
        # A part of the label has no mask: where no other part is present, nothing is known.
        (M, {}, [M, S, P, P, S, M, M]),
        (E, {"unknown_below": True}, [E, S, P, P, S, E, E]),
    ],
)
def test_the_state_of_a_label_in_each_slice(complete, options, expected):
    options = {"min_area": 50.0, "unknown_below": False} | options
    assert segmentations.label_states(AREAS, complete, **options).tolist() == expected


@pytest.mark.parametrize("unknown_below", [False, True])
def test_an_organ_without_any_area_is_absent_or_unknown_everywhere(unknown_below):
    for complete in (A, E, M):
        states = segmentations.label_states(
            np.zeros(3), complete, min_area=50.0, unknown_below=unknown_below
        )
        assert states.tolist() == [complete] * 3


@pytest.mark.parametrize(
    ("count", "every", "expected"),
    [
        (5, 1, [0, 1, 2, 3, 4]),
        (8, 3, [1, 4, 7]),
        (9, 2, [1, 3, 5, 7]),
        (2, 10, [1]),
        (1, 5, [0]),
    ],
)
def test_every_nth_slice_is_a_middle_slice(count, every, expected):
    assert list(segmentations.middle_slices(count, every)) == expected


def unit_of(folder, table=None, **rules):
    """The unit of the only case in a folder."""
    (case,) = find_cases(folder).cases
    chosen, _ = segmentations.choose_labels([case], table)
    splits = segmentations.plan_cases([(case, "train")], chosen, rules=Rules(**rules), size=32)
    (unit,) = splits["train"]
    return unit


def vectors(result):
    """(labels, label masks) of the records of a unit: `[records, K]` each, as lists."""
    examples = [records.decode(payload) for payload, _, _ in result.examples]
    stored = [(e.labels.tolist(), e.label_mask.tolist()) for e in examples]
    assert stored == [(values.tolist(), mask.tolist()) for _, values, mask in result.examples]
    return [list(column) for column in zip(*stored, strict=True)]


# 9 pixels are 54 mm2, 8 are 48.
LIVER = [0, 0, 8, 9, 20, 20, 9, 8, 0, 0, 0, 0]
CORD = [20, 20, 20, 20, 20, 20, 20, 20, 20, 0, 0, 0]


def test_a_case_becomes_labelled_triplets(tmp_path):
    folder = organ_cases.write_case(tmp_path / "case", {"liver": LIVER, "cord": CORD})
    result = segmentations.make_case(unit_of(tmp_path, every=2, unknown_below=("cord",)))
    assert result.failures == ()
    values, known = vectors(result)
    # Columns cord, liver; slices 1, 3, 5, 7, 9, 11.
    assert values == [[1, 0], [1, 1], [1, 1], [1, 0], [0, 0], [0, 0]]
    assert known == [[1, 1], [1, 1], [1, 1], [1, 0], [0, 1], [0, 1]]
    counters, volumes = overview.separate(result.counters)
    assert volumes["slices"] == {"12": 1} and volumes["mm between slices"] == {"5": 1}
    assert counters == {
        "labels unknown: area below --min-area": 1,
        "labels unknown: below the lowest contour": 2,
        "labels unknown: empty mask": 0,
        "labels unknown: no mask": 0,
    }
    example = records.decode(result.examples[1][0])
    assert example.id == "case-0003" and example.image.shape == (32, 32, 3)
    assert example.meta["slice"] == 3 and example.meta["slices"] == 12
    assert example.meta["patient"] == example.meta["case"] == "case"
    assert example.meta["spacing"] == list(organ_cases.SPACING)
    # The crop is the body with its margin of 1 %, which rounds to 0 at 40 pixels.
    assert example.meta["crop"] == [6, 4, 34, 36]
    assert folder.is_dir()


def test_channels_are_consecutive_slices_from_head_to_feet(tmp_path):
    folder = organ_cases.write_case(tmp_path / "case", {"liver": LIVER})
    hu = np.where(organ_cases.ct() > -500, 0, -1000).astype(np.int16)
    hu[:, 10:30, 10:30] = 100 * np.arange(12)[:, None, None]
    organ_cases.write_nifti(folder / "ct.nii.gz", hu)
    result = segmentations.make_case(unit_of(tmp_path, every=3))
    centres = [records.decode(p).image[16, 16].tolist() for p, _, _ in result.examples]
    assert centres == [[0, 100, 200], [300, 400, 500], [600, 700, 800], [900, 1000, 1100]]


@pytest.mark.parametrize(
    ("rules", "known", "counters"),
    [
        ({}, [1, 0, 0], {"no mask": 12, "empty mask": 12}),
        ({"missing_is_absent": True}, [1, 1, 1], {"no mask": 0, "empty mask": 0}),
    ],
)
def test_missing_and_empty_masks_are_unknown_by_default(tmp_path, rules, known, counters):
    organ_cases.write_case(tmp_path / "a", {"cord": [20] * 12, "liver": [0] * 12})
    organ_cases.write_case(tmp_path / "b", {"cord": [20] * 12, "spleen": LIVER})
    cases = find_cases(tmp_path).cases
    chosen, _ = segmentations.choose_labels(cases, None)
    assert list(chosen) == ["cord", "liver", "spleen"]
    units = segmentations.plan_cases([(cases[0], "train")], chosen, rules=Rules(**rules), size=32)[
        "train"
    ]
    result = segmentations.make_case(units[0])
    values, masks = vectors(result)
    assert values == [[1, 0, 0]] * 12 and masks == [known] * 12
    assert result.counters["empty masks"] == 1
    assert result.counters["organs without a mask"] == 1
    for reason, count in counters.items():
        assert result.counters[f"labels unknown: {reason}"] == count


def test_several_masks_form_one_label(tmp_path):
    # Each lobe has 30 mm2 in slice 2, their union 60: present. The same pixels count once.
    upper, lower = organ_cases.organ([0] * 12), organ_cases.organ([0] * 12)
    upper[2, 20, 10:15] = lower[2, 20, 15:20] = True
    upper[3, 20, 10:15] = lower[3, 20, 10:15] = True
    organ_cases.write_case(tmp_path / "case", {"other": LIVER})
    for name, mask in (("upper", upper), ("lower", lower)):
        path = tmp_path / "case" / "segmentations" / f"{name}.nii.gz"
        organ_cases.write_nifti(path, mask.astype(np.uint8))
    table = {"lung": ("upper", "lower"), "upper lung": ("upper",), "both": ("lower", "none")}
    result = segmentations.make_case(unit_of(tmp_path, table))
    values, masks = vectors(result)
    assert values[2] == [1, 0, 0] and masks[2] == [1, 0, 0]
    assert values[3] == [0, 0, 0] and masks[3] == [0, 0, 0]
    # `both` has a part without a mask: unknown where the other part is not present.
    assert masks[0] == [1, 1, 0]
    # At 24 mm2 the single lobes are present, too.
    values, masks = vectors(segmentations.make_case(unit_of(tmp_path, table, min_area=24.0)))
    assert values[2] == [1, 1, 1] and masks[2] == [1, 1, 1]


def test_masks_that_are_not_named_are_not_opened(tmp_path):
    folder = organ_cases.write_case(tmp_path / "case", {"liver": LIVER})
    (folder / "segmentations" / "broken.nii.gz").write_bytes(b"not a NIfTI")
    result = segmentations.make_case(unit_of(tmp_path, {"liver": ("liver",)}))
    assert len(result.examples) == 12 and result.failures == ()
    result = segmentations.make_case(unit_of(tmp_path))
    ((path, reason),) = result.failures
    assert result.examples == () and path == str(folder / "ct.nii.gz")
    assert "broken" in reason and "broken.nii.gz" in reason


@pytest.mark.parametrize(
    ("spacing", "shift", "flip", "part"),
    [
        (organ_cases.SPACING, 0.5, False, "0.50 mm"),
        ((5.0, 2.0, 3.03), 0.0, False, "mm apart"),
        (organ_cases.SPACING, 0.0, True, "mm apart"),
    ],
)
def test_a_mask_on_another_grid_rejects_the_case_by_name(tmp_path, spacing, shift, flip, part):
    folder = organ_cases.write_case(tmp_path / "case", {"liver": LIVER})
    mask = organ_cases.organ(CORD).astype(np.uint8)
    path = folder / "segmentations" / "cord.nii.gz"
    if flip:  # stored from the head down: equal shape, other orientation
        spacing = (-spacing[0], *spacing[1:])
    organ_cases.write_nifti(path, mask, spacing, shift)
    result = segmentations.make_case(unit_of(tmp_path))
    ((_, reason),) = result.failures
    assert result.examples == () and str(path) in reason and part in reason
    organ_cases.write_nifti(path, mask[:, :, :-1])
    ((_, reason),) = segmentations.make_case(unit_of(tmp_path)).failures
    assert "shape (39, 40, 12), not (40, 40, 12)" in reason


@pytest.mark.parametrize(("degrees", "present"), [(0, 4), (20, 2)])
def test_the_area_of_sheared_pixels_is_that_of_parallelograms(tmp_path, degrees, present):
    """9 pixels are 54 mm2; at 20 degrees 50.7 mm2, but below a minimum of 51."""
    folder = organ_cases.write_case(tmp_path / "case", {"liver": LIVER})
    for path in folder.rglob("*.nii.gz"):
        image = nibabel.load(path)
        affine = image.affine.copy()
        angle, length = np.radians(degrees), np.linalg.norm(affine[:3, 1])
        affine[:2, 1] = -length * np.sin(angle), -length * np.cos(angle)
        nibabel.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(path)
    values, known = vectors(segmentations.make_case(unit_of(tmp_path, min_area=51.0)))
    assert np.sum(values) == present and np.sum(known) == 6 + present


def test_label_tables(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("mask,label\na,x\nb,x\nb,y\nc,\na,x\n")
    assert segmentations.read_label_table(path) == {"x": ("a", "b"), "y": ("b",)}
    for text, part in [
        ("mask\na\n", "label"),
        ("mask,label\n,x\n", "line 2"),
        ("mask,label\na,\n", "no label"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=part):
            segmentations.read_label_table(path)
    with pytest.raises(InputError, match="not a file"):
        segmentations.read_label_table(tmp_path / "absent.csv")
    path.write_text("mask,label\na,x\x1b[31m\n")
    assert list(segmentations.read_label_table(path)) == ["x\\x1b[31m"]


def case_with(*names):
    ref = search.SeriesRef("nifti", ("ct.nii.gz",), "case", 3, ".")
    return Case("case", "case", ref, tuple((name, Mask("file", name)) for name in names))


def test_labels_whose_masks_no_case_has_are_left_out_and_named():
    table = {"x": ("a", "b"), "y": ("c",)}
    chosen, absent = segmentations.choose_labels([case_with("a", "d")], table)
    assert chosen == {"x": ("a", "b")} and absent == ["b", "c"]
    with pytest.raises(InputError, match="none of the 3 masks.*d"):
        segmentations.choose_labels([case_with("d")], table)
    for any_table in (None, table):
        with pytest.raises(InputError, match="no case has a mask"):
            segmentations.choose_labels([case_with()], any_table)


@pytest.mark.parametrize(
    "rules",
    [{"min_area": -1.0}, {"min_area": float("nan")}, {"every": 0}, {"unknown_below": ("spleen",)}],
)
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(InputError, match=str(next(iter(rules)))[:5].replace("_", "-")):
        segmentations.check_rules(Rules(**rules), ["liver"])


def shipped_rows():
    resource = importlib.resources.files("maknet_jax.data") / "totalsegmentator.csv"
    return list(csv.DictReader(resource.read_text(encoding="utf-8").splitlines()))


def test_each_name_of_totalsegmentator_has_labels_or_a_reason():
    rows = shipped_rows()
    assert all(bool(row["label"]) != bool(row["reason"]) and None not in row for row in rows)
    of_mask = {}
    for row in rows:
        of_mask.setdefault(row["mask"], []).append(row["label"])
    version_1 = {row["mask"] for row in rows if row["reason"].startswith("version 1")}
    assert len(of_mask) - len(version_1) == 117
    assert all(labels == [""] or "" not in labels for labels in of_mask.values())
    assert all(len(set(labels)) == len(labels) for labels in of_mask.values())
    table = segmentations.read_label_table(segmentations.TOTALSEGMENTATOR)
    assert len(table["lung"]) == 5 and len(table["rib"]) == 24 and len(table["spine"]) == 26
    assert len(table["thoracic spine"]) == 12 and len(table["lumbar"]) == 5
    assert table["right kidney"] == ("kidney_right",) and table["sacrum"] == ("sacrum",)


def test_the_labels_of_the_shipped_table_are_deeplesions_body_parts(shared_data):
    folder = shared_data / "lesanet"
    mined = deeplesion.read_mined_labels(folder / "text_mined_labels_171_and_split.json")
    terms = labels.read_ontology(folder / "lesion_ontology_181022.xlsx")
    body_parts = {term for term in mined.terms if terms[term].label_class == "bodypart"}
    assert len(body_parts) == 115
    table = segmentations.read_label_table(segmentations.TOTALSEGMENTATOR)
    assert len(table) == 35 and set(table) <= body_parts
    # A mask whose label has a parent among the labels of the table is part of the parent, too.
    for label, masks in table.items():
        for parent in terms[label].parents:
            if parent in table:
                assert set(masks) <= set(table[parent]), (label, parent)


def test_the_masks_of_a_real_label_map_are_named_in_the_shipped_table(shared_data, tmp_path):
    source = shared_data / "nifti" / "torso_112"
    (tmp_path / "s0000").mkdir()
    (tmp_path / "s0000" / "ct.nii.gz").symlink_to(source / "example_ct.nii.gz")
    (tmp_path / "s0000" / "segmentation.nii.gz").symlink_to(
        source / "example_seg_fast_force_split.nii.gz"
    )
    (case,) = find_cases(tmp_path).cases
    names = dict(case.masks)
    assert len(names) == 117 and names["liver"].number == 5
    assert set(names) <= {row["mask"] for row in shipped_rows()}
    table = segmentations.read_label_table(segmentations.TOTALSEGMENTATOR)
    unit = unit_of(tmp_path, table, every=4, missing_is_absent=True)
    values, masks = vectors(segmentations.make_case(unit))
    order = [label for label, _ in unit.labels]
    columns = np.array(values)
    first = {name: int(np.argmax(columns[:, order.index(name)])) for name in order}
    # From head to feet.
    assert first["lung"] <= first["liver"] < first["right kidney"] < first["urinary bladder"]
    assert first["urinary bladder"] < first["femur"] < len(values)
