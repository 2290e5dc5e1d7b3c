"""LesaNet's protocol against a plain loop over its rules, and each rule on its own."""

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn import metrics as sk

from maknet_jax.errors import InputError
from maknet_jax.evaluation import protocol

PARENTS = [[], [0], [1], [], [3, 1], [], []]  # of seven labels; 2 -> 1 -> 0, 4 -> 3 and 1


def drawn(seed, examples=150, labels=7):
    """Scores, labels and mask; label 5 has no positives and label 6 no negatives."""
    rng = np.random.default_rng(seed)
    truth = rng.random((examples, labels)) < 0.3
    truth[:, 5], truth[:, 6] = False, True
    scores = np.clip(0.35 * truth + 0.65 * rng.random((examples, labels)), 0, 1)
    return scores, truth, rng.random((examples, labels)) < 0.8


def loop_rates(labels, predicted):
    """Precision, recall and F1 of one label by LesaNet's formulas."""
    hits = np.sum(labels & predicted)
    precision = hits / predicted.sum() if predicted.any() else 1.0
    recall = hits / labels.sum() if labels.any() else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


def loop_protocol(scores, labels, mask, thresholds, parents):
    """Returns the four macro means, the three micro averages and the evaluated labels."""
    predicted = np.zeros(labels.shape, bool)
    evaluated = []
    for k in range(labels.shape[1]):
        known = mask[:, k]
        if labels[known, k].any() and not labels[known, k].all():
            evaluated.append(k)
            predicted[known, k] = scores[known, k] >= thresholds[k]
    for _ in parents:  # no chain of parents is longer than the number of labels
        for child, above in enumerate(parents):
            for parent in above:
                predicted[:, parent] |= predicted[:, child]
    macro = []
    for k in evaluated:
        known = mask[:, k]
        area = sk.roc_auc_score(labels[known, k], scores[known, k])
        macro.append([area, *loop_rates(labels[known, k], predicted[known, k])])
    return np.mean(macro, axis=0), loop_rates(labels[mask], predicted[mask]), evaluated


def test_evaluation_equals_a_loop_over_the_rules():
    scores, labels, mask = drawn(0)
    thresholds = protocol.choose_thresholds(*drawn(1)[:2], mask=drawn(1)[2])
    thresholds[4] = protocol.ALWAYS  # its unknown elements must not add its parents
    report = protocol.evaluate(scores, labels, thresholds, PARENTS, mask=mask)
    for suffix, chosen in (("", thresholds), ("_at_0.5", np.full(7, 0.5))):
        macro, micro, evaluated = loop_protocol(scores, labels, mask, chosen, PARENTS)
        assert report.summary["auc"] == pytest.approx(macro[0])
        for name, mean, overall in zip(
            ("precision", "recall", "f1"), macro[1:], micro, strict=True
        ):
            assert report.summary[name + suffix] == pytest.approx(mean)
            assert report.summary[f"micro_{name}{suffix}"] == pytest.approx(overall)
    assert evaluated == [row["label"] for row in report.per_label if row["evaluated"]]
    assert evaluated == [0, 1, 2, 3, 4]


def test_thresholds_equal_a_search_per_label():
    scores, labels, mask = drawn(2)
    ours = protocol.choose_thresholds(scores, labels, mask=mask)
    for k in range(5):
        known = mask[:, k]
        best, best_f1 = 1.0, 0.0
        for candidate in protocol.CANDIDATES:
            f1 = sk.f1_score(labels[known, k], scores[known, k] >= candidate)
            if f1 > best_f1:
                best, best_f1 = candidate, f1
        assert ours[k] == best


def test_threshold_rules():
    labels = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    scores = np.array([[0.95, 0.1, 0.9, 0.75], [0.1, 0.2, 0.8, 0.72], [0.1, 0.1, 0.1, 0.1]])
    # Ties go to the lowest; 1 if F1 is 0; LesaNet's 0 without validation positives.
    np.testing.assert_array_equal(protocol.choose_thresholds(scores, labels), [0.3, 1, 0, 0.3])
    np.testing.assert_array_equal(
        protocol.choose_thresholds(scores, labels, unjudged=protocol.NEVER), [0.3, 1, 1, 0.3]
    )
    scores[0, 3] = 0.85
    np.testing.assert_array_equal(protocol.choose_thresholds(scores, labels)[3], 0.8)
    # Without negatives a label cannot be scored either.
    assert protocol.choose_thresholds(scores[:1], labels[:1])[0] == 0


