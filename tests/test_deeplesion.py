"""DeepLesion's table and LesaNet's labels: counts, numbering and rejected files."""

import collections
import csv
import json

import numpy as np
import pytest

from maknet_jax.data import deeplesion, labels
from maknet_jax.errors import InputError


@pytest.fixture(scope="session")
def lesanet(shared_data):
    return shared_data / "lesanet"


@pytest.fixture(scope="session")
def mined(lesanet):
    return deeplesion.read_mined_labels(lesanet / "text_mined_labels_171_and_split.json")


@pytest.fixture(scope="session")
def hand(lesanet):
    return deeplesion.read_hand_labels(lesanet / "hand_labeled_test_set.json")


@pytest.fixture(scope="session")
def body_parts(lesanet, mined):
    terms = labels.read_ontology(lesanet / "lesion_ontology_181022.xlsx")
    names = [term for term in mined.terms if terms[term].label_class == "bodypart"]
    return labels.ontology_vocabulary(terms, names)


@pytest.fixture(scope="session")
def first(shared_data):
    return shared_data / "deeplesion" / "DL_info_first_691_rows.csv"


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def numbered(path, first):
    """The rows of `path` that are among the first 691, numbered from 1."""
    key = ("File_name", "Bounding_boxes")
    numbers = {tuple(row[k] for k in key): n for n, row in enumerate(read_rows(first), start=1)}
    rows = read_rows(path)
    for row in rows:
        row["lesion_idx"] = numbers.get(tuple(row[k] for k in key))
    return [row for row in rows if row["lesion_idx"] is not None]


def everything(mined, hand):
    """A numbering in which every labelled lesion has a row."""
    count = max([*mined.split, *hand]) + 1
    row = deeplesion.Lesion(0, "a.png", 1, 1, 1, 1, (0,) * 4, (0,) * 3, (1,) * 3, False, "val", 0)
    return deeplesion.Numbering(dict.fromkeys(range(count), row), "all")


def test_the_label_files_hold_17705_1686_1640_and_490_lesions(mined, hand, body_parts):
    lesions, counts = deeplesion.label_lesions(everything(mined, hand), mined, hand, body_parts)
    kept = {split: count["kept"] for split, count in counts.items()}
    assert kept == {"train": 17705, "val": 1686, "test": 1640, "hand": 490}
    assert collections.Counter(lesion.split for lesion in lesions) == kept
    # The paper's counts exclude noisy rows, so they are not larger.
    assert all(deeplesion.PAPER_COUNTS[split] <= count for split, count in kept.items())


def test_uncertain_labels_are_positive_in_training_only(mined, hand, body_parts):
    lesions, _ = deeplesion.label_lesions(everything(mined, hand), mined, hand, body_parts)
    for lesion in lesions:
        relevant = mined.relevant.get(lesion.lesion_idx, ())
        uncertain = mined.uncertain.get(lesion.lesion_idx, ())
        if lesion.split == "train":
            assert lesion.names == relevant + uncertain and lesion.unknown == ()
        elif lesion.split == "hand":
            assert lesion.names == hand[lesion.lesion_idx] and lesion.unknown == ()
        else:
            assert lesion.names == relevant and lesion.unknown == uncertain


def test_the_real_rows_are_numbered_from_1(first, mined):
    rows = deeplesion.read_info(first)
    assert len(rows) == 691
    numbering = deeplesion.number_lesions(rows, mined)
    assert numbering.base == 1 and numbering.reason.startswith("numbered from 1: ")
    assert "from 0: " in numbering.reason and "official split" in numbering.reason
    assert numbering.lesions[1] is rows[0] and len(numbering.lesions) == 691
    assert numbering.lesions[475].slice_id == "000069_02_01_058"
    assert numbering.lesions[546].slice_id == "000078_02_01_063"
    assert {"liver", "abdomen"} <= set(mined.relevant[475])


@pytest.mark.parametrize("name", ["158_rows", "1349_rows_extra_columns", "key_slices"])
def test_files_other_than_a_prefix_are_rejected(shared_data, mined, name):
    rows = deeplesion.read_info(shared_data / "deeplesion" / f"DL_info_{name}.csv")
    with pytest.raises(InputError, match=f" {len(rows)} .*lesion_idx") as caught:
        deeplesion.number_lesions(rows, mined)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gone", [0, 100, 345, 520])
