"""The CSV table of labelled slices."""

import re

import numpy as np
import pytest
from test_dicom import write_series, write_slice

from maknet_jax.ct import volumes
from maknet_jax.data import table
from maknet_jax.errors import InputError

HEADER = "path,labels,split,slice,patient\n"


@pytest.fixture
def read(tmp_path):
    def read(text, header=HEADER):
        (tmp_path / "labels.csv").write_text(header + text, encoding="utf-8-sig")
        return table.read_table(tmp_path / "labels.csv")

    return read


def test_rows_have_their_line_numbers_and_paths_relative_to_the_table(read, tmp_path):
    rows, vocabulary = read(
        "a.nii.gz, liver | spleen|liver,train,57,p1\n"
        "\n"
        '"b, c/x.dcm",,val,,p2\n'
        "d.png,lung,train,,p1\n"
    )
    assert vocabulary.names == ("liver", "lung", "spleen")
    assert [row.line for row in rows] == [2, 4, 5]
    assert rows[0] == table.Row(
        2, str(tmp_path / "a.nii.gz"), ("liver", "spleen"), "train", "57", "p1"
    )
    assert rows[1].labels == () and rows[1].path == str(tmp_path / "b, c/x.dcm")
    assert rows[0].where == f"line 2: {tmp_path}/a.nii.gz slice 57"
    assert rows[2].where == f"line 5: {tmp_path}/d.png"


def test_slice_and_patient_are_optional_and_other_columns_ignored(read):
    rows, _ = read("train,liver,a.png,x\n", header="split,labels,path,remark\n")
    assert rows[0].slice == "" and rows[0].patient == "" and rows[0].split == "train"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.nii,liver,train,57,p\na.nii,lung,train,57.0,p\n", "line 3 .*line 2"),
        ("a.png,liver,train,,p1\nb.png,liver,test,,p1\n", "line 3: .*p1.*train.*test"),
        ("a.png,liver,train,3,\na.png,lung,val,3,\n", "line 3 .*line 2"),
        ("a.png,liver,,,\n", "line 2: "),
        (",liver,train,,\n", "line 2: "),
        ("a.png,liver,../etc,,\n", "'../etc'.*train, val"),
        ("a.png,liver,Train,,\n", "'Train'.*train, val"),
        ("a.png\n", "line 2: "),
        ("a.png,,train,,\n", "labels.csv"),
        ("", "labels.csv"),
    ],
)
def test_invalid_rows_are_rejected_in_one_line(read, text, values):
    with pytest.raises(InputError, match=values) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ct.nii.gz", "./ct.nii.gz"),
        ("pngs/000001_01_01_109.png", "pngs/000001_01_01_110.png"),
        ("pngs/000001_01_01/109.png", "pngs/000001_01_01/140.png"),
        ("dicom/000.dcm", "dicom/001.dcm"),
        ("dicom", "elsewhere/copy.dcm"),
    ],
)
def test_a_volume_in_two_splits_is_refused_without_patients(read, tmp_path, one, other):
    write_series(tmp_path / "dicom", [0, 5])
    (tmp_path / "elsewhere").mkdir()
    write_slice(tmp_path / "elsewhere" / "copy.dcm", z=10)  # of the same series
    with pytest.raises(InputError, match="lines 2 and 3 .*train and test.*patient"):
        read(f"{one},liver,train,3,\n{other},lung,test,4,\n")
    rows, _ = read(f"{one},liver,train,3,\n{other},lung,train,4,\n")
    assert len(rows) == 2
    # The patients are known, or the volumes are different ones.
    read(f"{one},liver,train,3,p\n{other},lung,test,4,q\n")
    read("pngs/000001_01_01_109.png,liver,train,,\npngs/000001_01_02_109.png,lung,test,,\n")


