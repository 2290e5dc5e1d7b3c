"""The released models: their size, their confidences, and their use on real patients."""

import json
import pathlib

import nibabel
import numpy as np
import pytest

import maknet_jax
from maknet_jax import cli
from maknet_jax.evaluation import metrics
from maknet_jax.runs import bundle

GOLDEN = pathlib.Path(__file__).parent / "golden" / "head_neck.json"
MOST_BYTES = 12_000_000


def images():
    """Six images of a body with bone and air, int16 HU `[6, 128, 128, 3]`."""
    rows, columns = np.mgrid[:128, :128] - 63.5
    stack = []
    for number in range(6):
        hu = np.full((128, 128), -1000.0)
        hu[(rows / (40 + 3 * number)) ** 2 + (columns / (34 + 4 * number)) ** 2 < 1] = 30
        hu[((rows - 20) / 6) ** 2 + (columns / 8) ** 2 < 1] = 700
        hu[((rows + 8) / (3 + number)) ** 2 + (columns / 5) ** 2 < 1] = -900 if number % 2 else 60
        hu += np.random.default_rng(number).normal(0, 15, hu.shape)
        stack.append(np.repeat(hu[..., None], 3, -1))
    return np.clip(np.rint(stack), -1024, 3071).astype(np.int16)


@pytest.fixture(scope="module")
def model():
    return maknet_jax.load("head-neck")


def test_released_models_are_small_and_complete():
    released = bundle.released()
    assert "head-neck" in released
    assert sum(f.stat().st_size for p in released.values() for f in p.rglob("*")) <= MOST_BYTES
    for path in released["head-neck"].iterdir():
        assert b"site-packages" not in path.read_bytes(), "a path of the exporting machine"
        assert b"/maknet_jax/" not in path.read_bytes()
    card = (released["head-neck"] / "README.md").read_text()
    for part in (
        "not a medical device",
        "OpenKBP",
        "doi:10.1002/mp.14845",
        "33 patients",
        "larynx",
        "one slice of 3",
        "--model head-neck --out",
        "vertebra",
    ):
        assert part in card


def test_a_released_model_is_shown_by_its_name(model):
    assert repr(model).startswith("<maknet of head-neck: 7 labels")


def test_confidences_are_those_of_the_training_run(model):
    expected = json.loads(GOLDEN.read_text())["confidences"]
    np.testing.assert_allclose(metrics.sigmoid(model.logits(images())), expected, atol=1e-3)


def test_predict_takes_its_name(shared_data, tmp_path):
    """A validation patient: the labels are those of the contours, and no flag is raised."""
    patient = shared_data / "openkbp" / "validation" / "pt_201"
    out = tmp_path / "labels.csv"
    argv = ["predict", str(patient / "ct.nii.gz"), "--model", "head-neck", "--out", str(out)]
    assert cli.main([*argv, "--json"]) == 0
    (series,) = json.loads(out.with_suffix(".json").read_text())["series"]
    confidences = np.array(series["confidences"])
    names = maknet_jax.load("head-neck").run.vocabulary.names
    mask = nibabel.load(patient / "segmentations" / "spinal_cord.nii.gz").get_fdata()
    present = mask.any(axis=(0, 1))[::-1]  # head to feet
    lowest = np.flatnonzero(present).max()  # below it the organ is unknown
    scores = confidences[: lowest + 1, names.index("spinal_cord")]
    assert metrics.auc(scores, present[: lowest + 1]) > 0.98


def test_the_torso_is_outside_its_domain(shared_data, model):
    """Abdomen and pelvis: 90 % of the slices and the series are marked (benchmarks/RESULTS.md)."""
    torso = shared_data / "nifti" / "torso_112" / "example_ct.nii.gz"
    result = model.predict(torso)
    (series,) = result.series
    assert series.flags == ("outside",) and series.audit == "outside the domain"
    assert series.body_part.term == "" and "shows" not in str(result)  # was: shows NECK
    assert series.id == "torso_112/example_ct.nii.gz"
    assert "outside" in series.overview()["flags"]
    assert series.verdict.series_outside and np.mean(series.verdict.outside) > 0.88