def test_a_missing_row_is_detected(first, mined, gone, tmp_path):
    # After row 546 of this file the split does not change: a missing row goes undetected there.
    rows = read_rows(first)
    del rows[gone]
    cut = deeplesion.read_info(write_rows(tmp_path / "cut.csv", rows))
    with pytest.raises(InputError, match=f" {len(cut)} .*official split"):
        deeplesion.number_lesions(cut, mined)


def test_a_shuffled_file_is_rejected(first, mined, tmp_path):
    rows = read_rows(first)
    np.random.default_rng(0).shuffle(rows)
    shuffled = deeplesion.read_info(write_rows(tmp_path / "shuffled.csv", rows))
    with pytest.raises(InputError, match="Patient_index"):
        deeplesion.number_lesions(shuffled, mined)


def test_too_few_rows_are_rejected(first, mined, tmp_path):
    few = deeplesion.read_info(write_rows(tmp_path / "few.csv", read_rows(first)[:30]))
    with pytest.raises(InputError, match=" 30 .*20"):
        deeplesion.number_lesions(few, mined)
    with pytest.raises(InputError, match="to the 0 rows"):
        deeplesion.number_lesions([], mined)


def test_a_lesion_idx_column_numbers_a_shuffled_file(first, mined, tmp_path):
    rows = numbered(first, first)
    np.random.default_rng(1).shuffle(rows)
    shuffled = deeplesion.read_info(write_rows(tmp_path / "shuffled.csv", rows))
    numbering = deeplesion.number_lesions(shuffled, mined)
    plain = deeplesion.number_lesions(deeplesion.read_info(first), mined)
    assert numbering.base is None and "lesion_idx" in numbering.reason
    assert {n: row.box for n, row in numbering.lesions.items()} == {
        n: row.box for n, row in plain.lesions.items()
    }


def test_a_lesion_idx_column_numbers_the_file_with_extra_columns(
    shared_data, first, mined, hand, body_parts, tmp_path
):
    source = shared_data / "deeplesion" / "DL_info_1349_rows_extra_columns.csv"
    rows = numbered(source, first)
    assert len(rows) > 50
    numbering = deeplesion.number_lesions(
        deeplesion.read_info(write_rows(tmp_path / "idx.csv", rows)), mined
    )
    plain = deeplesion.number_lesions(deeplesion.read_info(first), mined)
    for number, row in numbering.lesions.items():
        assert row.file_name == plain.lesions[number].file_name
    # The one noisy row of this file gets the number of a labelled lesion and must be dropped.
    noisy = next(row for row in read_rows(source) if row["Possibly_noisy"] == "1")
    spare = next(n for n in sorted(mined.split) if n > 691 and known(mined, n, body_parts))
    rows.append(noisy | {"lesion_idx": spare})
    numbering = deeplesion.number_lesions(
        deeplesion.read_info(write_rows(tmp_path / "noisy.csv", rows)), mined
    )
    lesions, counts = deeplesion.label_lesions(numbering, mined, hand, body_parts)
    assert sum(count["noisy"] for count in counts.values()) == 1
    assert spare not in {lesion.lesion_idx for lesion in lesions}
    for split, count in counts.items():
        assert count["labelled"] == count["without_row"] + count["noisy"] + count["kept"]
        assert count["kept"] == sum(lesion.split == split for lesion in lesions)


def known(mined, number, vocabulary):
    return bool(set(vocabulary.names) & set(mined.relevant[number]))


def test_rows_with_an_empty_lesion_idx_are_dropped(first, mined, tmp_path):
    rows = numbered(first, first)
    for row in rows[::2]:
        row["lesion_idx"] = ""
    numbering = deeplesion.number_lesions(
        deeplesion.read_info(write_rows(tmp_path / "half.csv", rows)), mined
    )
    assert sorted(numbering.lesions) == list(range(2, 692, 2))


