"""The CSV table of labelled slices."""

import re

import numpy as np
import pytest

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


def test_files_other_than_a_table_are_rejected(read, tmp_path):
    with pytest.raises(InputError, match="'labels'"):
        read("a.png,train\n", header="path,split\n")
    with pytest.raises(InputError, match="'path'"):
        read("", header="")
    for path in (tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            table.read_table(path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="binary.csv"):
        table.read_table(tmp_path / "binary.csv")


def volume(*names):
    hu = np.zeros((len(names), 4, 4), np.int16)
    return volumes.Volume(hu, (1.0, 1.0, 1.0), "series", names, names)


def row(name):
    return table.Row(2, "a", (), "train", name, "")


def test_a_slice_is_selected_by_stored_index_file_name_or_position():
    # NIfTI files are often stored from the feet up; slices are named by their stored index.
    stored = volume("3", "2", "1", "0")
    assert [table.slice_index(row(str(k)), stored, None) for k in range(4)] == [3, 2, 1, 0]
    files = volume("z.dcm", "a.dcm", "7.dcm")
    assert table.slice_index(row("a.dcm"), files, None) == 1
    assert table.slice_index(row("2"), files, None) == 2
    # The path is a single slice.
    assert table.slice_index(row(""), files, 1) == 1
    assert table.slice_index(row(""), volume("0"), None) == 0


@pytest.mark.parametrize(
    ("name", "names", "values"),
    [
        ("", ("0", "1"), "a has 2 slices"),
        ("4", ("1", "0"), "slice 4 .*2 .*a"),
        ("3", ("a.dcm", "b.dcm", "c.dcm"), "slice 3 .*3 .*a"),
        ("x.dcm", ("a.dcm", "b.dcm"), "x.dcm .*series"),
        ("-1", ("a.dcm", "b.dcm"), "-1 .*series"),
    ],
)
def test_missing_slices_are_rejected(name, names, values):
    with pytest.raises(InputError, match=values):
        table.slice_index(row(name), volume(*names), None)
