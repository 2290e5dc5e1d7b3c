"""Which labels are present, absent or unknown, and which predictions are right."""

import pytest

from maknet_jax.data.labels import Label, Vocabulary
from maknet_jax.explain.selection import SelectedImage
from maknet_jax.explain.truth import Annotation, labels_are_complete, outcome

# chest and abdomen exclude each other, and so what lies inside them; mass excludes nothing.
VOCABULARY = Vocabulary(
    (
        Label("chest", exclusive=("abdomen",)),
        Label("abdomen"),
        Label("lung", parents=("chest",)),
        Label("liver", parents=("abdomen",)),
        Label("mass"),
    )
)


def annotation(present, *, unknown=(), complete=False):
    return Annotation(
        VOCABULARY.vector(present), 1 - VOCABULARY.vector(unknown), complete, VOCABULARY
    )


def truths(annotated):
    return [annotated.truth(column).value for column in range(len(VOCABULARY))]


@pytest.mark.parametrize(
    "present, expected",
    [
        (["mass"], ["unknown", "unknown", "unknown", "unknown", "true"]),
        (["chest"], ["true", "false", "unknown", "false", "unknown"]),
        # Exclusion is inherited and goes both ways.
        (["liver"], ["false", "unknown", "false", "true", "unknown"]),
        ([], ["unknown"] * 5),
    ],
)
def test_mined_labels_are_absent_only_if_excluded(present, expected):
    assert truths(annotation(present)) == expected


def test_complete_labels_are_absent_if_not_annotated():
    annotated = annotation(["mass"], unknown=["lung"], complete=True)
    assert truths(annotated) == ["false", "false", "unknown", "false", "true"]


def test_unknown_labels_exclude_nothing():
    assert truths(annotation(["chest"], unknown=["chest"])) == ["unknown"] * 5


def test_the_reason_names_the_excluding_label():
    assert "chest" in annotation(["chest"]).truth(1).reason
    reasons = {
        annotated.truth(4).reason
        for annotated in (
            annotation(["mass"]),
            annotation([]),
            annotation([], complete=True),
            annotation([], unknown=["mass"]),
        )
    }
    assert len(reasons) == 4


@pytest.mark.parametrize(
    "kind, split, complete",
    [
        ("deeplesion", "train", False),
        ("deeplesion", "test", False),
        ("deeplesion", "hand", True),
        ("lesions", "val", False),
        ("lesions", "hand", True),
        ("table", "test", True),
        ("table", "unlabelled", False),
        ("segmentations", "train", True),
        ("dicom", "unlabelled", False),
        (None, "test", False),
    ],
)
def test_completeness_follows_from_kind_and_split(kind, split, complete):
    assert labels_are_complete({"kind": kind}, split) == complete


def test_only_absent_labels_that_are_predicted_are_false_positives():
    outcomes = {
        (truth, p): outcome(truth, p) for truth in ("true", "false", "unknown") for p in (0, 1)
    }
    assert outcomes == {
        ("true", 1): "true_positive",
        ("true", 0): "false_negative",
        ("false", 1): "false_positive",
        ("false", 0): "true_negative",
        ("unknown", 1): "unknown",
        ("unknown", 0): "unknown",
    }


def test_mined_and_hand_labels_of_one_data_set(trained, shards, tmp_path):
    """The phantom's test split is mined, its hand split complete."""
    from maknet_jax.explain.network import open_networks
    from maknet_jax.explain.options import SelectionOptions
    from maknet_jax.explain.selection import select

    run = open_networks(trained)[0].run
    counts = {}
    for split in ("test", "hand"):
        selection = select(run, SelectionOptions(split=split))
        values = []
        for number, read in enumerate(selection.readers):
            image, example = read(), shards.source(split)[number]
            for column in range(len(run.vocabulary)):
                value = image.truth(column).value
                values.append(value)
                if example.label_mask[column] and example.labels[column]:
                    assert value == "true"
                elif split == "hand":
                    assert value == "false"
                else:
                    excluding = run.vocabulary.exclusive[column] & (example.labels > 0)
                    expected = excluding.any() and example.label_mask[column]
                    assert value == ("false" if expected else "unknown")
        counts[split] = {value: values.count(value) for value in set(values)}
    assert set(counts["hand"]) == {"true", "false"}
    assert counts["test"]["unknown"] > counts["test"].get("false", 0)


def test_results_of_another_rule_are_not_mixed(trained, tmp_path, monkeypatch):
    from maknet_jax import attribute
    from maknet_jax.errors import InputError
    from maknet_jax.explain import truth
    from maknet_jax.explain.options import PathOptions, SelectionOptions

    options = SelectionOptions(split="test", limit=1), PathOptions(steps=1, refine=0)
    attribute.attribute(trained, tmp_path / "out", *options)
    monkeypatch.setattr(truth, "RULE", 1)
    with pytest.raises(InputError, match="with truth 2, not 1"):
        attribute.attribute(trained, tmp_path / "out", *options)


def test_an_unknown_label_selects_no_image():
    image = SelectedImage("a", None, annotation(["mass", "lung"], unknown=["lung"]), {})
    assert image.labelled.tolist() == [VOCABULARY.index["mass"]]
