"""Table 2: the numbers of each round beside the paper's."""

import re

import pytest

from benchmarks.real_data import PAPER
from maknet_jax import noisy_student


def test_missing_numbers_are_dashes():
    values = {"auc": None, "f1": 0.5, "precision": 0.25, "recall": 1.0}
    rounds = [{"splits": {"test": values, "own": values}}] * 7
    header, rows = noisy_student.table(rounds)
    assert len(header) == 1 + 8 + 4 and len(rows) == 7
    ours = ["-", "0.5000", "0.2500", "1.0000"]
    assert rows[5] == ["5 (student)", *ours, "0.9112", "0.2275", "0.1735", "0.6583", *ours]
    assert rows[6] == ["6 (student)", *ours, "-", "-", "-", "-", *ours]


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
