"""Table 2: the numbers of each round beside the paper's."""

import re

import pytest

from benchmarks.real_data import PAPER
from maknet_jax import noisy_student
from maknet_jax.data import records

VALUES = {"auc": None, "f1": 0.5, "precision": 0.25, "recall": 1.0}


def test_missing_numbers_are_dashes():
    rounds = [{"splits": {"test": VALUES, "own": VALUES}}] * 7
    header, rows = noisy_student.table(rounds, paper=True)
    assert len(header) == 1 + 8 + 4 and len(rows) == 7
    ours = ["-", "0.5000", "0.2500", "1.0000"]
    assert rows[5] == ["5 (student)", *ours, "0.9112", "0.2275", "0.1735", "0.6583", *ours]
    assert rows[6] == ["6 (student)", *ours, "-", "-", "-", "-", *ours]


def test_column_names_are_unique():
    header, _ = noisy_student.table([{"splits": {"test": VALUES, "hand": VALUES}}], paper=True)
    assert len(set(header)) == len(header) == 1 + 16
    assert header[1] == "test_auc" and header[-1] == "paper_hand_recall"


@pytest.mark.parametrize(
    ("info", "comparable"),
    [
        ({"kind": "deeplesion", "about": {}}, True),
        ({"kind": "deeplesion", "about": {"phantom": True}}, False),
        ({"kind": "table", "about": {}}, False),
        ({"kind": "dicom", "about": {}}, False),
    ],
)
def test_the_papers_numbers_stand_beside_deeplesion_only(info, comparable, tmp_path, monkeypatch):
    dataset = records.Dataset(tmp_path, info)
    assert noisy_student.is_paper_data(dataset) == comparable
    drawn = []
    monkeypatch.setattr(
        noisy_student.charts, "write_rounds", lambda _, ours, paper, **__: drawn.append(paper)
    )
    rounds = [{"splits": {"test": VALUES, "hand": VALUES}}] * 2
    noisy_student._write_table(tmp_path, rounds, paper=noisy_student.is_paper_data(dataset))
    assert list(drawn[0]) == (["test", "hand"] if comparable else [])
    for name in ("table2.csv", "table2.md"):
        assert ("paper" in (tmp_path / name).read_text()) == comparable
    assert ("0.9074" in (tmp_path / "table2.csv").read_text()) == comparable


def test_the_phantom_is_not_the_papers_data(shards):
    assert shards.info["kind"] == "deeplesion" and not noisy_student.is_paper_data(shards)


def test_the_papers_numbers_are_those_of_its_text():
    if not PAPER.is_file():
        pytest.skip(f"the paper is not at {PAPER}")
    text = PAPER.read_text()
    table = text[text.index("**Table 2.**") :]
    numbers_of_rounds = {}
    for line in re.findall(
        r"^\| (\d)(?: \(teacher\))? +\|(.*)$", table[: table.index("###")], re.M
    ):
        numbers = [float(cell) for cell in line[1].split("|") if cell.strip()]
        numbers_of_rounds[int(line[0])] = (tuple(numbers[:4]), tuple(numbers[4:]))
    assert len(numbers_of_rounds) == 6 and numbers_of_rounds == noisy_student.PAPER
