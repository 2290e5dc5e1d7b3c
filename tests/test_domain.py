"""Out-of-domain statistics and verdicts, on simulated features of patients along the body."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial import distance

from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.evaluation import domain, domain_fit
from maknet_jax.evaluation.domain_fit import Slices

FEATURES = 12
MIXING = np.random.default_rng(9).normal(size=(4, FEATURES))


def patients(count, seed, *, step=3.0, length=240.0, shift=0.0):
    """Slices of `count` patients: features run along a curve from head to feet, with noise."""
    rng = np.random.default_rng(seed)
    features, names, positions = [], [], []
    for number in range(count):
        mm = np.arange(0, length, step)
        angle = (mm + rng.uniform(0, 40)) / 60
        curve = np.stack([np.cos(angle), np.sin(angle), angle / 3, 0 * angle + 1], axis=1)
        noise = 0.1 * rng.normal(size=FEATURES) + 0.1 * rng.normal(size=(len(mm), FEATURES))
        features.append(curve @ MIXING + noise + shift)
        names += [f"{seed}-{number}"] * len(mm)
        positions.append(mm)
    return Slices(np.concatenate(features), np.array(names), np.array(names), np.hstack(positions))


def verdicts(statistics, slices, reverse=False):
    for rows in slices.by_series():
        features = slices.features[rows]
        yield statistics.judge(features[::-1] if reverse else features, slices.mm[rows])


@pytest.fixture(scope="module")
def statistics():
    return domain_fit.fit(patients(40, 1, step=8), patients(20, 2, step=8))


def test_patients_like_the_training_patients_are_inside(statistics):
    results = list(verdicts(statistics, patients(40, 3)))
    assert np.mean(np.concatenate([result.outside for result in results])) < 0.03
    assert sum(result.series_outside or result.out_of_order for result in results) <= 1


def test_other_features_are_outside(statistics):
    results = list(verdicts(statistics, patients(10, 3, shift=0.6)))
    assert np.mean(np.concatenate([result.outside for result in results])) > 0.9
    assert all(result.series_outside for result in results)
    turned = list(verdicts(statistics, patients(10, 3, shift=0.6), reverse=True))
    assert all(result.series_outside and result.order < 0 for result in turned)
    for result in results:  # the thresholds are those that decided
        np.testing.assert_array_equal(result.outside, result.distances > result.thresholds)
        assert result.distance > result.threshold == statistics.series_threshold
        assert result.order_threshold == statistics.order_threshold
    assert not any(result.out_of_order for result in turned)  # not judged outside the domain


def test_only_the_other_slices_of_a_series_are_outside(statistics):
    one = patients(1, 5)
    features = one.features + 1.5 * (one.mm >= 120)[:, None]
    result = statistics.judge(features, one.mm)
    assert not result.outside[one.mm < 120 - domain.WINDOW].any()
    assert result.outside[one.mm > 120].all()


def test_a_reversed_series_is_out_of_order(statistics):
    results = list(verdicts(statistics, patients(20, 3), reverse=True))
    assert all(result.out_of_order for result in results)
    forward = list(verdicts(statistics, patients(20, 3)))
    assert all(a.order < -0.5 and b.order > 0.5 for a, b in zip(results, forward, strict=True))
    assert not any(result.out_of_order for result in forward)


@pytest.mark.parametrize("step", [1.0, 2.5, 5.0])
def test_the_distance_between_slices_does_not_matter(statistics, step):
    results = list(verdicts(statistics, patients(10, 3, step=step)))
    assert np.mean(np.concatenate([result.outside for result in results])) < 0.05
    assert not any(result.series_outside or result.out_of_order for result in results)


def test_short_series_and_series_without_positions_are_judged(statistics):
    one = patients(1, 3)
    for count in (1, 2, 5, 20):  # at most 60 mm: too short for its order
        rows = slice(30, 30 + count)
        result = statistics.judge(one.features[rows], one.mm[rows])
        assert result.order is None and not result.out_of_order and not result.series_outside
        assert len(result.outside) == len(result.distances) == count
    unknown = statistics.judge(one.features, np.full(len(one.mm), np.nan))
    known = statistics.judge(one.features, np.arange(len(one.mm)) * domain.SPACING)
    np.testing.assert_array_equal(unknown.distances, known.distances)
    usual = statistics.distances(one.features).argmin()  # inside the domain
    still = np.repeat(one.features[usual : usual + 1], 60, axis=0)
    still = statistics.judge(still, 3.0 * np.arange(60))
    assert still.order == 0 and still.out_of_order and not still.series_outside


def test_the_distance_is_mahalanobis(monkeypatch):
    """With one centre, all components and no shrinkage."""
    monkeypatch.setattr(domain_fit, "CENTRES", 1)
    monkeypatch.setattr(domain_fit, "SHRINKAGE", 0.0)
    train, other = patients(20, 1), patients(2, 3)
    result = domain_fit.fit(train, patients(20, 2))
    inverse = np.linalg.inv(np.cov(train.features, rowvar=False, bias=True))
    mean = train.features.mean(axis=0)
    expected = [distance.mahalanobis(row, mean, inverse) for row in other.features]
    np.testing.assert_allclose(result.distances(other.features), 2 * np.log(expected), rtol=1e-8)


def test_maxima_of_features_are_not_used():
    """The first half of the features can be anything."""
    train, tuning, other = patients(20, 1), patients(20, 2), patients(2, 3)
    wide = [
        dataclasses.replace(each, features=np.hstack([noise * each.features**2, each.features]))
        for noise, each in ((3, train), (5, tuning), (100, other))
    ]
    statistics = domain_fit.fit(*wide[:2], drop_maxima=True)
    assert statistics.projection.shape[1] == 2 * FEATURES
    alone = domain_fit.fit(train, tuning)
    for one, two in zip(verdicts(statistics, wide[2]), verdicts(alone, other), strict=True):
        np.testing.assert_allclose(one.distances, two.distances, rtol=1e-9)
        assert one.order == pytest.approx(two.order, rel=1e-9)


def test_linear_maps_of_the_features_change_nothing():
    train, tuning, other = patients(20, 1), patients(20, 2), patients(2, 3)
    turn = np.random.default_rng(0).normal(size=(FEATURES, FEATURES))
    results = []
    for change in (np.eye(FEATURES), turn):
        moved = [
            dataclasses.replace(each, features=each.features @ change + 5)
            for each in (train, tuning, other)
        ]
        results.append(list(verdicts(domain_fit.fit(*moved[:2]), moved[2])))
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one.distances, two.distances, rtol=1e-5)
        assert one.series_outside == two.series_outside


def test_thresholds_allow_one_percent_of_the_tuning_slices(statistics):
    single = statistics.distances(patients(20, 2, step=8).features)
    assert 0 < np.mean(single > statistics.slice_threshold) <= 0.01
    assert statistics.window_threshold < statistics.slice_threshold


def test_no_centre_reveals_few_patients():
    train = patients(20, 1)
    odd = np.isin(train.patients, ["1-0", "1-1", "1-2", "1-3"])  # one less than needed
    train.features[odd] += 50 + 0.1 * np.arange(FEATURES)
    result = domain_fit.fit(train, patients(20, 2))
    nearest, _ = domain.nearest(result.project(train.features), result.centres)
    for k in range(len(result.centres)):
        assert len(set(train.patients[nearest == k])) >= domain_fit.PATIENTS
    assert len(result.centres) <= domain_fit.CENTRES < len(train.features)


def test_the_arrays_are_the_statistics(statistics):
    arrays = statistics.arrays()
    assert all(array.dtype == np.float32 for array in arrays.values())
    again = domain.Domain.from_arrays(arrays, FEATURES)
    one = patients(1, 3)
    theirs, ours = (each.judge(one.features, one.mm) for each in (again, statistics))
    np.testing.assert_allclose(theirs.distances, ours.distances, rtol=1e-3)
    np.testing.assert_array_equal(theirs.outside, ours.outside)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": None},
        {"order_threshold": None},
        {"unknown": np.zeros(1, np.float32)},
        {"mean": np.zeros(FEATURES + 1, np.float32)},
        {"projection": np.zeros(3, np.float32)},
        {"centres": np.full((2, FEATURES), np.nan, np.float32)},
        {"centres": np.zeros((0, FEATURES), np.float32)},
        {"slice_threshold": np.zeros(2, np.float32)},
        {"change_scale": -np.ones(FEATURES, np.float32)},
    ],
)
def test_damaged_arrays_are_rejected(statistics, change):
    arrays = {k: v for k, v in (statistics.arrays() | change).items() if v is not None}
    with pytest.raises(InputError, match=next(iter(change)).split("_")[0]):
        domain.Domain.from_arrays(arrays)
    with pytest.raises(InputError, match="mean"):
        domain.Domain.from_arrays(statistics.arrays(), FEATURES + 1)


def test_slices_may_be_further_apart_than_a_piece(statistics):
    tuning = patients(20, 2, step=8)
    far = dataclasses.replace(tuning, mm=tuning.mm + 400 * (tuning.mm >= 120))
    result = domain_fit.fit(patients(40, 1, step=8), far)
    assert np.isfinite([result.series_threshold, result.order_threshold]).all()
    alone = dataclasses.replace(tuning, mm=tuning.mm * 100)  # no two slices in one piece
    assert np.isfinite(domain_fit.fit(patients(40, 1, step=8), alone).series_threshold)


def test_what_cannot_be_chosen_is_not_judged():
    few = domain_fit.fit(patients(40, 1), patients(2, 2))  # six pieces of series
    assert few.series_threshold is None and few.order_threshold is None and few.change is None
    result = next(verdicts(domain.Domain.from_arrays(few.arrays()), patients(1, 3, shift=5)))
    assert result.order is None and not result.series_outside and result.outside.all()
    assert domain_fit.fit(patients(4, 1), patients(20, 2)) is None
    unknown = dataclasses.replace(patients(40, 1), mm=np.full(3200, np.nan))
    assert domain_fit.fit(unknown, patients(20, 2)).change is None
    same = patients(20, 1)
    same.features[:] = 1
    assert domain_fit.fit(same, patients(20, 2)) is None


@pytest.mark.parametrize(
    "id, meta, expected",
    [
        (
            "pt_1-0004",
            {"case": "pt_1", "patient": "pt_1", "slice": 4, "spacing": [2.5, 3.0, 3.0]},
            ("pt_1", "pt_1/pt_1", 10.0),
        ),
        ("a-7", {"series": "a", "slice": 7, "spacing": [None, 1, 1]}, ("a", "a/a", np.nan)),
        (
            "000001_02_01-008",
            {"file": "000001_02_01_008.png", "spacing": [5.0, 0.8, 0.8]},
            ("000001", "000001/000001_02_01", np.nan),
        ),
        (
            "line-000002",
            {"line": 2, "slice": 1},
            ("line-000002", "line-000002/line-000002", np.nan),
        ),
    ],
)
def test_the_place_of_a_record(id, meta, expected):
    empty = np.zeros(0, np.uint8)
    example = records.Example(id, np.zeros((1, 1, 3), np.int16), empty, empty, meta)
    place = domain_fit.place(example)
    assert place[:2] == expected[:2]
    np.testing.assert_equal(place[2], expected[2])


def test_large_splits_are_sampled_in_blocks():
    sample = domain_fit.Sample(range(2000), 1000)
    rows = [sample[number] for number in range(len(sample))]
    assert len(set(rows)) == len(rows) == 1000 and max(rows) < 2000
    assert rows[:250] == list(range(250))
    assert [domain_fit.Sample(range(7))[k] for k in range(7)] == list(range(7))
