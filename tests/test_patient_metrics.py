"""The bootstrap over patients: equal to metrics of resampled records, paired, over seeds."""

import dataclasses

import numpy as np
import pytest

from benchmarks.experiments import patient_metrics
from maknet_jax import console, evaluate
from maknet_jax.evaluation import bootstrap, metrics, protocol
from maknet_jax.runs import card

LABELS, PATIENTS = 3, 15


@pytest.fixture(scope="module")
def scores():
    """Scores of 120 records with ties, unknown labels and patients of unequal size."""
    rng = np.random.default_rng(0)
    labels = rng.random((120, LABELS)) < 0.4
    return patient_metrics.SplitScores(
        scores=np.round(rng.random((120, LABELS)) * 0.6 + labels * 0.3, 1).astype(np.float32),
        labels=labels,
        known=rng.random((120, LABELS)) < 0.8,
        patients=np.concatenate([np.arange(PATIENTS), rng.integers(0, PATIENTS, 105)]),
        thresholds=np.array([0.5, 0.3, 0.6]),
    )


def test_draws_repeat_whole_patients(scores):
    weights = patient_metrics.draw_weights(scores.patients, draws=50, seed=1)
    assert weights.shape == (51, 120) and (weights[0] == 1).all()
    first = [np.flatnonzero(scores.patients == patient)[0] for patient in range(PATIENTS)]
    np.testing.assert_array_equal(weights, weights[:, first][:, scores.patients])
    assert (weights[:, first].sum(axis=1) == PATIENTS).all()
    assert len(np.unique(weights, axis=0)) == 51


def test_metrics_of_a_draw_are_those_of_its_records(scores):
    weights = patient_metrics.draw_weights(scores.patients, draws=8)
    draws = patient_metrics.metric_draws(scores, weights)
    for draw, weight in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(120), weight)
        values, labels = scores.scores[rows], scores.labels[rows]
        known = scores.known[rows]
        expected = metrics.auc_per_label(values, labels, known)
        np.testing.assert_allclose(draws["auc"][draw], expected, rtol=1e-12)
        report = protocol.evaluate(
            values, labels, scores.thresholds, [[]] * LABELS, mask=known
        ).per_label
        np.testing.assert_allclose(draws["f1"][draw], [row["f1"] for row in report], rtol=1e-12)


def test_labels_without_positives_in_a_draw_do_not_count(scores):
    weights = np.ones((2, 120))
    weights[1, scores.labels[:, 0]] = 0
    draws = patient_metrics.metric_draws(scores, weights)
    for values in draws.values():
        assert np.isnan(values[1, 0]) and np.isfinite(values[0]).all()
        means = patient_metrics.macro(values)
        np.testing.assert_allclose(means, [values[0].mean(), values[1, 1:].mean()])


def test_patients_with_a_positive_known_record_are_counted(scores):
    counts = scores.patients_by_label()
    for label in range(LABELS):
        rows = scores.labels[:, label] & scores.known[:, label]
        assert counts[label] == len(set(scores.patients[rows].tolist()))
    few = dataclasses.replace(scores, labels=scores.labels & (scores.patients < 2)[:, None])
    assert few.patients_by_label().max() <= 2
    assert few.enough().all()  # none has enough patients: none is left out


def test_equal_networks_differ_by_nothing_and_a_better_one_is_ahead(scores):
    weights = patient_metrics.draw_weights(scores.patients, draws=200)
    enough = np.array([True, True, False])
    worse = dataclasses.replace(scores, scores=1 - scores.scores)
    ours, theirs = ({0: patient_metrics.metric_draws(s, weights)} for s in (scores, worse))
    for row in patient_metrics.differences(ours, ours, enough):
        assert row["difference"] == [0, 0, 0]
    rows = patient_metrics.differences(ours, theirs | {1: theirs[0]}, enough)
    assert [(row["metric"], row["organs"]) for row in rows] == [
        ("auc", "enough patients"),
        ("auc", "all"),
        ("f1", "enough patients"),
        ("f1", "all"),
    ]
    for row in rows[:2]:
        value, low, high = row["difference"]
        assert 0 < low < value < high and row["seeds"] == [0]
    aucs = metrics.auc_per_label(scores.scores, scores.labels, scores.known)
    np.testing.assert_allclose(rows[0]["difference"][0], np.mean(2 * aucs[:2] - 1), atol=1e-5)
    assert patient_metrics.differences(ours, {}, enough) == []


