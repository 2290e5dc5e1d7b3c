"""Body order: cumulative labels, folds by patient, and small runs of both forms."""

import csv
import pathlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.experiments import body_order, ranked_slices
from maknet_jax import files
from maknet_jax.data import records, table
from maknet_jax.errors import InputError

TINY = {
    "folds": 2,
    "phantom": {"patients": 4, "unlabelled_volumes": 0, "size": 32},
    "pretraining": ("epochs=2.0", "data.batch_size=8"),
    "changes": (
        "epochs=12.0",
        "data.size=32",
        "data.batch_size=8",
        "pseudo.batch_size=8",
        "model.options.stem=8",
        "model.options.blocks=1,",
        "model.options.growth_rates=16,",
        "model.options.widths=16,",
        "optimizer.learning_rate=0.02",
    ),
}

WITHOUT_PATIENTS = ("random", "phantom", "student")


def draw(folder, ranks, *, first=1, name="{:03d}_score_{:.5f}_{:06d}_01_2_33.png"):
    """Draws a body that gets brighter with its rank, each image of another patient."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:48, :48] - 24
    body = np.square(rows) + np.square(columns) < 400
    for number, rank in enumerate(ranks, start=first):
        noise = np.random.default_rng(rank).integers(0, 20, body.shape)
        image = np.where(body, 60 + 1.6 * rank + noise, 0).astype(np.uint8)
        Image.fromarray(image).save(folder / name.format(rank, rank / 5 - 10, number))
    return folder


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_labels_are_the_thresholds_below_the_place():
    assert ranked_slices.cumulative_labels(0.0) == ""
    names = ranked_slices.cumulative_labels(1.0).split("|")
    assert len(names) == 19 and names == sorted(names)  # sorted columns follow the body
    assert names[:2] == ["beyond 05 %", "beyond 10 %"] and names[-1] == "beyond 95 %"
    for place in (0.04, 0.27, 0.5, 0.51, 0.96):
        labels = [name for name in ranked_slices.cumulative_labels(place).split("|") if name]
        assert labels == [name for name in names if int(name.split()[1]) / 100 < place]
        assert abs(len(labels) / len(names) - place) < 0.06


def test_places_are_ranks_scaled_to_0_and_1():
    np.testing.assert_allclose(ranked_slices.places([7, -3, 1000, 8]), [1 / 3, 0, 1, 2 / 3])
    np.testing.assert_allclose(ranked_slices.places([1, 1, 5]), [0, 0, 1])


def test_prepare_table_reads_the_table(tmp_path):
    folder = draw(tmp_path / "slices", [4, 90, 31, 12])
    assert body_order.main(["--table", str(folder), str(tmp_path / "slices.csv")]) == 0
    rows, vocabulary = table.read_table(tmp_path / "slices.csv")
    assert [int(pathlib.Path(row.path).name[:3]) for row in rows] == [4, 12, 31, 90]
    assert [len(row.labels) for row in rows] == [0, 6, 13, 19]
    assert list(vocabulary.names) == ranked_slices.cumulative_labels(1.0).split("|")
    assert {row.split for row in rows} == {"train"}
    assert sorted(row.patient for row in rows) == ["000001", "000002", "000003", "000004"]


def test_two_slices_have_all_labels():
    """So that the head of the pre-trained network fits a small folder too."""
    two = [
        ranked_slices.Slice(pathlib.Path(name), rank, name) for rank, name in ((3, "a"), (9, "b"))
    ]
    assert [row[1].count("beyond") for row in ranked_slices.labelled_rows(two)] == [0, 19]


def test_a_patient_is_in_one_fold_and_every_fold_spans_the_body(shared_data):
    slices = ranked_slices.read_slices(shared_data / "body_part_ordinal")
    assert [one.rank for one in slices] == list(range(1, 100, 2))
    patients = [one.patient for one in slices]
    assert patients.count("000306") == 2 and len(set(patients)) == 49
    for seed in range(20):
        folds = ranked_slices.make_folds(slices, 5, seed)
        assert len(set(zip(patients, folds, strict=True))) == 49
        assert set(np.bincount(folds)) <= {9, 10, 11}
        first = [fold for number, fold in enumerate(folds) if patients[number] != "000306"]
        for start in range(0, 40, 5):  # of five neighbours at most two share a fold
            assert len(set(first[start : start + 5])) >= 4
    other = ranked_slices.make_folds(slices, 5, 20)
    assert (other != folds).any()
    np.testing.assert_array_equal(other, ranked_slices.make_folds(slices, 5, 20))


def test_correlation_is_spearman():
    rng = np.random.default_rng(0)
    positions, ranks = rng.random(50), rng.permutation(50)
    squares = np.square(np.argsort(np.argsort(positions)) - ranks).sum()
    expected = 1 - 6 * squares / (50 * (50**2 - 1))  # without ties
    assert ranked_slices.correlation(positions, ranks) == pytest.approx(expected)
    assert ranked_slices.correlation(np.exp(ranks / 9), ranks) == pytest.approx(1)
    assert ranked_slices.correlation(-ranks, ranks) == pytest.approx(-1)
    assert ranked_slices.correlation([0.5, 0.5, 0.5], [1, 2, 3]) is None


def test_unlabelled_slices_exclude_patients_with_ranks(tmp_path):
    for name in ("000007_01_01_005.png", "000007_01_01_006.png", "000008_01_01_005.png"):
        draw(tmp_path / "ct", [1], name=name)
    draw(tmp_path / "ct" / "000009_01_02", [1], name="044.png")
    rows = ranked_slices.unlabelled_rows([tmp_path / "ct"], {"000008", "000009"})
    assert [pathlib.Path(row[0]).name[:6] for row in rows] == ["000007", "000007"]
    assert {row[1:3] for row in rows} == {("", "unlabelled")}


def test_unlabelled_slices_of_real_data_exclude_patients_with_ranks(shared_data):
    slices = ranked_slices.read_slices(shared_data / "body_part_ordinal")
    paths = [shared_data / path for path in body_order.UNLABELLED]
    everyone = ranked_slices.unlabelled_rows(paths, set())
    rows = ranked_slices.unlabelled_rows(paths, {one.patient for one in slices})
    left = {row[0] for row in everyone} - {row[0] for row in rows}
    assert {pathlib.Path(path).name[:6] for path in left} == {"003599"}
    assert sum(row[0].endswith(".nii.gz") for row in rows) == 112
    assert len(rows) > 180


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--table", "{}/nothing", "{}/x.csv"], "/nothing"),
        (["--table", "{}/unnamed", "{}/x.csv"], "unnamed.png"),
        (["--table", "{}/one", "{}/x.csv"], "/one "),
        (["--train", "{}/two"], "--out CSV"),
        (["--train", "{}/two", "--predict", "{}/two"], "--out CSV"),
        (["--train", "{}/two", "--predict", "{}/none", "--out", "{}/x.csv"], "/none"),
        (["--seed=-1"], "--seed -1"),
    ],
)
def test_bad_arguments_are_rejected_before_anything_is_written(arguments, value, tmp_path, capsys):
    draw(tmp_path / "unnamed", [1], name="unnamed.png")
    draw(tmp_path / "one", [5])
    draw(tmp_path / "two", [5, 6])
    with pytest.raises((InputError, SystemExit)) as stop:
        body_order.main([argument.format(tmp_path) for argument in arguments])
    if isinstance(stop.value, SystemExit):
        assert stop.value.code == 2
        message = capsys.readouterr().err
    else:
        message = f"{stop.value}\n"
    assert value in message and message.count("\n") == 1
    assert not list(tmp_path.glob("*.csv"))


def test_slices_of_another_folder_are_placed(tmp_path, monkeypatch):
    """The order is that of brightness, which a tiny network learns."""
    monkeypatch.setattr(body_order, "FULL", body_order.FULL | {"changes": TINY["changes"]})
    seen = draw(tmp_path / "seen", range(0, 100, 4))
    other = draw(tmp_path / "other", range(2, 100, 8), first=50)
    (other / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "positions.csv"
    argv = ["--train", str(seen), "--predict", str(other), "--out", str(out), "--seed", "0"]
    assert body_order.main(argv) == 3  # a file was rejected
    rows = read_csv(out)
    assert len(rows) == 13
    assert [row["file"] for row in rows] == sorted(p.name for p in other.glob("*_*.png"))
    positions = [float(row["position"]) for row in rows]
    assert ranked_slices.correlation(positions, range(len(rows))) > 0.9
    assert all(0 <= position <= 1 for position in positions)
    (failure,) = read_csv(out.with_suffix(".failures.csv"))
    assert failure["input"].endswith("broken.png")


def test_the_interval_contains_the_correlation_and_shrinks_with_more_slices():
    rng = np.random.default_rng(0)
    widths = []
    for count in (20, 200):
        ranks = np.arange(count)
        positions = ranks + rng.normal(size=count) * count / 3
        low, high = ranked_slices.correlation_interval(positions, ranks, draws=300)
        assert low < ranked_slices.correlation(positions, ranks) < high <= 1
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.slow  # pre-training on few steps, and four tiny trainings
def test_networks_pretrained_on_patients_place_every_slice(shared_data, tmp_path):
    slices = ranked_slices.read_slices(draw(tmp_path / "slices", range(0, 100, 5)))
    folds, positions_by_network = body_order.cross_validate(
        slices,
        [],
        tmp_path,
        seed=0,
        settings=TINY | {"openkbp": ("epochs=0.05",)},
        networks=body_order.PRETRAINED_ON_OPENKBP,
        openkbp=shared_data / "openkbp",
    )
    for positions in positions_by_network.values():
        assert np.isfinite(positions).all()
    config = files.read_json(tmp_path / "fold-0" / "openkbp" / "config.json")
    assert config["init"] == {"path": str(tmp_path / "openkbp" / "run")} | {
        "head": False,
        "shared_labels": False,
    }
    student = files.read_json(tmp_path / "fold-1" / "openkbp-student" / "run" / "config.json")
    pseudo = records.open_dataset(student["pseudo"]["path"])
    assert 3000 < sum(split["count"] for split in pseudo.info["splits"].values()) <= 4054


@pytest.mark.slow  # eight tiny trainings
def test_every_slice_is_placed_in_cross_validation(tmp_path):
    slices = ranked_slices.read_slices(draw(tmp_path / "slices", range(0, 100, 5)))
    unlabelled = ranked_slices.unlabelled_rows([draw(tmp_path / "ct", range(0, 60, 3))], set())
    folds, positions_by_network = body_order.cross_validate(
        slices, unlabelled, tmp_path, seed=0, settings=TINY, networks=WITHOUT_PATIENTS
    )
    assert set(folds) == {0, 1} and set(positions_by_network) == set(WITHOUT_PATIENTS)
    for positions in positions_by_network.values():
        assert np.isfinite(positions).all()
    assert ranked_slices.correlation(positions_by_network["random"], range(20)) > 0.8
