"""Log lines, JSONL, progress bars, tables and lists of failures."""

import csv
import json
import re
import sys

import pytest

from maknet_jax import console


def test_the_log_appends_one_json_line_per_event(tmp_path, capsys):
    path = tmp_path / "run" / "log.jsonl"
    with console.Log(path) as log:
        log.say("[bold] is not markup", step=3)
        log.event(event="saved", path=tmp_path)
    with console.Log(path) as log:
        log.event(event="again")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(event) - {"time"} for event in events] == [
        {"message", "step"},
        {"event", "path"},
        {"event"},
    ]
    assert events[0]["message"] == "[bold] is not markup" and events[0]["step"] == 3
    assert events[1]["path"] == str(tmp_path)
    assert all(event["time"] > 1e9 for event in events)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "[bold] is not markup\n"


def test_a_log_without_a_path_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with console.Log() as log:
        log.event(event="dropped")
    assert not list(tmp_path.iterdir())


def test_progress_prints_nothing_without_a_terminal(capsys):
    with console.progress("prepare", 3) as advance:
        advance()
        advance(2, note="fast")
    assert capsys.readouterr() == ("", "")


def test_failures_are_listed_and_an_old_list_is_removed(tmp_path):
    path = tmp_path / "failures.csv"
    failures = [("a,b.dcm", 'says "no"'), ("c.png", "unreadable")]
    console.write_failures(path, failures)
    with path.open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [("input", "reason"), *failures]
    console.write_failures(path, [])
    assert not path.exists()
    console.write_failures(path, [])


def test_cells_cannot_send_control_characters_or_formulas(tmp_path):
    row = [b"M\xfcller".decode(errors="surrogateescape"), "\x1b[2Jtwo\nlines\u202e", "Größe", -1.5]
    formulas = ["=1+1", "+x", "-liver", "@a", "-1.5", "-"]
    console.write_table(tmp_path / "x.csv", ("a", "b", "c", "d"), [row, formulas])
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert rows == [
        [r"M\xfcller", r"\x1b[2Jtwo\nlines\u202e", "Größe", "-1.5"],
        ["'=1+1", "'+x", "'-liver", "'@a", "-1.5", "-"],
    ]


def test_log_lines_and_text_tables_cannot_send_control_characters(capsys):
    with console.Log() as log:
        log.say("\x1b]0;title\x07\nx")
    assert capsys.readouterr().err == "\\x1b]0;title\\x07\\nx\n"
    assert "\x1b" not in console.format_table(("a",), [("\x1b[2J",)])


def test_a_table_whose_rows_fail_is_not_written(tmp_path):
    def rows():
        yield ("1", "2")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        console.write_table(tmp_path / "x.csv", ("a", "b"), rows())
    assert not list(tmp_path.iterdir())


def test_counts_agree_with_their_nouns():
    assert [console.plural(count, "row") for count in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert console.plural(12000, "row") == "12,000 rows"


@pytest.mark.parametrize(
    "groups, most, unreliable",
    [((), 0, False), ((1,), 0, False), ((9,), 9, True), ((10,), 10, False), ((33, 4), 33, True)],
)
def test_intervals_over_few_groups_are_called_unreliable(groups, most, unreliable):
    text = console.describe_groups(*groups)
    assert ("unreliable" in text) is unreliable
    assert f"the {most} patients" in text if most else text.startswith("No intervals")


@pytest.mark.parametrize(
    "patients, of_label, text",
    [
        (33, 4, "the 33 patients"),
        (33, 12, "the 33 patients"),
        (9, 4, "over fewer"),
        (1, 1, "No int"),
    ],
)
def test_labels_that_few_patients_have_are_called_unreliable(patients, of_label, text):
    entry = {"patients": of_label, "auc": [0.9, 0.8, 1.0]}
    intervals = {"patients": patients, "auc": [0.9, 0.8, 1.0], "labels": {"a": entry}}
    said = console.describe_intervals(intervals)
    assert text in said and ("Those of labels" in said) == (patients == 33 and of_label == 4)
    without = {"patients": 4, "labels": {"a": {"patients": 0}}}
    assert console.describe_intervals(without).startswith("No intervals: no label")


def test_text_tables_align_numbers_to_the_right():
    text = console.format_table(("run", "AUC"), [("teacher", 0.97), ("[b]linear[/b]", 7)])
    assert text.splitlines() == [
        "run             AUC",
        "-------------- ----",
        "teacher        0.97",
        "[b]linear[/b]     7",
    ]


def test_tables_keep_each_row_on_one_plain_line_away_from_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    labels = "|".join(f"label {number}" for number in range(171))
    lines = console.format_table(("id", "labels"), [("a", labels), ("b", "")]).splitlines()
    assert len(lines) == 4 and lines[2] == f"a   {labels}"


def test_tables_fold_cells_on_a_terminal_without_losing_text(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    labels = "|".join(f"label-{number}" for number in range(9))
    text = console.format_table(("id", "labels"), [("a", labels)])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain != text and max(map(len, plain.splitlines())) <= 20
    assert "".join(line[2:].strip() for line in plain.splitlines()[2:]) == labels


def test_numbers_without_an_interval_are_explained():
    entry = {"patients": 12, "auc": [0.9, 0.8, 1.0], "f1": [1.0, 1.0, 1.0]}
    intervals = {"patients": 33, "auc": [0.9, 0.8, 1.0], "labels": {"a": entry}}
    assert "the same in every resample" in console.describe_intervals(intervals)
    entry["f1"] = [0.9, 0.8, 1.0]
    assert "the same in every resample" not in console.describe_intervals(intervals)
