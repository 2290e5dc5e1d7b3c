"""Labels and series in DICOM's terms, checked against pydicom's CID 4, and the audit of tags."""

import dataclasses
import doctest

import numpy as np
import pytest
from pydicom.sr._concepts_dict import concepts

from maknet_jax.ct.volumes import Volume
from maknet_jax.data import labels
from maknet_jax.evaluation import body_parts, series_tables
from maknet_jax.evaluation.domain import Verdict
from maknet_jax.evaluation.series import SeriesResult

KNOWN = frozenset({"CHEST", "ABDOMEN", "PELVIS"})


def test_codes_and_meanings_are_those_of_cid_4():
    # A code can have several keywords in pydicom; its meaning may be listed under another one.
    meanings, in_cid_4 = {}, set()
    for entries in concepts["SCT"].values():
        for code, (meaning, contexts) in entries.items():
            meanings.setdefault(code, set()).add(meaning)
            in_cid_4 |= {code} if 4 in contexts else set()
    coded = [part[1:3] for part in body_parts._rows().values() if part.code != body_parts.NO_CODE]
    coded += [part[1:] for part in body_parts._COMBINED.values()]
    assert len(coded) > 70
    for code, meaning in coded:
        assert code in in_cid_4 and meaning in meanings[code], (code, meaning)


def test_body_parts_of_lesanet_lie_in_regions(shared_data):
    (path,) = (shared_data / "lesanet").glob("*.xlsx")
    terms = labels.read_ontology(path)
    parts = [name for name, term in terms.items() if term.label_class == "bodypart"]
    listed = [name for name in parts if body_parts.of_label(name).regions]
    assert {"left kidney", "right upper lobe", "pelvic bone", "lung"} <= set(listed)
    assert body_parts.of_label("porta Hepatis").regions == ("ABDOMEN",)


@pytest.mark.parametrize(
    "label, term, code, laterality",
    [
        ("liver", "LIVER", "10200004", ""),
        ("right kidney", "KIDNEY", "64033007", "R"),
        ("parotid_gland_left", "PAROTID", "45289007", "L"),
        ("right lung", "LUNG", "39607008", "R"),
        ("right upper lobe", "", "no code", "R"),
        ("lymph node", "", "no code", ""),
        ("top left", "", "no code", ""),
        ("", "", "no code", ""),
    ],
)
def test_labels_are_coded(label, term, code, laterality):
    part = body_parts.of_label(label)
    assert (part.term, part.code, part.laterality) == (term, code, laterality)
    assert bool(part.meaning) == (code != "no code")


@pytest.mark.parametrize(
    "tag, regions",
    [
        ("CHEST", {"CHEST"}),
        ("CHESTABDPELVIS", {"CHEST", "ABDOMEN", "PELVIS"}),
        ("NECKCHESTABDPELV", {"NECK", "CHEST", "ABDOMEN", "PELVIS"}),
        ("CHEST_TO_PELVIS", {"CHEST", "PELVIS"}),
        ("Thorax", {"CHEST"}),
        ("HEAD-NECK", {"HEAD", "NECK"}),
        ("LIVER", {"ABDOMEN"}),
        ("WHOLEBODY", set(body_parts.REGIONS)),
        ("AORTA", set()),
        ("123", set()),
        ("", set()),
    ],
)
def test_tags_name_regions(tag, regions):
    assert body_parts.regions_of_tag(tag) == regions


@pytest.mark.parametrize(
    "tag, seen, verdict",
    [
        ("", {"CHEST"}, "no tag"),
        ("AORTA", {"CHEST"}, "tag names no region"),
        ("CHEST", set(), "nothing seen"),
        ("CHEST", {"CHEST", "ABDOMEN"}, "agrees"),
        ("ABDOMENPELVIS", {"CHEST", "PELVIS"}, "agrees"),
        ("PELVIS", {"CHEST"}, "contradicts"),
        ("HEAD", {"CHEST"}, "no label for the tag"),
    ],
)
def test_the_audit_compares_the_tag_with_what_is_seen(tag, seen, verdict):
    assert body_parts.audit(tag, frozenset(seen), KNOWN) == verdict


