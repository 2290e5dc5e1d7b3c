"""Metrics: identities, agreement with scikit-learn, and rejected input."""

import time

import numpy as np
import pytest
from sklearn import metrics as sk

from maknet_jax.errors import InputError
from maknet_jax.evaluation import metrics


def drawn(seed=0, examples=200, labels=6):
    """Scores with many ties, labels of varied frequency, and a mask."""
    rng = np.random.default_rng(seed)
    truth = rng.random((examples, labels)) < np.linspace(0.05, 0.9, labels)
    scores = np.round(np.clip(0.3 * truth + 0.7 * rng.random((examples, labels)), 0, 1), 1)
    return scores.astype(np.float32), truth, rng.random((examples, labels)) < 0.7


def test_sigmoid_is_exact_and_does_not_overflow():
    logits = np.float32([-1e4, -20, -1, 0, 1, 20, 1e4])
    actual = metrics.sigmoid(logits)
    assert actual.dtype == np.float32
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(actual, 1 / (1 + np.exp(-np.float64(logits))), rtol=1e-6)


def test_auc_is_the_probability_that_a_positive_outscores_a_negative():
    scores, labels, _ = drawn()
    scores, labels = scores[:, 2], labels[:, 2]
    pairs = np.subtract.outer(scores[labels], scores[~labels])
    assert metrics.auc(scores, labels) == np.mean((pairs > 0) + 0.5 * (pairs == 0))


def test_auc_of_perfect_reversed_and_constant_scores():
    labels = np.array([0, 0, 1, 1, 1])
    assert metrics.auc(labels, labels) == 1.0
    assert metrics.auc(-labels, labels) == 0.0
    assert metrics.auc(np.ones(5), labels) == 0.5
    scores = np.array([0.1, 0.4, 0.35, 0.8, 0.4])
    assert metrics.auc(scores, labels) + metrics.auc(-scores, labels) == 1.0


def test_auc_of_one_class_is_nan():
    assert np.isnan(metrics.auc(np.arange(3), np.zeros(3)))
    assert np.isnan(metrics.auc(np.arange(3), np.ones(3)))
    assert np.isnan(metrics.auc(np.zeros(0), np.zeros(0)))


def test_auc_equals_scikit_learn():
    scores, labels, mask = drawn(1)
    ours = metrics.auc_per_label(scores, labels, mask)
    for k in range(labels.shape[1]):
        known = mask[:, k]
        theirs = sk.roc_auc_score(labels[known, k], scores[known, k])
        assert ours[k] == pytest.approx(theirs, rel=1e-12)
        assert metrics.auc(scores[known, k], labels[known, k]) == ours[k]


def test_rates_equal_scikit_learn():
    scores, labels, mask = drawn(2)
    predicted = scores > 0.55
    ours = metrics.rates(metrics.count(predicted, labels, mask))
    for k in range(labels.shape[1]):
        known = mask[:, k]
        theirs = sk.precision_recall_fscore_support(
            labels[known, k], predicted[known, k], average="binary"
        )
        np.testing.assert_allclose([rate[k] for rate in ours], theirs[:3], rtol=1e-12)
    theirs = sk.precision_recall_fscore_support(labels[mask], predicted[mask], average="binary")
    total = metrics.rates(metrics.count(predicted, labels, mask).total())
    np.testing.assert_allclose(total, theirs[:3], rtol=1e-12)


def test_rates_without_predictions_or_positives():
    predicted = np.array([[0, 1, 0, 1], [0, 1, 0, 0]], bool)
    labels = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], bool)
    precision, recall, f1 = metrics.rates(metrics.count(predicted, labels))
    np.testing.assert_array_equal(precision, [1, 0, 1, 0])  # nothing predicted: 1
    np.testing.assert_array_equal(recall, [0, np.nan, np.nan, 0])  # no positives: nan
    np.testing.assert_array_equal(f1, [0, np.nan, np.nan, 0])


def test_masked_elements_have_no_effect():
    scores, labels, mask = drawn(3)
    spoilt = np.where(mask, scores, np.nan)
    odd = np.where(mask, labels, 7)
    np.testing.assert_array_equal(
        metrics.auc_per_label(spoilt, odd, mask), metrics.auc_per_label(scores, labels, mask)
    )
    ours = metrics.count(np.where(mask, scores > 0.5, True), odd, mask)
    np.testing.assert_array_equal(ours, metrics.count(scores > 0.5, labels, mask))


@pytest.mark.parametrize(
    ("scores", "labels", "value"),
    [
        ([0.1, np.nan], [0, 1], "1 of 2"),
        ([0.1, 0.2], [0, 0.5], "0.5"),
        ([0.1, 0.2], [0, -1], "-1"),
        ([0.1, 0.2, 0.3], [0, 1], r"\(3,\)"),
    ],
)
def test_invalid_input_is_rejected(scores, labels, value):
    with pytest.raises(InputError, match=value):
        metrics.auc(scores, labels)


def test_a_full_size_split_takes_seconds():
    rng = np.random.default_rng(0)
    scores = rng.random((20_000, 115), np.float32)
    labels = rng.random((20_000, 115)) < 0.02
    begun = time.perf_counter()
    metrics.auc_per_label(scores, labels)
    assert time.perf_counter() - begun < 10  # about 0.5 s on an idle core
