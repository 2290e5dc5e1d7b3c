"""The benchmark of missing masks, on generated patients."""

import json

import organ_cases
import pytest

from benchmarks.experiments import missing_is_absent


@pytest.mark.slow
def test_both_forms_are_scored_on_the_same_known_labels(tmp_path):
    for n in range(16):
        organ = [0, 0, *[20] * 6, 0, 0, 0, 0]
        masks = {"spinal_cord": organ, "esophagus": [0] * 12 if n in (4, 5) else organ}
        organ_cases.write_case(tmp_path / "patients" / f"pt_{n:02d}", masks, n)
    argv = ["--quick", "--patients", str(tmp_path / "patients"), "--folder", str(tmp_path / "run")]
    missing_is_absent.main([*argv, "--out", str(tmp_path / "out.json")])
    forms = json.loads((tmp_path / "out.json").read_text())["results"]["linear"]
    assert list(forms) == ["unknown", "absent"]
    for (scores,) in forms.values():
        assert list(scores) == ["esophagus", "spinal_cord", ""]
        assert 0 <= scores["esophagus"]["auc"] <= 1
    known = {}
    for form in forms:
        info = json.loads((tmp_path / "run" / "shards" / form / "dataset.json").read_text())
        assert info["splits"]["val"]["count"] == 4 * 4
        known[form] = info["splits"]["val"]["known_counts"]
    # Unknown are the slices below the organs, and all four of the patient with an empty mask.
    assert known == {"absent": [16, 16], "unknown": [9, 12]}