def series(tag, **rows):
    """A series of 40 slices, 2.5 mm apart; `rows` are the slices in which each label is seen."""
    names = ("liver", "urinary bladder", "hilum", "right_kidney", "muscle")
    confidences = np.full((40, len(names)), 0.1, np.float32)
    for name, slices in rows.items():
        confidences[slices, names.index(name.replace("_", " ") if name[0] == "u" else name)] = 0.9
    slices = tuple(f"{k}.dcm" for k in range(40))
    spacing, uids = (2.5, 1.0, 1.0), tuple(f"1.2.{k}" for k in range(40))
    volume = Volume(np.zeros((40, 2, 2), np.int16), spacing, "1.2", slices, uids, None, tag)
    vocabulary, thresholds = labels.Vocabulary.from_names(names), np.full(len(names), 0.5)
    more = {"features": None, "read": lambda: volume}
    return SeriesResult.of_scores(volume, vocabulary, thresholds, confidences, **more)


def test_a_series_shows_the_regions_of_enough_slices():
    both = series("CHEST", liver=slice(5, 30), urinary_bladder=slice(35, 40))
    assert both.body_part[:3] == ("ABDOMENPELVIS", "818982008", "Abdomen and Pelvis")
    assert both.audit == "contradicts" and both.flags == ("tag",)
    once = series("CHEST", liver=slice(5, 30), hilum=slice(0, 1))  # one slice of 40: below 5 %
    assert once.body_part.term == "ABDOMEN" and once.audit == "contradicts"
    twice = series("CHEST", liver=slice(5, 30), hilum=slice(0, 2))
    assert twice.body_part.term == "CHESTABDOMEN" and twice.flags == ()
    vague = series("CHEST", muscle=slice(0, 40))
    assert vague.body_part.term == "" and vague.audit == "nothing seen"


def verdict_of(outside, *, series=False, disordered=False):
    return Verdict(np.ones(40), np.asarray(outside), 1.0, -1.0, series, disordered)


def test_a_series_outside_the_domain_is_not_judged():
    usual = series("HEAD", liver=slice(5, 30))
    some = np.arange(40) >= 38
    for verdict in (
        verdict_of(some, series=True, disordered=True),
        verdict_of(np.ones(40, bool), disordered=True),  # no threshold for series
    ):
        result = dataclasses.replace(usual, run_flags=("phantom",), verdict=verdict)
        assert result.outside and result.flags == ("phantom", "outside")
        assert result.body_part == body_parts.BodyPart() and result.audit == "outside the domain"
        overview, rows = result.overview(), list(result.cover_rows())
        assert (overview["body_part_examined"], overview["sct_code"]) == ("", "no code")
        assert overview["audit"] == "outside the domain"
        assert result.to_json()["flags"] == overview["flags"] == rows[0]["flags"]
        assert {tuple(row["flags"]) for row in result.slice_rows()} == {result.flags}
        assert {row["flags"] for row in result.table()} == {result.flags}
        header, wide = series_tables.wide([result])
        assert {row[header.index("flags")] for row in wide} == {"phantom|outside"}
        text = series_tables.describe(overview, rows)
        assert "outside the domain" in text.splitlines()[0] and "shows" not in text
        assert "ABDOMEN" not in text and "liver" in text and "unreliable" in text


def test_tables_hold_the_distances_and_their_thresholds():
    usual = series("HEAD", liver=slice(5, 30))
    far = verdict_of(np.arange(40) >= 38, series=True)
    thresholds = {"thresholds": np.full(40, 0.7), "threshold": 0.5, "order_threshold": 0.2}
    result = dataclasses.replace(usual, verdict=dataclasses.replace(far, **thresholds))
    overview, (row, *_), slices = result.overview(), result.cover_rows(), result.slice_rows()
    for each in (overview, row, result.to_json()["domain"]):
        assert (each["distance"], each["distance_threshold"]) == (1.0, 0.5)
        assert (each["order"], each["order_threshold"]) == (-1.0, 0.2)
    assert result.to_json()["domain"]["thresholds"] == [0.7] * 40
    assert {(each["distance"], each["distance_threshold"]) for each in slices} == {(1.0, 0.7)}
    first = series_tables.describe(overview, []).splitlines()[0]
    assert "distance 1.00, threshold 0.50" in first and "order of its slices" in first
    every = dataclasses.replace(usual, verdict=verdict_of(np.ones(40, bool)))
    assert "all of its slices are" in series_tables.describe(every.overview(), [])
    for each in (usual.overview(), next(usual.cover_rows()), next(usual.slice_rows())):
        assert each["distance"] is None and each["distance_threshold"] is None


