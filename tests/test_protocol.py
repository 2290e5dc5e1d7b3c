"""LesaNet's protocol against a plain loop over its rules, and each rule on its own."""

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn import metrics as sk

from maknet_jax.data import labels as vocabularies
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
    with pytest.raises(InputError, match="parents of 6 labels .* of 7 labels"):
        protocol.add_parents(labels, PARENTS[1:])
    for candidates in ((), (0.5, 0.3), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(InputError, match=re.escape(str(list(candidates)))):
            protocol.choose_thresholds(scores, labels, candidates=candidates)


def lesanet_f1(precision, recall):
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def lesanet_rates(labels, predicted):
    """Of one label or of all known elements: an empty denominator gives 1."""
    hits = float((labels & predicted).sum())
    precision = hits / predicted.sum() if predicted.any() else 1.0
    recall = hits / labels.sum() if labels.any() else 1.0
    return precision, recall, lesanet_f1(precision, recall)


def lesanet_reference(val, test, direct):
    """LesaNet's evaluation in plain loops, from (scores, labels, mask) of two splits.

    Returns:
      (thresholds, macro means of AUC, precision, recall and F1, micro precision, recall and F1).
    """

    def counts(labels, known):
        return labels[known].any() and not labels[known].all()

    size = len(direct)
    thresholds = [0.0] * size  # a label that the validation split cannot score keeps 0
    scores, labels, mask = val
    for k in range(size):
        known = mask[:, k]
        if counts(labels[:, k], known):
            best, thresholds[k] = 0.0, 1.0
            for candidate in np.arange(0.3, 1, 0.1):
                chosen = scores[known, k] >= candidate
                f1 = lesanet_rates(labels[known, k], chosen)[2]
                if f1 > best:
                    best, thresholds[k] = f1, candidate
    scores, labels, mask = test
    predicted = np.zeros(labels.shape, bool)
    scored = [k for k in range(size) if counts(labels[:, k], mask[:, k])]
    for k in scored:
        for row in np.flatnonzero(mask[:, k]):
            predicted[row, k] = scores[row, k] >= thresholds[k]
    for k in range(size):
        for row in np.flatnonzero(predicted[:, k]):
            for parent in direct[k]:
                predicted[row, parent] = True
    macro = []
    for k in scored:
        known = mask[:, k]
        area = sk.roc_auc_score(labels[known, k], scores[known, k])
        macro.append([area, *lesanet_rates(labels[known, k], predicted[known, k])])
    return thresholds, np.mean(macro, axis=0), lesanet_rates(labels[mask], predicted[mask])


def imitate(seed, size, examples=300):
    """(scores, labels, mask): rare labels, ties, scores of exactly 1, labels of one class."""
    rng = np.random.default_rng(seed)
    labels = rng.random((examples, size)) < rng.uniform(0.01, 0.4, size)
    labels[:, 0], labels[:, 1] = False, True
    scores = np.clip(0.5 * labels + rng.uniform(-0.1, 0.9, labels.shape), 0, 1)
    rounded = rng.random(labels.shape) < 0.5
    scores = np.where(rounded, np.round(scores, 1), scores)
    return scores, labels, rng.random(labels.shape) < 0.9


def check_lesanet(direct, seed):
    val, test = imitate(seed, len(direct)), imitate(seed + 1000, len(direct))
    thresholds, macro, micro = lesanet_reference(val, test, direct)
    ours = protocol.choose_thresholds(*val[:2], mask=val[2], rules="lesanet")
    np.testing.assert_array_equal(ours, thresholds)
    report = protocol.evaluate(*test[:2], ours, direct, mask=test[2], rules="lesanet")
    names = ("auc", "precision", "recall", "f1")
    assert [report.summary[name] for name in names] == pytest.approx(macro, abs=1e-12, rel=0)
    names = [f"micro_{name}" for name in names[1:]]
    assert [report.summary[name] for name in names] == pytest.approx(micro, abs=1e-12, rel=0)
    return val, test, report


@pytest.mark.parametrize("seed", range(5))
def test_lesanets_rules_equal_a_loop_over_them(seed):
    rng = np.random.default_rng(seed)
    direct = [sorted(rng.choice(30, rng.integers(0, 3), replace=False)) for _ in range(30)]
    check_lesanet(direct, seed)


@pytest.mark.parametrize("body_parts", [True, False])
def test_lesanets_rules_on_its_own_labels(shared_data, body_parts):
    folder = shared_data / "lesanet"
    terms = vocabularies.read_ontology(folder / "lesion_ontology_181022.xlsx")
    mined = json.loads((folder / "text_mined_labels_171_and_split.json").read_text())
    names = [
        name
        for name in mined["term_list"]
        if not body_parts or terms[name].label_class == "bodypart"
    ]
    direct = [[names.index(p) for p in terms[name].parents if p in names] for name in names]
    identity = np.eye(len(names), dtype=bool)
    one_pass = protocol.add_direct_parents(identity, direct)
    all_ancestors = protocol.add_parents(identity, direct)
    assert (all_ancestors | one_pass == all_ancestors).all()
    assert (all_ancestors & ~one_pass).sum() == (13 if body_parts else 15)
    val, test, report = check_lesanet(direct, 7)
    thresholds = protocol.choose_thresholds(*val[:2], mask=val[2])
    ours = protocol.evaluate(*test[:2], thresholds, direct, mask=test[2])
    assert ours.summary["auc"] == report.summary["auc"]
    assert 0 < abs(ours.summary["f1"] - report.summary["f1"]) < 0.02


def test_the_rules_differ_in_three_places():
    # 1. A score of exactly 1 at the threshold that means never.
    labels = np.array([[1], [0], [0]])
    arguments = np.array([[0.2], [1.0], [0.1]]), labels, [1.0], [[]]
    assert protocol.evaluate(*arguments).per_label[0]["fp"] == 0
    assert protocol.evaluate(*arguments, rules="lesanet").per_label[0]["fp"] == 1
    # 2. Label 2 has the parent 1, whose own parent 0 was expanded before: one pass misses it.
    predicted = np.array([[False, False, True]])
    assert protocol.add_parents(predicted, [[], [0], [1]]).tolist() == [[True, True, True]]
    one_pass = protocol.add_direct_parents(predicted, [[], [0], [1]])
    assert one_pass.tolist() == [[False, True, True]]
    # In the other column order it does not.
    predicted = np.array([[True, False, False]])
    assert protocol.add_direct_parents(predicted, [[1], [2], []]).all()
    # 3. At 0.3 there are 3 true and 2 false positives of 4, at 0.4 there are 2 and 0: F1 is 2/3.
    labels = np.array([[1, 1, 1, 1, 0, 0]]).T
    scores = np.array([[0.45, 0.45, 0.35, 0.1, 0.35, 0.35]]).T
    assert protocol.choose_thresholds(scores, labels).tolist() == [0.3]
    assert protocol.choose_thresholds(scores, labels, rules="lesanet").tolist() == [0.4]


def test_unknown_rules_are_rejected():
    with pytest.raises(InputError, match="'theirs'"):
        protocol.choose_thresholds([[0.5]], [[1]], rules="theirs")
    with pytest.raises(InputError, match="'theirs'"):
        protocol.evaluate([[0.5]], [[1]], [0.5], [[]], rules="theirs")
