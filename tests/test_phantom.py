"""The phantom: the formats of the real data, and labels checked against the organ maps."""

import csv
import hashlib
import json
import re
import zipfile

import numpy as np
import openpyxl
import pydicom
import pytest
from PIL import Image

from maknet_jax import phantom
from maknet_jax.errors import InputError
from maknet_jax.phantom import formats, reference, volumes
from maknet_jax.phantom import labels as phantom_labels

BODY_PARTS = {
    term for term in phantom_labels.TERMS if phantom_labels.ONTOLOGY[term].label_class == "bodypart"
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "data"
    return phantom.write_phantom(
        out, patients=16, unlabelled_volumes=4, size=64, slices=6, lesions_per_patient=4
    )


@pytest.fixture(scope="module")
def rows(written):
    with open(written["info"], newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def mined(written):
    return json.loads(written["labels"].read_text())


@pytest.fixture(scope="module")
def hand(written):
    return json.loads(written["hand_labels"].read_text())


def sheet(path):
    return list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))


def read_png(written, series, index):
    path = written["images"] / series / f"{index:03d}.png"
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int32) - 32768


def organ_map(written, row):
    series, key = row["File_name"][:12], row["File_name"][13:16]
    return np.load(written["masks"] / "deeplesion" / f"{series}.npz")[key]


def test_same_seed_same_bytes(tmp_path):
    def digests(name, seed):
        small = {"patients": 4, "unlabelled_volumes": 4, "slices": 3, "lesions_per_patient": 1}
        phantom.write_phantom(tmp_path / name, seed=seed, size=32, **small)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {
            str(path.relative_to(tmp_path / name)): hashlib.sha256(path.read_bytes()).digest()
            for path in files
        }

    first = digests("first", 1)
    assert first == digests("again", 1)
    other = digests("other", 2)
    images = [name for name in first if name.endswith((".png", ".dcm"))]
    assert images and not any(first[name] == other.get(name) for name in images)


def test_archives_have_fixed_dates(written):
    archives = [written["ontology"], *written["masks"].rglob("*.npz")]
    dates = set()
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            dates |= {entry.date_time[:3] for entry in archive.infolist()}
    assert dates == {(1980, 1, 1), (2018, 10, 22)}
    with zipfile.ZipFile(written["ontology"]) as archive:
        assert archive.read("docProps/core.xml").count(b">2018-10-22T00:00:00Z<") == 2


def test_formats_equal_those_of_the_real_files(written, rows, mined, hand, shared_data):
    with open(shared_data / "deeplesion/DL_info_first_691_rows.csv", newline="") as file:
        real_rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(real_rows[0])
    for column, value in rows[0].items():  # equal count of numbers in each cell
        assert value.count(", ") == real_rows[0][column].count(", "), column
    real = json.loads((shared_data / "lesanet/text_mined_labels_171_and_split.json").read_text())
    assert set(mined) == set(real)
    for split in ("train", "val", "test"):
        lengths = {len(value) for key, value in mined.items() if key.startswith(f"{split}_")}
        assert len(lengths) == 1
    real_hand = json.loads((shared_data / "lesanet/hand_labeled_test_set.json").read_text())
    assert {tuple(entry) for entry in hand} == {tuple(real_hand[0])}
    real_sheet = sheet(shared_data / "lesanet/lesion_ontology_181022.xlsx")
    phantom_sheet = sheet(written["ontology"])
    assert phantom_sheet[0] == real_sheet[0][:8]
    classes = {row[2]: row[1] for row in real_sheet}
    assert all(classes[row[2]] == row[1] for row in phantom_sheet[1:])


def test_the_ontology_is_consistent(written):
    table = {row[2]: row for row in sheet(written["ontology"])[1:]}

    def words(cell):
        return set((cell or "").split(" | ")) - {""}

    for a, b in phantom_labels.EXCLUSIVE:
        assert b in words(table[a][5])
    for term, row in table.items():
        assert term not in words(row[5])
        assert all(term in words(table[other][5]) for other in words(row[5]))
        assert all(term in words(table[child][6]) for child in words(row[7]))
        assert all(term in words(table[p][7]) for p in words(row[6]) if p in table)


def test_rows_are_in_the_original_order(rows):
    order = [
        tuple(int(row[c]) for c in formats.INFO_COLUMNS[1:5])  # patient, study, series, slice
        for row in rows
    ]
    assert order == sorted(order)
    z = {row["File_name"][:12]: [] for row in rows}
    for row in rows:
        z[row["File_name"][:12]].append(float(row["Normalized_lesion_location"].split(", ")[2]))
    assert all(values == sorted(values) for values in z.values())  # from head to feet
    assert len({row["File_name"] for row in rows}) < len(rows)  # several lesions on one slice
    assert {row["Possibly_noisy"] for row in rows} == {"0", "1"}