def test_a_wrong_lesion_idx_column_is_rejected(first, mined, tmp_path):
    rows = numbered(first, first)
    from_zero = [row | {"lesion_idx": row["lesion_idx"] - 1} for row in rows]
    with pytest.raises(InputError, match="column lesion_idx .* is wrong .*contradict"):
        deeplesion.number_lesions(
            deeplesion.read_info(write_rows(tmp_path / "zero.csv", from_zero)), mined
        )
    rows[5]["lesion_idx"] = rows[4]["lesion_idx"]
    with pytest.raises(InputError, match="lesion_idx 5 "):
        deeplesion.number_lesions(
            deeplesion.read_info(write_rows(tmp_path / "twice.csv", rows)), mined
        )


def test_extra_columns_and_float_ages_change_nothing(shared_data, first):
    wide = deeplesion.read_info(shared_data / "deeplesion" / "DL_info_1349_rows_extra_columns.csv")
    plain = {(row.file_name, row.box): row for row in deeplesion.read_info(first)}
    assert len(wide) == 1349 and sum(row.noisy for row in wide) == 1
    shared = [row for row in wide if (row.file_name, row.box) in plain]
    assert len(shared) > 50
    for row in shared:
        other = plain[row.file_name, row.box]
        assert (row.patient, row.study, row.series, row.key_slice, row.official_split) == (
            other.patient,
            other.study,
            other.series,
            other.key_slice,
            other.official_split,
        )
        assert row.spacing == other.spacing and row.location == other.location


@pytest.mark.parametrize("base", [1, 0])
def test_the_phantom_is_numbered_by_the_base_of_its_labels(phantom, base, tmp_path):
    content = json.loads(phantom["labels"].read_text())
    for split in deeplesion.SPLITS:
        name = f"{split}_lesion_idxs"
        content[name] = [number - 1 + base for number in content[name]]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    rows = deeplesion.read_info(phantom["info"])
    numbering = deeplesion.number_lesions(rows, deeplesion.read_mined_labels(path))
    assert numbering.base == base
    assert numbering.lesions[base] is rows[0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("Train_Val_Test", "4"),
        ("Patient_index", "1.5"),
        ("Patient_index", "inf"),
        ("Bounding_boxes", "1, 2, 3"),
        ("Possibly_noisy", ""),
    ],
)
def test_an_invalid_cell_is_reported_with_its_line(phantom, tmp_path, column, value):
    rows = read_rows(phantom["info"])
    rows[1][column] = value
    with pytest.raises(InputError, match=f"bad.csv line 3 .*{value}"):
        deeplesion.read_info(write_rows(tmp_path / "bad.csv", rows))


def test_files_other_than_dl_info_are_rejected(phantom, tmp_path):
    rows = [
        {k: v for k, v in row.items() if k != "Bounding_boxes"}
        for row in read_rows(phantom["info"])
    ]
    with pytest.raises(InputError, match="'Bounding_boxes'"):
        deeplesion.read_info(write_rows(tmp_path / "narrow.csv", rows))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="'File_name'"):
        deeplesion.read_info(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="binary.csv"):
        deeplesion.read_info(tmp_path / "binary.csv")
    with pytest.raises(InputError, match="absent.csv"):
        deeplesion.read_info(tmp_path / "absent.csv")


def test_invalid_label_files_are_rejected_in_one_line(phantom, tmp_path):
    good = json.loads(phantom["labels"].read_text())
    path = tmp_path / "labels.json"
    train = good["train_lesion_idxs"]
    for change, value in (
        ({"term_list": None}, "NoneType"),
        ({"val_relevant_labels": []}, "val_relevant_labels has 0 "),
        ({"train_relevant_labels": [[9999]] * len(train)}, "IndexError"),
        ({"val_lesion_idxs": [train[0], *good["val_lesion_idxs"][1:]]}, f"{train[0]} .*train.*val"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=f"labels.json.*{value}") as caught:
            deeplesion.read_mined_labels(path)
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(InputError, match="labels.json"):
        deeplesion.read_mined_labels(path)
    path.write_text('[{"lesion_idx": 3}]')
    with pytest.raises(InputError, match="labels.json.*expanded_terms"):
        deeplesion.read_hand_labels(path)
    with pytest.raises(InputError, match="absent.json"):
        deeplesion.read_hand_labels(tmp_path / "absent.json")
