"""The benchmark of out-of-domain flags, on generated patients."""

import json

import numpy as np
import organ_cases
import pytest

from benchmarks.experiments import out_of_domain
from maknet_jax import prepare, train
from maknet_jax.ct.volumes import Volume
from maknet_jax.errors import InputError
from maknet_jax.prepare import Rules, SplitOptions
from maknet_jax.runs import config as configs


@pytest.mark.parametrize("name", out_of_domain.CHANGES)
def test_changes_keep_hu_and_geometry(name):
    hu = np.random.default_rng(0).integers(-1024, 2000, (5, 8, 8)).astype(np.int16)
    names = tuple("01234")
    volume = Volume(hu, (3.0, 1.0, 1.0), "series", names, names)
    changed = out_of_domain._changed(volume, name)
    assert changed.hu.dtype == np.int16
    assert len(changed.slices) == len(changed.uids) == len(changed.hu)
    length = (len(changed.hu) - 1) * changed.spacing[0]
    assert 12 - changed.spacing[0] < length <= 12  # mm, as before
    if name.startswith("turned") or "swapped" in name:
        np.testing.assert_array_equal(np.sort(changed.hu.ravel()), np.sort(hu.ravel()))
        assert (changed.hu != hu).any()
    if name == "slices 1 mm apart":
        np.testing.assert_array_equal(changed.hu[::3], hu)


@pytest.mark.slow
def test_tuning_patients_are_scored(tmp_path):
    for n in range(16):
        organ_cases.write_case(tmp_path / "train" / f"pt_{n:02d}", {"cord": [20] * 12}, n)
    splits = tmp_path / "splits.csv"
    rows = [f"pt_{n:02d},{'train' if n % 4 else 'val'}" for n in range(16)]
    splits.write_text("\n".join(["case,split", *rows]))
    prepare.prepare_segmentations(
        [tmp_path / "train"],
        tmp_path / "data",
        rules=Rules(every=1),
        splits=SplitOptions(splits),
        size=16,
    )
    changes = [f"data.path={tmp_path / 'data'}", "data.size=16", "data.batch_size=16", "epochs=1"]
    train.train(configs.load("linear", changes), tmp_path / "run")
    argv = ["--model", str(tmp_path / "run"), "--openkbp", str(tmp_path), "--quick"]
    out = tmp_path / "out.json"
    out_of_domain.main([*argv, "--patients", "tuning", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert list(results) == list(out_of_domain.QUICK_CHANGES)
    assert results["as they are"]["series"] == 2
    assert results["every second slice"]["slices"] * 2 == results["as they are"]["slices"]
    with pytest.raises(InputError, match="holds no patient"):
        out_of_domain.main([*argv, "--patients", "validation", "--out", str(out)])