def test_lesions_are_numbered_from_1_and_labelled_with_the_contents_of_the_slice(
    written, rows, hand
):
    assert len(hand) > 3
    for entry in hand:
        organs = organ_map(written, rows[entry["lesion_idx"] - 1])
        spacing = float(rows[entry["lesion_idx"] - 1]["Spacing_mm_px_"].split(", ")[0])
        shown = phantom_labels.visible_terms(organs, spacing**2)
        assert set(entry["expanded_terms"]) & BODY_PARTS == shown
        assert len(entry["expanded_terms"]) == len(set(entry["expanded_terms"]))


def test_mined_labels_match_the_slices_at_base_1_only(written, rows, mined):
    def agreement(base):
        shared = []
        pairs = zip(mined["train_lesion_idxs"], mined["train_relevant_labels"], strict=True)
        for number, labels in pairs:
            row = rows[min(number - base, len(rows) - 1)]
            spacing = float(row["Spacing_mm_px_"].split(", ")[0])
            shown = phantom_labels.visible_terms(organ_map(written, row), spacing**2)
            terms = {mined["term_list"][label] for label in labels} & BODY_PARTS
            shared.append(len(terms & shown) / max(1, len(terms | shown)))
        return np.mean(shared)

    assert agreement(1) > 0.75 > agreement(0) + 0.1


def test_each_patient_is_in_one_split(rows, mined, hand):
    splits = {}
    for row in rows:
        splits.setdefault(row["Patient_index"], set()).add(row["Train_Val_Test"])
    assert all(len(names) == 1 for names in splits.values())
    assert set.union(*splits.values()) == {"1", "2", "3"}
    for official, split in enumerate(("train", "val", "test"), start=1):
        numbers = mined[f"{split}_lesion_idxs"]
        assert {rows[number - 1]["Train_Val_Test"] for number in numbers} == {str(official)}
    numbers = {entry["lesion_idx"] for entry in hand}
    assert {rows[number - 1]["Train_Val_Test"] for number in numbers} == {"3"}
    assert numbers & set(mined["test_lesion_idxs"]) and numbers - set(mined["test_lesion_idxs"])


def test_images_around_the_key_slices(written, rows):
    missing = 0
    for row in rows:
        series, key = row["File_name"][:12], int(row["Key_slice_index"])
        low, high = (int(v) for v in row["Slice_range"].split(", "))
        assert low <= key <= high
        for index in (key - 1, key, key + 1):
            exists = (written["images"] / series / f"{index:03d}.png").exists()
            assert exists == (low <= index <= high)
            missing += not exists
        hu = read_png(written, series, key)
        assert hu.shape == (64, 64) and hu.min() in (-3024, -2000, *range(-1024, -900))
        left, top, right, bottom = (float(v) for v in row["Bounding_boxes"].split(", "))
        assert 0 <= left < right < 64 and 0 <= top < bottom < 64
    assert 0 < missing < len(rows)
    with Image.open(next(written["images"].rglob("*.png"))) as image:
        assert image.mode == "I;16"


def test_unlabelled_volumes(written):
    folders = sorted(written["dicom"].iterdir())
    assert [len(list(folder.iterdir())) for folder in folders] == [6, 6, 6, 4]
    kinds = set()
    for folder in folders:
        maps = np.load(written["masks"] / "dicom" / f"{folder.name}.npz")
        data = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, folder.iterdir())}
        head_first = sorted(data, key=lambda uid: -data[uid].ImagePositionPatient[2])
        assert maps["uids"].tolist() == head_first
        for uid, organs in zip(maps["uids"].tolist(), maps["labels"], strict=True):
            one = data[uid]
            hu = one.pixel_array.astype(int) + int(one.RescaleIntercept)
            lungs = np.isin(organs, [reference.VALUE["right lung"], reference.VALUE["left lung"]])
            if lungs.sum() > 50:
                assert -950 < np.median(hu[lungs]) < -650
        kinds.add((one.Manufacturer, one.file_meta.TransferSyntaxUID))
    assert len(kinds) == 4


def test_counts_and_organ_names(written, rows, mined, hand):
    counts = written["counts"]
    assert counts["lesions"] == len(rows) and counts["hand_labelled"] == len(hand)
    assert counts["train_text_mined"] == len(mined["train_lesion_idxs"])
    assert counts["png_slices"] == len(list(written["images"].rglob("*.png")))
    assert counts["dicom_slices"] == 22
    names = json.loads((written["masks"] / "organs.json").read_text())
    assert {int(value): name for value, name in names.items()} == dict(enumerate(reference.ORGANS))


def test_writing_is_atomic(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    small = {"patients": 4, "size": 32, "slices": 3, "lesions_per_patient": 1}
    with monkeypatch.context() as patch:
        patch.setattr(volumes, "_write_volume", fail)
        with pytest.raises(OSError, match="disk full"):
            phantom.write_phantom(tmp_path / "data", **small)
    assert not list(tmp_path.iterdir())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "data"))):
        phantom.write_phantom(tmp_path / "data", **small)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "mine.txt").read_text() == "keep"


def test_arguments_out_of_range_are_rejected(tmp_path):
    for wrong in (
        {"patients": 3},
        {"size": 31},
        {"slices": 2},
        {"lesions_per_patient": 0},
        {"absent": 1.5},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            phantom.write_phantom(tmp_path / "data", **wrong)
    assert not list(tmp_path.iterdir())