def test_a_threshold_of_one_is_never_reached():
    scores = np.array([[1.0, 1.0], [0.3, 0.0]])
    np.testing.assert_array_equal(
        protocol.predict(scores, np.array([1.0, 0.0])), [[False, True], [False, True]]
    )
    assert protocol.predict(
        np.array([[0.5]]), np.array([0.5])
    ).all()  # a score equal to the threshold is predicted


def test_all_ancestors_are_added():
    predicted = np.eye(7, dtype=bool)
    added = protocol.add_parents(predicted, PARENTS)
    expected = [{0}, {0, 1}, {0, 1, 2}, {3}, {0, 1, 3, 4}, {5}, {6}]
    assert [set(np.flatnonzero(row)) for row in added] == expected
    assert (predicted == np.eye(7)).all()  # the argument is not changed
    assert (protocol.add_parents(added, PARENTS) == added).all()
    assert (protocol.add_parents(predicted, [[]] * 7) == predicted).all()
    # A cycle ends.
    assert protocol.add_parents(np.eye(2, dtype=bool), [[1], [0]]).all()


def test_precision_is_one_when_nothing_is_predicted():
    labels = np.array([[1], [0]])
    report = protocol.evaluate(np.array([[0.2], [0.1]]), labels, np.ones(1), [[]])
    assert report.summary["precision"] == 1.0
    assert report.summary["recall"] == report.summary["f1"] == 0.0


def test_all_means_are_over_the_same_labels():
    scores, labels, mask = drawn(4)
    report = protocol.evaluate(scores, labels, np.full(7, 0.5), PARENTS, mask=mask)
    rows = [row for row in report.per_label if row["evaluated"]]
    for name in ("auc", "precision", "recall", "f1", "f1_at_0.5"):
        assert report.summary[name] == pytest.approx(np.mean([row[name] for row in rows]))
    assert report.summary["labels_evaluated"] == 5
    assert report.summary["labels_total"] == 7
    # The thresholds are 0.5, so that both sets of numbers are equal.
    assert report.summary["f1"] == report.summary["f1_at_0.5"]


def test_masked_padding_has_no_effect():
    scores, labels, mask = drawn(5)
    thresholds = np.full(7, 0.4)
    report = protocol.evaluate(scores, labels, thresholds, PARENTS, mask=mask)
    padded = [np.concatenate([a, a[:9]]) for a in (scores, labels, mask)]
    padded[0][150:], padded[2][150:] = np.nan, False
    again = protocol.evaluate(*padded[:2], thresholds, PARENTS, mask=padded[2])
    assert again == report
    assert report.summary["examples"] == 150


def test_a_report_can_be_written_as_json():
    labels = np.zeros((4, 2), bool)
    report = protocol.evaluate(np.full((4, 2), 0.1), labels, np.full(2, 0.5), [[], []])
    text = json.dumps(dataclasses.asdict(report), allow_nan=False)
    assert json.loads(text)["summary"] == report.summary
    assert report.summary["auc"] is report.summary["f1"] is report.per_label[0]["recall"] is None
    assert {name: value for name, value in report.summary.items() if value is not None} == {
        "micro_precision": 1.0,
        "micro_precision_at_0.5": 1.0,
        "examples": 4,
        "labels_evaluated": 0,
        "labels_total": 2,
    }


def test_invalid_input_is_rejected():
    scores, labels, _ = drawn(7)
    with pytest.raises(InputError, match=r"\(3,\)"):
        protocol.evaluate(scores, labels, np.ones(3), PARENTS)
    with pytest.raises(InputError, match=r"\[9\]"):
        protocol.evaluate(scores, labels, np.ones(7), [[9]] + PARENTS[1:])
    with pytest.raises(InputError, match="6"):
        protocol.add_parents(labels, PARENTS[1:])
    for candidates in ((), (0.5, 0.3), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(InputError, match=re.escape(str(list(candidates)))):
            protocol.choose_thresholds(scores, labels, candidates=candidates)
