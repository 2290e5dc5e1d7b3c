"""Body order: labels that are an order, folds that part patients, and the two forms in tiny."""

import csv
import pathlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.experiments import body_order
from maknet_jax.data import table
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


def draw(folder, ranks, *, first=1, name="{:03d}_score_{:.5f}_{:06d}_01_2_33.png"):
    """Pictures of a body that gets brighter with its rank, each of another patient."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:48, :48] - 24
    body = np.square(rows) + np.square(columns) < 400
    for number, rank in enumerate(ranks, start=first):
        noise = np.random.default_rng(rank).integers(0, 20, body.shape)
        picture = np.where(body, 60 + 1.6 * rank + noise, 0).astype(np.uint8)
        Image.fromarray(picture).save(folder / name.format(rank, rank / 5 - 10, number))
    return folder


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_labels_of_a_place_are_the_thresholds_below_it():
    assert body_order.cumulative_labels(0.0) == ""
    names = body_order.cumulative_labels(1.0).split("|")
    assert len(names) == 19 and names == sorted(names)  # columns run in the order of the body
    assert names[:2] == ["beyond 05 %", "beyond 10 %"] and names[-1] == "beyond 95 %"
    for place in (0.04, 0.27, 0.5, 0.51, 0.96):
        given = [name for name in body_order.cumulative_labels(place).split("|") if name]
        assert given == [name for name in names if int(name.split()[1]) / 100 < place]
        assert abs(len(given) / len(names) - place) < 0.06


def test_places_are_the_order_from_0_to_1():
    np.testing.assert_allclose(body_order.places([7, -3, 1000, 8]), [1 / 3, 0, 1, 2 / 3])
    np.testing.assert_allclose(body_order.places([1, 1, 5]), [0, 0, 1])


def test_the_table_is_one_of_prepare_table(tmp_path):
    folder = draw(tmp_path / "slices", [4, 90, 31, 12])
    assert body_order.main(["--table", str(folder), str(tmp_path / "slices.csv")]) == 0
    rows, vocabulary = table.read_table(tmp_path / "slices.csv")
    assert [int(pathlib.Path(row.path).name[:3]) for row in rows] == [4, 12, 31, 90]
    assert [len(row.labels) for row in rows] == [0, 6, 13, 19]
    assert list(vocabulary.names) == body_order.cumulative_labels(1.0).split("|")
    assert {row.split for row in rows} == {"train"}
    assert sorted(row.patient for row in rows) == ["000001", "000002", "000003", "000004"]


def test_two_slices_have_all_labels():
    """Else the head of the phantom's network would not fit a small folder."""
    two = [body_order.Slice(pathlib.Path(name), rank, name) for rank, name in ((3, "a"), (9, "b"))]
    assert [row[1].count("beyond") for row in body_order.labelled_rows(two)] == [0, 19]


def test_no_patient_lies_in_two_folds_and_every_fold_spans_the_body(shared_data):
    slices = body_order.read_slices(shared_data / "body_part_ordinal")
    assert [one.rank for one in slices] == list(range(1, 100, 2))
    patients = [one.patient for one in slices]
    assert patients.count("000306") == 2 and len(set(patients)) == 49
    for seed in range(20):
        folds = body_order.make_folds(slices, 5, seed)
        assert len(set(zip(patients, folds, strict=True))) == 49
        assert set(np.bincount(folds)) <= {9, 10, 11}
        first = [fold for number, fold in enumerate(folds) if patients[number] != "000306"]
        for start in range(0, 40, 5):  # of five neighbours hardly two are held out together
            assert len(set(first[start : start + 5])) >= 4
    other = body_order.make_folds(slices, 5, 20)
    assert (other != folds).any()
    np.testing.assert_array_equal(other, body_order.make_folds(slices, 5, 20))


def test_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    found, ranks = rng.random(50), rng.permutation(50)
    apart = np.square(np.argsort(np.argsort(found)) - ranks).sum()
    expected = 1 - 6 * apart / (50 * (50**2 - 1))  # without ties
    assert body_order.correlation(found, ranks) == pytest.approx(expected)
    assert body_order.correlation(np.exp(ranks / 9), ranks) == pytest.approx(1)
    assert body_order.correlation(-ranks, ranks) == pytest.approx(-1)
    assert body_order.correlation([0.5, 0.5, 0.5], [1, 2, 3]) is None