def test_doubtful_labels_are_named_with_their_rows(tmp_path):
    rows = ["a.png,,unlabelled,,", "c.png,,train,,", ",,,,"]
    rows += [
        f"{k}.nii,{name},train,,p" for k, name in enumerate(["kidney"] * 20 + ["kidny", "L4", "L5"])
    ]
    rows += ["x.nii,liver;kidney,train,,p", "y.nii,Upper  abdomen,train,,p"]
    rows += [
        "z.nii,upper abdomen|liver,train,,p",
        "u.nii,lung|rib,train,,p",
        "v.nii,rip|lungs,train,,p",
    ]
    (tmp_path / "t.csv").write_text(HEADER + "\n".join(rows) + "\n")
    texts = []
    table.read_table(tmp_path / "t.csv", texts.append)
    assert len(texts) == 6
    expected = (
        "1 empty rows.*line 4",
        "'liver;kidney' .1 row. contains 'liver'",
        "'Upper  abdomen' .1 row., 'upper abdomen' .1 row. differ only in case or spaces",
        "'kidny' .1 row. differs from 'kidney' .20 rows. by one letter",
        "'lung' .1 row. differs from 'lungs'|'lungs' .1 row. differs from 'lung'",
        "1 of 30 rows have no label .line 3.",
    )
    for text, pattern in zip(texts, expected, strict=True):
        assert re.search(pattern, text), text


def test_unknown_labels(read):
    header = "path,labels,split,unknown\n"
    rows, _ = read("a.png,liver,train,lung| spleen\nb.png,lung|spleen,train,\n", header=header)
    assert rows[0].unknown == ("lung", "spleen") and rows[1].unknown == ()
    for text, value in (
        ("a.png,liver|lung,train,lung\n", "line 2.*'lung' is also in labels"),
        ("a.png,liver,train,lng\nb.png,lung,train,\n", "line 2.*'lng' is a label of no row"),
    ):
        with pytest.raises(InputError, match=value):
            read(text, header=header)


def test_files_other_than_a_table_are_rejected(read, tmp_path):
    with pytest.raises(InputError, match="'labels'"):
        read("a.png,train\n", header="path,split\n")
    with pytest.raises(InputError, match="'path'"):
        read("", header="")
    with pytest.raises(InputError, match="not a CSV table"):  # the quote would join all rows
        read('a.png,lung,train,,"p\nb.png,lung,val,,q\n')
    with pytest.raises(InputError, match="line 2 has 4 cells"):
        read("a.png,lung,left,train\n", header="path,labels,split\n")
    for path in (tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            table.read_table(path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="binary.csv"):
        table.read_table(tmp_path / "binary.csv")


def volume(*names, file=""):
    hu = np.zeros((len(names), 4, 4), np.int16)
    return volumes.Volume(hu, (1.0, 1.0, 1.0), "series", names, names, file=file)


def row(name):
    return table.Row(2, "a", (), "train", name, "")


def test_a_slice_is_selected_by_stored_index_file_name_or_position():
    # NIfTI files are often stored from the feet up; slices are named by their stored index.
    stored = volume("3", "2", "1", "0", file="a.nii")
    assert [table.slice_index(row(str(k)), stored, None) for k in range(4)] == [3, 2, 1, 0]
    files = volume("z.dcm", "a.dcm", "7.dcm")
    assert table.slice_index(row("a.dcm"), files, None) == 1
    assert table.slice_index(row("2"), files, None) == 2
    # pandas writes a column of integers with gaps as floats.
    assert table.slice_index(row("2.0"), files, None) == 2
    assert table.slice_index(row("3.0"), stored, None) == 0
    assert table.slice_index(row("1.0"), volume("1.0", "0.0"), None) == 0
    # DICOM files without suffix, whose names are numbers, also have positions.
    numbered = volume("31", "30", "0")
    names = [table.slice_index(row(str(k)), numbered, None) for k in (31, 30, 0, 1)]
    assert names == [0, 1, 2, 1]
    # The path is a single slice.
    assert table.slice_index(row(""), files, 1) == 1
    assert table.slice_index(row(""), volume("0"), None) == 0


@pytest.mark.parametrize(
    ("name", "names", "values"),
    [
        ("", ("0", "1"), "a has 2 slices"),
        ("4", ("1", "0"), "slice 4 .*2 .*a"),
        ("1", ("3", "2"), "slice 1 .*2 .*a"),  # part of a NIfTI: not a position
        ("3", ("a.dcm", "b.dcm", "c.dcm"), "slice 3 .*3 .*a"),
        ("x.dcm", ("a.dcm", "b.dcm"), "x.dcm .*series"),
        ("-1", ("a.dcm", "b.dcm"), "-1 .*series"),
    ],
)
def test_missing_slices_are_rejected(name, names, values):
    file = "a.nii" if names[0].isdigit() else ""
    with pytest.raises(InputError, match=values):
        table.slice_index(row(name), volume(*names, file=file), None)
