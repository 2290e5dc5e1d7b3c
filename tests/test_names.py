"""Misspelt names, and lists of names with commas in them."""

import doctest
import types

import numpy as np
import pytest

from maknet_jax import cli, errors
from maknet_jax.cli import options
from maknet_jax.data import records, segmentations
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, did_you_mean
from maknet_jax.explain import label_names, ranking
from maknet_jax.runs import workdir

NAMES = [f"organ {number}" for number in range(113)] + ["liver", "fat, left side"]


def run(names=NAMES):
    return types.SimpleNamespace(vocabulary=Vocabulary.from_names(names))


def test_an_unknown_label_lists_three_near_ones_not_all():
    with pytest.raises(InputError, match="did you mean 'liver',") as error:
        label_names.label_columns(run(), ["Livr"])
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
    assert label_names.label_columns(run(), options.words(text)) == columns


def test_words_that_are_labels_are_not_joined():
    known = run(["a", "b", "a, b", "c, a, b"])
    assert label_names.label_columns(known, ["a", "b"]) == [0, 1]
    assert label_names.label_columns(known, ["c", "a", "b"]) == [3]
    assert label_names.label_columns(known, ["a, b"]) == [2]
    assert label_names.label_columns(known, "a, b") == [2]  # one label as a string
    with pytest.raises(InputError, match="'c' is unknown"):
        label_names.label_columns(known, ["c", "a"])


def test_the_examples_of_the_docstrings_run():
    for module in (errors, label_names, ranking):
        results = doctest.testmod(module)
        assert results.failed == 0 < results.attempted


@pytest.mark.parametrize(
    "argv, hint",
    [
        ("predict scans --modle head-neck --out x.csv", "did you mean '--model'"),
        ("attribute --lables=liver --out y", "did you mean '--labels'"),
        ("prepare dicom scans --otu y", "did you mean '--out'"),
        ("train --config smoke --wrokdir x", "did you mean '--workdir'"),
        ("predict scans --config.seed=3", "unknown option '--config.seed=3'"),
        ("report x --zzzzzzzzz", "unknown option '--zzzzzzzzz' (see"),
        ("report x -z", "unknown argument '-z'"),
        ("prepare dicom x y --out z", "'y': expected one folder, which is 'x': put them into one"),
        ("prepare dicom x --out z -- y", "'y': expected one folder"),
        ("evaluate --model m --split val test", "'test': the command takes options only; separate"),
        ("prepare openkbp x --out z y", "'y': expected one folder, which is 'x': run"),
        ("verify x y", "'y': expected one path, which is 'x': run"),
        ("predict x --model m --out z y", "'y': write all values of path together"),
        ("evaluate --model m x", "'x': the command takes options only"),
    ],
)
def test_an_unexpected_argument_is_explained(argv, hint, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and hint in err and err.count("\n") == 1


def test_words_that_are_not_options_are_not_checked():
    parser = options.Parser(prog="x")
    parser.add_argument("--note")
    parser.add_argument("words", nargs="*")
    chosen, rest = parser.parse_known_args(["--note", "--a b", "--config.a=1", "--", "--notes"])
    assert (chosen.note, chosen.words, rest) == ("--a b", ["--notes"], ["--config.a=1"])


def test_an_unknown_model_names_the_nearest_released_one():
    with pytest.raises(InputError, match="head-nek not found: did you mean 'head-neck'. Or pass"):
        workdir.find("head-nek")
    with pytest.raises(InputError, match="runs/teacher not found: pass a workdir"):
        workdir.find("runs/teacher")


@pytest.mark.parametrize(
    "argv, says",
    [
        ("export x --out b.zip", "pass b; `export --zip` also"),
        ("attribute x --model y --out maps.csv", "pass maps"),
        ("report x --out page.html", "pass page"),
        ("prepare dicom x --out file", "file is a file: pass the name of a folder"),
        ("train --config smoke --workdir file", "file is a file: pass the name of a folder"),
    ],
)
def test_a_file_as_output_folder_is_refused(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        cli.main(argv.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and err.count("\n") == 1
    assert options.folder("runs/rate-0.01") == "runs/rate-0.01"
    (tmp_path / "odd.csv").mkdir()
    assert options.folder("odd.csv") == "odd.csv"


@pytest.mark.parametrize(
    "limit, expected",
    [
        (None, [1, 4]),  # the best slice of each label
        (1, [1]),
        (2, [1, 4]),
        (3, [1, 3, 4]),  # the second series before the second slice of the first
        (4, [1, 2, 3, 4]),
        (5, [1, 2, 3, 4, 5]),
        (9, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_best_slices_are_of_different_series_first(limit, expected):
    confidences = np.array(
        [[0.1, 0.1], [0.9, 0.2], [0.8, 0.3], [0.7, 0.4], [0.2, 0.9], [0.3, 0.1]], np.float32
    )
    groups = ["a", "a", "a", "b", "b", "c"]
    assert ranking.best_slices(confidences, confidences >= 0.5, groups, limit) == expected


def test_without_labels_each_slice_counts_with_the_best_label_that_reaches_its_threshold():
    confidences = np.array([[0.6, 0.5], [0.1, 0.2], [0.9, 0.8], [0.65, 0.1]])
    thresholds = np.array([0.7, 0.3])
    scores, reached = ranking.label_scores(confidences, thresholds, [])
    np.testing.assert_allclose(scores[:, 0], [0.5, 0.2, 0.9, 0.65])
    assert reached[:, 0].tolist() == [True, False, True, False]
    # The best of the second series comes before the second of the first, as both reach theirs.
    assert ranking.best_slices(scores, reached, ["a", "a", "b", "a"], 2) == [0, 2]
    scores, reached = ranking.label_scores(confidences, np.array([0.7, 1.0]), [1, 0])
    np.testing.assert_allclose(scores, confidences[:, [1, 0]])
    assert reached.tolist() == [[False, False], [False, False], [False, True], [False, False]]