def test_intervals_over_seeds_are_wider_than_those_over_patients(scores):
    weights = patient_metrics.draw_weights(scores.patients, draws=400)
    rng = np.random.default_rng(0)
    networks = {
        "ours": {
            seed: patient_metrics.metric_draws(
                dataclasses.replace(
                    scores,
                    scores=scores.scores + noise * rng.normal(size=scores.scores.shape),
                ),
                weights,
            )
            for seed, noise in enumerate((0, 0.1, 0.3, 0.6))
        },
        "control": dict.fromkeys(range(4), patient_metrics.metric_draws(scores, weights)),
    }
    enough = np.ones(LABELS, bool)
    both = patient_metrics.compare(networks, "ours", "control", enough)[0]
    patients = patient_metrics.differences(networks["ours"], networks["control"], enough)[0]
    assert both["difference"][0] == pytest.approx(patients["difference"][0], abs=1e-5)
    wide, narrow = (row["difference"][2] - row["difference"][1] for row in (both, patients))
    assert wide > 1.2 * narrow
    assert both["above"] == 0 and both["seeds"] == [0, 1, 2, 3]


def test_intervals_are_percentiles():
    draws = np.concatenate([[0.123456], np.arange(1001) / 1000])
    assert patient_metrics.interval(draws) == [0.12346, 0.025, 0.975]
    assert console.format_interval([0.5, -0.25, 1], signed=True) == ("+0.500 (-0.250 to +1.000)")


def test_a_summary_has_the_intervals_of_every_label_that_can_be_scored(scores):
    weights = patient_metrics.draw_weights(scores.patients, draws=20)
    draws = patient_metrics.metric_draws(scores, weights)
    draws = {
        metric: np.where([True, True, False], values, np.nan) for metric, values in draws.items()
    }
    counts = scores.patients_by_label()
    result = bootstrap.summarize(draws, ["a", "b", "c"], counts, PATIENTS)
    assert result["patients"] == PATIENTS and result["labels"]["c"] == {"patients": counts[2]}
    assert result["labels"]["b"]["f1"] == bootstrap.interval(draws["f1"][:, 1])
    assert result["auc"][0] == pytest.approx(draws["auc"][0, :2].mean(), abs=1e-5)
    rows = console.interval_rows(result)
    assert [row[0] for row in rows] == ["macro average", "a", "b", "c"]
    assert rows[3] == ["c", str(counts[2]), "-", "-"]
    assert rows[1][2].startswith(f"{result['labels']['a']['auc'][0]:.3f} (")


def test_a_split_without_positives_has_no_intervals():
    patients, known = np.repeat(np.arange(4), 3), np.ones((12, 2), bool)
    values = np.random.default_rng(0).random((12, 2))
    weights = bootstrap.draw_weights(patients, draws=20)
    draws = bootstrap.metric_draws(values, known & False, known, values > 0.5, weights)
    summary = bootstrap.summarize(draws, ["a", "b"], [0, 0], 4)
    assert summary == {"patients": 4, "labels": {"a": {"patients": 0}, "b": {"patients": 0}}}
    assert console.interval_rows(summary)[0] == ["macro average", "4", "-", "-"]


def test_tables_of_intervals_state_their_patients_and_whether_these_are_too_few():
    few = {"patients": 9, "auc": [0.9, 0.8, 1.0], "labels": {"a": {"patients": 0}}}
    rare = {"patients": 9, "auc": [0.9, 0.8, 1.0]}  # of a label in a larger split
    table = evaluate.interval_table({"splits": {"val": {"intervals": few}, "test": {}}})
    note = "resampling the 9 patients or series. Intervals over fewer than 10 are unreliable."
    assert table.splitlines()[-1].startswith("val: ") and table.endswith(note)
    info = {"data": {}, "config": {"data": {"val_split": "val"}}}
    values = {"intervals": few | {"patients": 33, "labels": {"a": rare}}}
    text = card._scores(info | {"metrics": {"test": values}})
    assert "the 33 patients or series. Those of labels that fewer than 10 patients have" in text
    values["intervals"]["labels"]["a"] = {"patients": 9}  # without an interval
    assert "unreliable" not in card._scores(info | {"metrics": {"test": values}})