def test_unlabelled_slices_are_of_other_patients(tmp_path):
    for name in ("000007_01_01_005.png", "000007_01_01_006.png", "000008_01_01_005.png"):
        draw(tmp_path / "ct", [1], name=name)
    draw(tmp_path / "ct" / "000009_01_02", [1], name="044.png")
    rows = body_order.unlabelled_rows([tmp_path / "ct"], {"000008", "000009"})
    assert [pathlib.Path(row[0]).name[:6] for row in rows] == ["000007", "000007"]
    assert {row[1:3] for row in rows} == {("", "unlabelled")}


def test_patients_of_real_volumes_that_have_a_rank_are_left_out(shared_data):
    slices = body_order.read_slices(shared_data / "body_part_ordinal")
    paths = [shared_data / path for path in body_order.UNLABELLED]
    everyone = body_order.unlabelled_rows(paths, set())
    rows = body_order.unlabelled_rows(paths, {one.patient for one in slices})
    left = {row[0] for row in everyone} - {row[0] for row in rows}
    assert {pathlib.Path(path).name[:6] for path in left} == {"003599"}
    assert sum(row[0].endswith(".nii.gz") for row in rows) == 112
    assert len(rows) > 180


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "{}/nothing", "{}/x.csv"], "holds no PNG"),
        (["--table", "{}/unnamed", "{}/x.csv"], "picture.png tells no rank: call it RANK_score"),
        (["--table", "{}/one", "{}/x.csv"], "has one rank only"),
        (["--train", "{}/two"], "--train, --predict and --out CSV belong together"),
        (["--train", "{}/two", "--predict", "{}/two"], "belong together"),
        (["--train", "{}/two", "--predict", "{}/none", "--out", "{}/x.csv"], "holds no PNG"),
        (["--seed=-1"], "--seed -1 should be 0 or above"),
    ],
)
def test_refused_in_one_line_before_anything_is_made(arguments, said, tmp_path, capsys):
    draw(tmp_path / "unnamed", [1], name="picture.png")
    draw(tmp_path / "one", [5])
    draw(tmp_path / "two", [5, 6])
    with pytest.raises((InputError, SystemExit)) as caught:
        body_order.main([argument.format(tmp_path) for argument in arguments])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = capsys.readouterr().err
    else:
        message = f"{caught.value}\n"
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.glob("*.csv"))


def test_one_folder_trains_and_another_is_placed(tmp_path, capsys, monkeypatch):
    """Brightness is the order here: a tiny network finds it."""
    monkeypatch.setattr(body_order, "FULL", body_order.FULL | {"changes": TINY["changes"]})
    seen = draw(tmp_path / "seen", range(0, 100, 4))
    other = draw(tmp_path / "other", range(2, 100, 8), first=50)
    (other / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "positions.csv"
    argv = ["--train", str(seen), "--predict", str(other), "--out", str(out), "--seed", "0"]
    assert body_order.main(argv) == 3  # a file was rejected
    rows = read_csv(out)
    assert [row["file"] for row in rows] == sorted(p.name for p in other.glob("*_*.png"))
    positions = [float(row["position"]) for row in rows]
    assert body_order.correlation(positions, range(len(rows))) > 0.9
    assert all(0 <= position <= 1 for position in positions)
    (failure,) = read_csv(out.with_suffix(".failures.csv"))
    assert failure["input"].endswith("broken.png")
    assert "13 positions, 1 slices rejected" in capsys.readouterr().out


@pytest.mark.slow  # eight trainings, though tiny
def test_every_slice_is_placed_by_networks_that_saw_no_slice_of_its_patient(tmp_path):
    slices = body_order.read_slices(draw(tmp_path / "slices", range(0, 100, 5)))
    others = body_order.unlabelled_rows([draw(tmp_path / "ct", range(0, 60, 3))], set())
    folds, found = body_order.cross_validate(slices, others, tmp_path, seed=0, settings=TINY)
    assert set(folds) == {0, 1} and set(found) == set(body_order.TITLES)
    for positions in found.values():
        assert np.isfinite(positions).all()
    assert body_order.correlation(found["random"], range(20)) > 0.8
