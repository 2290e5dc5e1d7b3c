"""Files and folders as arguments of the Python API and of the command line."""

import pathlib
import shutil

import numpy as np
import pytest

import maknet_jax
from maknet_jax import attribute, cli, files
from maknet_jax.errors import InputError
from maknet_jax.explain.options import PathOptions, SelectionOptions

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def model(trained):
    return maknet_jax.load(trained)


@pytest.fixture(scope="module")
def two(phantom, tmp_path_factory):
    """A folder with two series, and their folders."""
    root = tmp_path_factory.mktemp("scans")
    folders = sorted(phantom["dicom"].iterdir())[:2]
    return root, [shutil.copytree(path, root / str(n)) for n, path in enumerate(folders)]


def test_several_paths_are_read_in_their_order(model, two, tmp_path, trained):
    root, folders = two
    expected, result = model.predict(root), model.predict([folders[1], str(folders[0])])
    assert [s.id for s in result.series] == [s.id for s in reversed(expected.series)]
    second = len(expected.series[0])
    np.testing.assert_array_equal(result.confidences[-second:], expected.confidences[:second])
    # Names are relative to the common folder.
    assert result.table()[-second]["file"] == expected.table()[0]["file"]
    overlapping = model.predict([root, folders[0], folders[0]])
    assert len(overlapping) == len(expected) and not overlapping.failures
    argv = ["predict", *map(str, folders), "--model", str(trained)]
    assert cli.main([*argv, "--out", str(tmp_path / "both.csv")]) == 0
    assert cli.main(["predict", str(root), *argv[3:], "--out", str(tmp_path / "one.csv")]) == 0
    assert (tmp_path / "both.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    np.testing.assert_array_equal(model.features(folders[0]), model.features(result)[-second:])
    np.testing.assert_array_equal(model.logits([root]), model.logits(expected))


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "nowhere does not exist: pass a file or a folder"),
        ([HERE, "nowhere"], "nowhere does not exist"),
        (["a", np.zeros(3)], "ndarray in a list of paths: pass files and folders"),
    ],
)
def test_paths_that_cannot_be_read_are_named(model, source, message):
    for method in (model.predict, model.features, model.logits, model.attribute):
        with pytest.raises(InputError, match=message):
            method(source)


def test_the_command_and_python_explain_the_same_slices(model, trained, two, tmp_path):
    root, _ = two
    result = model.predict(root)
    labels = list(dict.fromkeys(c.label for series in result.series for c in series.covers))[:2]
    ours = model.attribute(root, labels, limit=3, steps=2, refine=0)
    argv = ["attribute", str(root), "--model", str(trained), "--out", str(tmp_path / "maps")]
    argv += ["--labels", ",".join(labels), "--limit", "3", "--steps", "2", "--refine", "0"]
    assert cli.main(argv) == 0
    index = files.read_json(tmp_path / "maps" / "index.json")
    assert tuple(entry["id"] for entry in index) == ours.ids
    assert len({name.rpartition(":")[0] for name in ours.ids}) == 2  # both series
    best = result.confidences[:, model.labels.index(labels[0])].argmax()
    first = result.series[0]
    series, number = (first, best) if best < len(first) else (result.series[1], best - len(first))
    assert f"{series.id}:{number}" in ours.ids
    assert cli.main(argv) == 0  # resumes with the same slices
    with pytest.raises(InputError, match="selection.order"):  # of an earlier version
        settings = files.read_json(tmp_path / "maps" / "settings.json")
        del settings["selection"]["order"]
        files.write_json(tmp_path / "maps" / "settings.json", settings)
        selected = SelectionOptions(path=root, labels=labels, limit=3)
        attribute.attribute(trained, tmp_path / "maps", selected, PathOptions(steps=2, refine=0))
