"""Where benchmarks write their results."""

import json
import subprocess

import pytest

from benchmarks import harness


@pytest.mark.parametrize(
    "argv, extent, file",
    [
        ([], "full", "some-here.json"),
        (["--size", "256"], "full", "some-here.json"),
        (["--size", "128"], "partial", "some-partial-here.json"),
        (["--quick", "--size", "64"], "quick", "some-quick-here.json"),
    ],
)
def test_quick_and_partial_results_have_separate_file_names(
    argv, extent, file, tmp_path, monkeypatch
):
    monkeypatch.setattr(harness, "OUT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "device", lambda: {"name": "Here"})
    parser = harness.parser("some.py", "")
    chosen = harness.parse(parser, argv, full={"size": 256, "repeats": 1}, quick={"size": 32})
    harness.report("some.py", argv, chosen, ["a"], [["b"]], [], {})
    assert json.loads((tmp_path / file).read_text())["settings"]["extent"] == extent
    assert not (tmp_path / "results").exists()
    chosen.record = True
    harness.report("some.py", argv, chosen, ["a"], [["b"]], [], {})
    assert (tmp_path / "results" / file).is_file()


def test_git_ignores_the_default_folder_of_results():
    repo = harness.BENCHMARKS.parent
    if not (repo / ".git").exists():
        pytest.skip("not a clone of the repository: nothing to ignore")
    ignored = ["git", "-C", str(repo), "check-ignore", "-q", str(harness.OUT / "x.json")]
    assert subprocess.run(ignored).returncode == 0
