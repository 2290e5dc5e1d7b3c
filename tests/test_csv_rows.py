"""CSV tables of users: what spreadsheets write is read, what would lose rows is refused."""

import pytest

from maknet_jax.data import csv_rows
from maknet_jax.errors import InputError


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,x\n2,y\n",
        b"\xef\xbb\xbfA, B \r\n\r\n1, x\r\n,\r\n2,y,,\r\n",
        b'"a";"b"\n"1";"x"\n2;y',
        b"a,b\r1,x\r2,y\r",
        b"\na;b\n1;x\n2;y\n",
        b"a;b\r1;x\r2;y\r",
    ],
)
def test_tables_as_spreadsheets_write_them(content):
    columns, cells, _ = csv_rows.read_rows("t.csv", content)
    assert columns == ["a", "b"]
    assert [row for _, row in cells] == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]


def test_short_rows_quotes_and_line_numbers():
    rows = csv_rows.read_rows("t.csv", b'a,b\n\n"1, ""2""\n3"\nx,\n')
    assert rows.cells == [(4, {"a": '1, "2"\n3', "b": ""}), (5, {"a": "x", "b": ""})]
    assert csv_rows.read_rows("t.csv", b"") == ([], [], [])
    assert csv_rows.read_rows("t.csv", b"a,b\n\n1,2\n , \n").empty == [4]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'a,b\n"1,x\n2,y\n', "not a CSV table"),  # a quote that is never closed
        (b"a,b\n1," + b"x" * 200_000, "not a CSV table"),
        ("a,b\n1,x\n".encode("utf-16"), "UTF-8"),
        (b"a,b,A\n1,x,2\n", "two columns 'a'"),
        (b"a,b\n1,x, y\n", "line 2 has 3 cells"),
    ],
)
def test_tables_that_would_lose_cells_are_refused(content, part):
    with pytest.raises(InputError, match=part):
        csv_rows.read_rows("t.csv", content)
