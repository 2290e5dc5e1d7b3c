"""Counts about a prepared data set in `dataset.json` and on its page."""

import json
import math
import re

import numpy as np
import pytest
from test_page import check_page

from maknet_jax import prepare
from maknet_jax.data import overview
from maknet_jax.figures import dataset_page


def test_volumes_are_counted_among_the_counters():
    counters = {"slices left over": 2}
    for spacing, slices in (((2.5, 0.7, 0.7), 112), ((2.5, 0.9, 0.9), 20), ((math.nan,) * 3, None)):
        for name, count in overview.of_volume(spacing, slices).items():
            counters[name] = counters.get(name, 0) + count
    others, volumes = overview.separate(counters)
    assert others == {"slices left over": 2}
    assert volumes == {
        "slices": {"20": 1, "112": 1},
        "mm between slices": {"2.5": 2, "unknown": 1},
        "mm per pixel": {"0.7": 1, "0.9": 1, "unknown": 1},
    }
    assert list(volumes["slices"]) == ["20", "112"], "in numeric order"
    assert overview.separate({}) == ({}, {})


def test_an_empty_validation_split_is_reported():
    summary = {"about": {"kind": "table"}, "counters": {}, "failures": 0, "out": "out"}
    for counts, says in (({"train": 5}, True), ({"train": 5, "val": 0}, True)):
        assert ("split val" in overview.describe(summary | {"records": counts})) == says
    for counts in ({"train": 5, "val": 1}, {"unlabelled": 5}):
        assert "split val" not in overview.describe(summary | {"records": counts})


def test_equal_reasons_agree_without_their_names_and_numbers(tmp_path):
    for name in ("Hans 1.dcm", "Hans 2.dcm"):
        (tmp_path / name).write_bytes(b"x")
    failures = [
        (str(tmp_path / "Hans 1.dcm"), "Hans 1.dcm: truncated pixel data: 12 bytes, expected 20"),
        (str(tmp_path / "Hans 2.dcm"), "Hans 2.dcm: truncated pixel data: 8 bytes, expected 2.5"),
        ("line 3: gone.dcm", f"{tmp_path} has 8 slices, fewer than --min-slices 51"),
    ]
    assert overview.by_reason(failures) == {
        "truncated pixel data: N bytes, expected N": 2,
        "… has N slices, fewer than --min-slices 51": 1,
    }


@pytest.mark.parametrize("whole", [True, False])
def test_many_values_are_binned_and_none_is_lost(whole):
    values = np.random.default_rng(0).uniform(0.3, 400, 60)
    counts = {f"{value:.0f}" if whole else f"{value:.3g}": 2 for value in values} | {"unknown": 3}
    bars = dataset_page._bars(counts)
    assert 5 < len(bars) <= dataset_page._MOST_BARS + 3
    assert sum(int(count) for _, count, _ in bars) == sum(counts.values())
    assert max(share for *_, share in bars) == 100
    edges = [tuple(map(float, value.split(" to "))) for value, *_ in bars[:-1]]
    gap = 1 if whole else 0
    assert all(a[1] + gap == b[0] for a, b in zip(edges, edges[1:], strict=False))
    for text in set(counts) - {"unknown"}:
        (bar,) = [e for e in edges if e[0] <= float(text) <= e[1] - (0 if whole else 1e-9)]
        assert bar
    assert dataset_page._bars({"2": 1, "3": 4}) == [("2", "1", 25.0), ("3", "4", 100.0)]


def test_dataset_json_has_the_geometry_and_the_reasons(phantom, tmp_path):
    salt = tmp_path / "salt"
    salt.write_text("a secret of the user, long enough\n")
    out = tmp_path / "out"
    prepare.prepare_dicom(phantom["dicom"], out, salt_file=salt, min_slices=9, size=32)
    info = json.loads((out / "dataset.json").read_text())
    assert info["volumes"]["slices"] == {"12": 1} and sum(info["rejected"].values()) == 1
    (reason,) = info["rejected"]
    assert "--min-slices 9" in reason
    assert sum(info["volumes"]["mm between slices"].values()) == 1
    assert info["counters"] == {"slices left over": 0}
    text = (out / "index.html").read_text()
    assert check_page(text) == info["splits"]["unlabelled"]["count"] == 4
    assert reason in text and "12" in text


def test_the_page_shows_label_counts_and_the_paper_s_counts(shards):
    text = (shards.path / "index.html").read_text()
    assert check_page(text) == 24
    assert "17697" in text, "the counts of the paper"
    rows = re.findall(r"<tr><td>([^<]+)</td>\n(.*?)</tr>", text, re.S)
    shown = {
        name: re.findall(r">(\d+)(?: <small>\((\d+)\)</small>)?</td>", cells)
        for name, cells in rows
    }
    splits = shards.info["splits"].values()
    for column, name in enumerate(shards.vocabulary.names):
        expected = [
            (str(s["label_counts"][column]), str(s["count"] - s["known_counts"][column] or ""))
            for s in splits
        ]
        assert shown[name] == expected
    assert any(unknown for cells in shown.values() for _, unknown in cells)
