"""The phantom's vocabulary: parents, visible organs and simulated text mining."""

import numpy as np
import pytest

from maknet_jax.phantom import labels as phantom_labels
from maknet_jax.phantom import reference


def test_with_parents_adds_all_ancestors():
    assert phantom_labels.with_parents(["right kidney"]) == {
        "right kidney",
        "kidney",
        "abdomen",
        "upper abdomen",
    }
    everything = phantom_labels.with_parents(phantom_labels.TERMS)
    assert everything == set(phantom_labels.TERMS)
    assert phantom_labels.with_parents(["table", "soft tissue", "rib"]) == {"rib"}


def test_an_organ_of_a_few_pixels_is_not_labelled():
    organs = np.zeros((64, 64), np.uint8)
    organs[0, :11] = reference.VALUE["spleen"]
    assert phantom_labels.visible_terms(organs, 9.0) == set()
    assert "spleen" in phantom_labels.visible_terms(organs, 9.1)


def test_text_mining_loses_and_invents_labels():
    rng = np.random.default_rng(0)
    true = phantom_labels.with_parents(["liver", "right kidney", "lumbar", "rib"])
    mined = [phantom_labels.mine_terms(true, rng) for _ in range(2000)]
    relevant, uncertain, _ = zip(*mined, strict=True)
    recall = np.mean([len(true & set(terms)) / len(true) for terms in relevant])
    doubted = np.mean([len(terms) / len(true) for terms in uncertain])
    wrong = np.mean([len(set(terms) - true) / len(true) for terms in relevant])
    assert recall == pytest.approx(0.88, abs=0.02)
    assert doubted == pytest.approx(0.04, abs=0.01)
    assert wrong == pytest.approx(0.03 * 0.88, abs=0.01)
    assert all(set(terms) <= true for terms in uncertain)
