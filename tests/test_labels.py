"""Vocabularies: LesaNet's ontology, and plain lists of names."""

import json
import pickle

import numpy as np
import openpyxl
import pytest

from maknet_jax.data import labels
from maknet_jax.errors import InputError

HEADER = ("class", "term", "term_exclusive", "term_parents")


def write_sheet(path, rows, header=HEADER):
    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(row)
    book.save(path)
    return path


@pytest.fixture
def family(tmp_path):
    """grandchild -> child -> unlisted -> root, and a cycle."""
    return labels.read_ontology(
        write_sheet(
            tmp_path / "family.xlsx",
            [
                ("bodypart", "root", None, None),
                ("bodypart", "unlisted", None, "root"),
                ("bodypart", "child", "ring", "unlisted | elsewhere"),
                ("type", " grandchild ", "child | unlisted", "child"),
                ("type", "ring", None, "gnir"),
                ("type", "gnir", None, "ring"),
                (None, None, None, None),
            ],
        )
    )


@pytest.fixture(scope="session")
def ontology(shared_data):
    return labels.read_ontology(shared_data / "lesanet" / "lesion_ontology_181022.xlsx")


@pytest.fixture(scope="session")
def terms(shared_data):
    path = shared_data / "lesanet" / "text_mined_labels_171_and_split.json"
    return json.loads(path.read_text())["term_list"]


def test_the_real_ontology_has_115_27_and_29_of_the_171_terms(ontology, terms):
    vocabulary = labels.ontology_vocabulary(ontology, terms)
    kinds = [label.label_class for label in vocabulary.labels]
    assert vocabulary.names == tuple(terms)
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "bodypart": 115,
        "type": 27,
        "attribute": 29,
    }


def test_real_parents_equal_the_transitive_closure_of_a_matrix(ontology, terms):
    # Independent reference: reachability by repeated products of the adjacency matrix.
    everything = sorted(set(ontology) | {p for label in ontology.values() for p in label.parents})
    at = {name: number for number, name in enumerate(everything)}
    reach = np.zeros((len(at), len(at)), bool)
    for name, label in ontology.items():
        for parent in label.parents:
            reach[at[name], at[parent]] = True
    while (grown := reach | (reach @ reach)).sum() > reach.sum():
        reach = grown
    vocabulary = labels.ontology_vocabulary(ontology, terms)
    wide = reach[np.ix_([at[t] for t in terms], [at[t] for t in terms])]
    np.fill_diagonal(wide, False)
    actual = np.zeros_like(wide)
    for column, parents in enumerate(vocabulary.parents):
        actual[column, list(parents)] = True
    np.testing.assert_array_equal(actual, wide)
    assert actual.sum() > 100


def test_parents_pass_through_terms_outside_the_vocabulary(family):
    vocabulary = labels.ontology_vocabulary(family, ["grandchild", "child", "root", "ring"])
    by_name = {label.name: label for label in vocabulary.labels}
    assert by_name["grandchild"].parents == ("child", "root")
    assert by_name["child"].parents == ("root",)
    assert by_name["grandchild"].exclusive == ("child",)
    assert by_name["ring"].parents == ()
    assert vocabulary.parents == ((1, 2), (2,), (), ())


def test_a_cycle_of_parents_terminates(family):
    vocabulary = labels.ontology_vocabulary(family, ["ring", "gnir"])
    assert vocabulary.parents == ((1,), (0,))


def test_a_vector_marks_the_names_and_ancestors_only_on_request(family):
    vocabulary = labels.ontology_vocabulary(family, ["root", "child", "grandchild", "ring"])
    vector = vocabulary.vector(["grandchild", "no such thing"])
    assert vector.dtype == np.uint8
    np.testing.assert_array_equal(vector, [0, 0, 1, 0])
    implied = vocabulary.vector(vocabulary.with_ancestors(["grandchild", "no such thing"]))
    np.testing.assert_array_equal(implied, [1, 1, 1, 0])
    np.testing.assert_array_equal(vocabulary.vector([]), [0, 0, 0, 0])


def test_adding_ancestors_is_idempotent(ontology, terms):
    vocabulary = labels.ontology_vocabulary(ontology, terms)
    assert vocabulary.with_ancestors(["right lower lobe"]) != ("right lower lobe",)
    for name in terms:
        names = vocabulary.with_ancestors([name])
        assert names[0] == name
        assert set(vocabulary.with_ancestors(names)) == set(names)


def test_exclusion_is_symmetric(ontology, terms):
    vocabulary = labels.ontology_vocabulary(ontology, terms)
    one_way = labels.Vocabulary((labels.Label("a", exclusive=("b",)), labels.Label("b")))
    assert one_way.excludes("a", ["b"]) and one_way.excludes("b", ["a"])
    assert vocabulary.excludes("liver", ["spleen"]) and vocabulary.excludes("spleen", ["liver"])
    assert not vocabulary.excludes("liver", ["abdomen", "no such thing"])


def vocabulary(*rows):
    """A vocabulary of (name, parents, exclusions)."""
    return labels.Vocabulary(tuple(labels.Label(n, "", tuple(p), tuple(e)) for n, p, e in rows))


def pairs(vocabulary):
    """The names that exclude each other."""
    one, two = np.nonzero(vocabulary.exclusive)
    names = vocabulary.names
    return {frozenset((names[a], names[b])) for a, b in zip(one, two, strict=True)}