def test_few_slices_say_that_they_are_judged_less_surely():
    usual = series("HEAD", liver=slice(5, 30))
    overview = dataclasses.replace(usual, verdict=verdict_of(np.zeros(40, bool))).overview()
    for slices, unsure in ((1, True), (2, True), (3, False)):
        text = series_tables.describe(overview | {"slices": slices}, [])
        assert ("may not be noticed" in text) == unsure
    without = usual.overview() | {"slices": 1}  # the network has no statistics
    assert "may not be noticed" not in series_tables.describe(without, [])
    outside = overview | {"slices": 1, "flags": ["outside"]}
    first, *_ = text = series_tables.describe(outside, []).splitlines()
    assert "1 slice," in first and "its slice is" in first and "order" not in first
    assert not any("may not be noticed" in line for line in text)


def test_slices_have_the_position_of_the_scanner_and_no_uid_without_dicom():
    usual = series("HEAD", liver=slice(0, 2))
    (first, *_) = usual.slice_rows()
    assert first["position_mm"] is None and np.isnan(usual.table()[3]["position_mm"])
    volume = usual.read()
    affine = np.diag([1.0, 1.0, -2.5, 1.0])
    affine[2, 3] = 310.0
    volume = dataclasses.replace(volume, affine=affine, file="a/ct.nii.gz")
    vocabulary = labels.Vocabulary.from_names(usual.names)
    more = {"features": None, "read": lambda: volume}
    placed = SeriesResult.of_scores(volume, vocabulary, usual.thresholds, usual.confidences, **more)
    rows = list(placed.slice_rows())
    assert [row["position_mm"] for row in rows[:3]] == [310.0, 307.5, 305.0]
    assert placed.table()[2]["position_mm"] == placed.to_json()["position_mm"][2] == 305.0
    assert {row["sop_instance_uid"] for row in rows} == {""}  # NIfTI has none
    assert rows[0]["z_mm"] == 0.0 and placed.to_json()["uids"] == list(volume.uids)
    png = dataclasses.replace(usual, uids=("sha256:ab",) * 40)
    assert {row["sop_instance_uid"] for row in png.slice_rows()} == {""}
    assert {row["uid"] for row in (*png.table(), *placed.table())} == {""}
    unnamed = dataclasses.replace(usual, id="sha256:cd").overview()
    assert series_tables.describe(unnamed, []).startswith("sha256:cd (0.dcm): 40 slices")


def test_slices_outside_the_domain_show_no_region():
    both = series("CHEST", liver=slice(5, 30), hilum=slice(36, 40))
    assert both.body_part.term == "CHESTABDOMEN" and both.flags == ()
    result = dataclasses.replace(both, verdict=verdict_of(np.arange(40) >= 36, disordered=True))
    assert result.body_part.term == "ABDOMEN" and result.flags == ("tag", "order")
    assert result.flags_of(0) == ("tag", "order")
    assert result.flags_of(39) == ("tag", "order", "outside")
    assert "shows ABDOMEN" in series_tables.describe(result.overview(), [])


def test_rows_say_from_where_to_where():
    result = series("", right_kidney=slice(10, 20))
    (row,) = result.cover_rows()
    assert (row["first_mm"], row["last_mm"], row["slices"]) == (25.0, 47.5, 10)
    assert (row["body_part_examined"], row["laterality"]) == ("KIDNEY", "R")
    rows = list(result.slice_rows())
    assert [row["label"] for row in rows] == [""] * 10 + ["right_kidney"] * 10 + [""] * 20
    assert rows[10]["z_mm"] == 25.0 and rows[10]["sop_instance_uid"] == "1.2.10"
    (empty,) = series("").cover_rows()
    assert (empty["label"], empty["slices"], empty["sct_code"]) == ("", 0, "no code")


def test_the_examples_of_the_docstrings_run():
    assert doctest.testmod(body_parts).failed == 0 < doctest.testmod(body_parts).attempted
