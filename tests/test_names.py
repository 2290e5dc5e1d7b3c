"""Misspelt names, and lists of names with commas in them."""

import doctest
import types

import pytest

from maknet_jax import errors
from maknet_jax.cli import options
from maknet_jax.data import records, segmentations
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, did_you_mean
from maknet_jax.explain import selection

NAMES = [f"organ {number}" for number in range(113)] + ["liver", "fat, left side"]


def run(names=NAMES):
    return types.SimpleNamespace(vocabulary=Vocabulary.from_names(names))


def test_an_unknown_label_lists_three_near_ones_not_all():
    with pytest.raises(InputError, match="did you mean 'liver',") as error:
        selection.label_columns(run(), ["Livr"])
    message = str(error.value)
    assert sum(f"'{name}'" in message for name in NAMES) == 3 and len(message) < 150
    with pytest.raises(InputError, match="did you mean 'organ 1', "):
        segmentations.check_rules(segmentations.Rules(unknown_below=("organ1",)), NAMES)


def test_an_unknown_split_names_the_nearest_first():
    splits = {name: {} for name in ("train", "val", "test", "hand")}
    dataset = records.Dataset("data", {"splits": splits})
    with pytest.raises(InputError, match="did you mean 'train'") as error:
        dataset.split("trian")
    assert all(name in str(error.value) for name in splits)


@pytest.mark.parametrize(
    "name, known, hint",
    [
        ("a", ["b"], "did you mean 'b'?"),
        ("TEST", ["val", "test"], "did you mean 'test' or 'val'?"),
        ("a", [], "there are no names to choose from."),
    ],
)
def test_hints_of_few_names(name, known, hint):
    assert did_you_mean(name, known) == hint


@pytest.mark.parametrize(
    "text, columns",
    [
        ("liver,organ 3", [113, 3]),
        ("fat, left side", [114]),
        ("liver,fat,left side,organ 0", [113, 114, 0]),
        ('"fat, left side",liver', [114, 113]),
        ("", []),
    ],
)
def test_a_label_may_contain_a_comma(text, columns):
    assert selection.label_columns(run(), options.words(text)) == columns


def test_words_that_are_labels_are_not_joined():
    known = run(["a", "b", "a, b", "c, a, b"])
    assert selection.label_columns(known, ["a", "b"]) == [0, 1]
    assert selection.label_columns(known, ["c", "a", "b"]) == [3]
    assert selection.label_columns(known, ["a, b"]) == [2]
    assert selection.label_columns(known, "a, b") == [2]  # one label as a string
    with pytest.raises(InputError, match="'c' is unknown"):
        selection.label_columns(known, ["c", "a"])


def test_the_examples_of_the_docstrings_run():
    for module in (errors, selection):
        results = doctest.testmod(module)
        assert results.failed == 0 < results.attempted
