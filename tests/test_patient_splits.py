"""Splits by patient: tables, and the seeded hash."""

import collections

import pytest

from maknet_jax.data import patient_splits as ps
from maknet_jax.errors import InputError


def test_the_split_of_a_patient_depends_on_the_seed_and_the_patient_only():
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    patients = [f"pt_{n}" for n in range(2000)]
    splits = {p: ps.hashed_split(p, shares, 0) for p in patients}
    counts = collections.Counter(splits.values())
    # Three standard deviations of a binomial: 54 and 40.
    assert abs(counts["train"] - 1600) < 54
    assert abs(counts["val"] - 200) < 40 and abs(counts["test"] - 200) < 40
    other = {p: ps.hashed_split(p, shares, 1) for p in patients}
    agree = sum(splits[p] == other[p] for p in patients) / 2000
    assert abs(agree - (0.64 + 0.01 + 0.01)) < 0.04
    # Fixed: a change of the hash would move patients between splits.
    elsewhere = {n: splits[f"pt_{n}"] for n in range(12) if splits[f"pt_{n}"] != "train"}
    assert elsewhere == {0: "val", 6: "test", 9: "test"}


def test_patients_stay_in_train_when_shares_move_between_the_other_splits():
    before = {"train": 0.5, "val": 0.5}
    after = {"train": 0.5, "val": 0.25, "test": 0.25}
    for n in range(200):
        first, second = (ps.hashed_split(f"p{n}", shares, 3) for shares in (before, after))
        assert (first == "train") == (second == "train")


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"train": 0.5},
        {"train": 1.0, "val": 0.0},
        {"train": 1.5, "val": -0.5},
        {"tuning": 1.0},
        {"train": float("nan")},
    ],
)
def test_invalid_shares_are_refused(shares):
    with pytest.raises(InputError, match="sum of 1"):
        ps.check_shares(shares)


def test_tables_of_splits(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("case,split,patient\na,train,p\nb,val,\n")
    table = ps.read_split_table(path)
    assert table.split_of == {"a": "train", "b": "val"} and table.patient_of == {"a": "p"}
    assert not table.by_patient and ps.has_splits(path)
    # TotalSegmentator's meta.csv, with its byte order mark and semicolons.
    path.write_text("\ufeffimage_id;age;split;pathology\ns0000;65;train;a, b\ns0001;70;test;\n")
    table = ps.read_split_table(path)
    assert table.split_of == {"s0000": "train", "s0001": "test"} and ps.has_splits(path)
    # As R and pandas quote it; a spreadsheet adds empty rows.
    path.write_text('"image_id";"split"\r\n"s0000";"train"\r\n;\r\n"s0001";"test"\r\n')
    assert ps.has_splits(path)
    assert ps.read_split_table(path).split_of == {"s0000": "train", "s0001": "test"}
    path.write_text("patient,split\np,test\n")
    assert ps.read_split_table(path).by_patient
    path.write_text("image_id;age\ns0000;65\n")
    assert not ps.has_splits(path) and not ps.has_splits(tmp_path / "absent.csv")
    for header in ("id,note,note", '"a\nb",c'):  # of some other table
        path.write_text(f"{header}\n1,2,3\n")
        assert not ps.has_splits(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("case,set\na,train\n", "columns case, set"),
        ("name,split\na,train\n", "columns name, split"),
        ("case,split\na,tuning\n", "line 2.*'tuning'"),
        ("case,split\n,train\n", "line 2"),
        ("case,split\na,train\na,val\n", "line 3.*two splits"),
        ("case,patient,split\na,p,train\na,q,train\n", "line 3.*two patients"),
    ],
)
def test_invalid_tables_are_refused(tmp_path, text, part):
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=part):
        ps.read_split_table(path)
    with pytest.raises(InputError, match="not a file"):
        ps.read_split_table(tmp_path / "absent.csv")


def test_a_patient_in_two_splits_is_refused():
    ps.check_patients([("a", "p", "train"), ("b", "p", "train"), ("c", "q", "val")])
    with pytest.raises(InputError, match=r"\bp\b.*train \(case a\).*val \(case b\)"):
        ps.check_patients([("a", "p", "train"), ("b", "p", "val")])