def test_exclusion_is_inherited_by_the_children_of_both_sides():
    """chest and abdomen exclude each other, and so do their children; skin excludes nothing."""
    result = vocabulary(
        ("chest", (), ("abdomen",)),
        ("abdomen", (), ()),
        ("lung", ("chest",), ()),
        ("left lung", ("lung", "chest"), ("right lung",)),
        ("right lung", ("lung", "chest"), ()),
        ("liver", ("abdomen",), ("no such label",)),
        ("skin", (), ()),
    )
    expected = {
        frozenset((one, two))
        for one in ("chest", "lung", "left lung", "right lung")
        for two in ("abdomen", "liver")
    }
    assert pairs(result) == expected | {frozenset(("left lung", "right lung"))}
    np.testing.assert_array_equal(result.exclusive, result.exclusive.T)
    assert result.exclusive.dtype == bool and not result.exclusive.diagonal().any()


def test_the_closure_is_repeated_until_nothing_changes():
    """Inherited exclusions are inherited again, with direct parents only."""
    result = vocabulary(
        ("d", (), ("c",)),
        ("a", ("d",), ()),
        ("b", ("a",), ()),
        ("c", (), ()),
        ("e", ("c",), ()),
        ("f", ("e",), ()),
    )
    assert pairs(result) == {frozenset((one, two)) for one in "dab" for two in "cef"}


def test_a_label_that_excludes_its_parent_does_not_exclude_itself():
    result = vocabulary(("node", (), ()), ("low node", ("node",), ("node",)))
    assert pairs(result) == {frozenset(("node", "low node"))}


def test_names_without_relations_exclude_nothing():
    matrix = labels.Vocabulary.from_names(["a", "b"]).exclusive
    assert matrix.shape == (2, 2) and not matrix.any()


def directed_closure(vocabulary):
    """LesaNet's closure as a loop over pairs, with its one self-exclusion."""
    ancestors = {row.name: set(row.parents) for row in vocabulary.labels}
    children = {name: [n for n in ancestors if name in ancestors[n]] for name in ancestors}
    excludes = {row.name: set(row.exclusive) for row in vocabulary.labels}
    while True:
        before = sum(map(len, excludes.values()))
        for name, others in excludes.items():
            for parent in ancestors[name]:
                others |= excludes[parent]
            for other in list(others):
                others.update(children[other])
        if sum(map(len, excludes.values())) == before:
            return excludes


def test_the_real_closure_has_8902_directed_and_8920_symmetric_pairs(ontology, terms):
    vocabulary = labels.ontology_vocabulary(ontology, terms)
    directed = directed_closure(vocabulary)
    both = {(one, two) for one, others in directed.items() for two in others}
    assert sum(len(row.exclusive) for row in vocabulary.labels) == 396 and len(both) == 8902
    assert {one for one, two in both if one == two} == {"pretracheal lymph node"}
    lacking = {(two, one) for one, two in both} - both
    assert len(lacking) == 19 and {one for one, _ in lacking} == {"pleura"}
    names = np.array(vocabulary.names)
    one, two = np.nonzero(vocabulary.exclusive)
    expected = {(a, b) for a, b in both | lacking if a != b}
    assert set(zip(names[one].tolist(), names[two].tolist(), strict=True)) == expected
    assert vocabulary.exclusive.sum() == len(expected) == 8902 + 19 - 1 == 8920


def test_the_closure_is_idempotent(ontology, terms):
    once = labels.ontology_vocabulary(ontology, terms)
    names = once.names
    rows = tuple(
        labels.Label(row.name, "", row.parents, tuple(names[k] for k in np.flatnonzero(line)))
        for row, line in zip(once.labels, once.exclusive, strict=True)
    )
    twice = labels.Vocabulary(rows).exclusive
    np.testing.assert_array_equal(once.exclusive, once.exclusive.T)
    np.testing.assert_array_equal(twice, once.exclusive)


def test_json_and_pickle_round_trips(family):
    vocabulary = labels.ontology_vocabulary(family, ["grandchild", "child", "ring"])
    assert vocabulary.index == {"grandchild": 0, "child": 1, "ring": 2}
    again = labels.Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_plain_names_have_no_relations():
    vocabulary = labels.Vocabulary.from_names(["b", "a"])
    assert vocabulary.names == ("b", "a") and len(vocabulary) == 2
    assert vocabulary.parents == ((), ())


def test_a_label_outside_the_ontology_is_rejected(family):
    with pytest.raises(InputError, match="'spleen'.*2"):
        labels.ontology_vocabulary(family, ["root", "spleen", "liver"])


def test_bad_ontology_files_are_rejected_in_one_line(tmp_path):
    (tmp_path / "text.xlsx").write_text("class,term\n")
    write_sheet(tmp_path / "short.xlsx", [("bodypart", "liver")], header=HEADER[:2])
    openpyxl.Workbook().save(tmp_path / "empty.xlsx")
    for name, field in (
        ("absent.xlsx", ""),
        ("text.xlsx", ""),
        ("short.xlsx", "term_exclusive, term_parents"),
        ("empty.xlsx", "class"),
    ):
        with pytest.raises(InputError, match=f"{name}.*{field}") as caught:
            labels.read_ontology(tmp_path / name)
        assert "\n" not in str(caught.value)
