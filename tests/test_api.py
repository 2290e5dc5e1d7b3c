"""The Python API: `load`, `Model`, callable verbs, and the examples of the docs."""

import dataclasses
import doctest
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import nibabel
import numpy as np
import pytest

import maknet_jax
from maknet_jax import api, attribute, cli
from maknet_jax.ct import preprocess, search, volumes
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.explain.network import open_networks
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.explain.results import load as load_result
from maknet_jax.runs import workdir

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(trained):
    return maknet_jax.load(trained)


@pytest.fixture(scope="module")
def series(phantom):
    """The folder of one DICOM series."""
    return sorted(phantom["dicom"].iterdir())[0]


@pytest.fixture(scope="module")
def result(model, series):
    return model.predict(series, features=True)


@pytest.fixture
def scene(trained, series, shards, tmp_path, monkeypatch):
    """The folder that the examples of the docs run in."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "scans").mkdir()
    (tmp_path / "shards").mkdir()
    shutil.copytree(trained, tmp_path / "runs" / "teacher")
    shutil.copytree(series, tmp_path / "scans" / "series")
    (tmp_path / "shards" / "mine").symlink_to(shards.path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (REPO / name).read_text(encoding="utf-8"), re.S)


def test_the_examples_of_the_docs_run(scene):
    names = {}
    for block in python_blocks("docs/api.md"):
        exec(compile(block, "docs/api.md", "exec"), names)
    assert names["maps"].labels == ((names["label"],),)
    assert {path.name for path in scene.iterdir()} >= {"labels.csv", "teacher-bundle.zip"}
    stored = np.load(scene / "features.npz")
    np.testing.assert_allclose(stored["features"], names["features"], atol=1e-5)


def test_the_first_example_of_the_readme_runs(scene):
    names = {}
    exec(compile(python_blocks("README.md")[0], "README.md", "exec"), names)
    assert names["maps"].maps.shape[:2] == (1, 1)


def test_the_examples_of_the_docstrings_run(scene):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=flags)
    tests = [test for test in finder.find(api, "api") if test.examples]
    assert len(tests) == 4
    tests.sort(key=lambda test: test.name != "api")  # the others use the model of the module's
    names = {}
    for test in tests:
        test.globs = test.globs | names
        runner.run(test, clear_globs=False)
        names |= {key: test.globs[key] for key in ("model", "np") if key in test.globs}
    assert runner.summarize(verbose=False).failed == 0


def test_importing_the_package_imports_no_jax_and_verbs_can_be_called():
    code = (
        "import os, sys, maknet_jax\n"
        "assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), 'imported'\n"
        "from maknet_jax import cli\n"  # chooses the level itself, see `cli.main`
        "assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ\n"
        "import inspect\n"
        "from maknet_jax import train\n"
        "import maknet_jax.evaluate, maknet_jax.data\n"
        "assert os.environ['TF_CPP_MIN_LOG_LEVEL'] == '3'\n"  # hides "Very slow compile?"
        "assert callable(train) and train.train.__name__ == 'train'\n"
        "assert inspect.signature(train) == inspect.signature(train.train)\n"
        "assert callable(maknet_jax.evaluate) and not callable(maknet_jax.data)\n"
        "assert maknet_jax.export is sys.modules['maknet_jax.export']\n"
        "assert maknet_jax.load.__module__ == 'maknet_jax.api'\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        maknet_jax.nowhere  # noqa: B018


def test_the_functions_of_the_package_are_listed():
    assert {"load", "Model"} <= set(dir(maknet_jax))


def test_every_verb_is_a_function(monkeypatch):
    verbs = set(cli._parser()._subparsers._group_actions[0].choices) - {
        "prepare",
        "models",
        "select",
    }
    assert {"train", "predict", "export", "report", "demo"} <= verbs
    for verb in [*verbs, "model-table", "select-idc"]:
        module = getattr(maknet_jax, verb.replace("-", "_"))
        assert callable(module) and inspect.ismodule(module), verb
    monkeypatch.setattr(maknet_jax.train, "train", lambda *args, **options: (args, options))
    assert maknet_jax.train("config", "folder", devices=[]) == (
        ("config", "folder"),
        {"devices": []},
    )


def test_a_failed_import_inside_a_verb_is_not_hidden():
    code = (
        "import sys, maknet_jax\n"
        "sys.modules['jinja2'] = None  # not installed\n"
        "try:\n"
        "    maknet_jax.report\n"
        "except ModuleNotFoundError as error:\n"
        "    sys.exit(error.name != 'jinja2')\n"
        "sys.exit('no error, or another')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prediction_summarizes_the_coverage_of_each_series(model, result, series, trained):
    volume = volumes.load_series(search.find_series(series)[0][0])
    (one,) = result.series
    assert len(result) == len(one) == len(volume.hu) == len(result.table())
    np.testing.assert_allclose(np.diff(one.z_mm), volume.spacing[0])
    for number, row in enumerate(result.table()):
        above = {
            name
            for k, name in enumerate(model.labels)
            if one.confidences[number, k] >= model.thresholds[k] and model.thresholds[k] < 1
        }
        assert above <= set(row["labels"]) == set(result.labels[number])
        assert row["z_mm"] == number * volume.spacing[0] and row["file"] == one.slices[number]
        assert row["confidences"] == sorted(row["confidences"], reverse=True)
    assert one.covers
    for cover in one.covers:
        having = [k for k, labels in enumerate(result.labels) if cover.label in labels]
        assert (cover.first_slice, cover.last_slice, cover.slices) == (
            having[0],
            having[-1],
            len(having),
        )
        assert cover.first_mm == pytest.approx(having[0] * volume.spacing[0])
        assert f"{cover.label}" in str(result)
    run = workdir.open_run(trained)
    np.testing.assert_array_equal(run.thresholds, model.thresholds)


def test_a_folder_of_several_series_and_a_broken_file(model, phantom, series, tmp_path):
    for number, folder in enumerate(sorted(phantom["dicom"].iterdir())[:2]):
        shutil.copytree(folder, tmp_path / str(number))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    result = model.predict(tmp_path)
    assert len(result.series) == 2 and len(result.failures) == 1
    assert len(result) == sum(map(len, result.series)) == len(result.confidences)
    assert result.features is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no readable series"):
        model.predict(tmp_path / "empty")


def test_an_array_in_any_order_equals_the_file(model, tmp_path):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 400, (40, 48, 6)).astype(np.int16)  # x, y, z to RAS
    affine = np.diag([0.9, 0.8, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    expected = model.predict(tmp_path / "ct.nii.gz")
    np.testing.assert_allclose(np.diff(expected.series[0].z_mm), 4.0)
    assert {row["file"] for row in expected.table()} == {"ct.nii.gz"}
    assert {row["file"] for row in expected.series[0].slice_rows()} == {"ct.nii.gz"}
    variants = {
        "affine": (hu, {"affine": affine}),
        "letters": (hu, {"spacing": (0.9, 0.8, 4.0), "orientation": "RAS"}),
        "slices first": (
            hu.transpose(2, 1, 0)[::-1, ::-1, ::-1],
            {"spacing": (4.0, 0.8, 0.9), "orientation": "ipl"},
        ),
        "floats": (hu.astype(np.float64), {"affine": affine}),
    }
    for name, (array, geometry) in variants.items():
        volume = model.predict(array, **geometry)
        np.testing.assert_allclose(
            volume.confidences, expected.confidences, atol=1e-6, err_msg=name
        )
    other = model.predict(hu, spacing=(0.9, 0.8, 4.0), orientation="LPI")
    assert np.abs(other.confidences - expected.confidences).max() > 1e-3  # geometry matters


HU = np.tile(np.arange(-1000, 0, 50, dtype=np.int16), (4, 8, 1))


def test_values_that_do_not_look_like_hu_are_read_on_demand(model):
    geometry = {"affine": np.diag([1.0, 1, 2, 1])}
    with pytest.raises(InputError, match="assume_hu=True"):
        model.predict(HU + 1000, **geometry)
    assert len(model.predict(HU + 1000, assume_hu=True, **geometry)) == 20


def test_an_empty_list_is_a_list_of_paths(model):
    for method in (model.predict, model.features, model.attribute):
        with pytest.raises(InputError, match="empty list of paths"):
            method([])


def test_files_contain_their_geometry(model, series):
    with pytest.raises(InputError, match="stores its own geometry"):
        model.predict(series, affine=np.eye(4))


def test_features_and_logits_are_those_of_the_network(model, result, shards):
    source = shards.source("test")
    images = np.stack([source[number].image for number in range(3)])
    outputs = model.run.model.apply(
        jax.device_get(model.run.variables), model.run.to_input(images), train=False
    )
    np.testing.assert_allclose(model.logits(images), outputs.logits, atol=1e-5)
    np.testing.assert_allclose(model.features(images, batch_size=8), outputs.features, atol=1e-5)
    np.testing.assert_allclose(model.features(result), result.features, atol=1e-5)
    sigmoid = 1 / (1 + np.exp(-model.logits(result)))
    np.testing.assert_allclose(sigmoid, result.confidences, atol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 32, 32), np.int16), r"\(2, 32, 32\) should be \[N, 32, 32, 3\]"),
        (np.zeros((2, 64, 64, 3), np.int16), r"should be \[N, 32, 32, 3\]"),
        (np.zeros((0, 32, 32, 3), np.int16), r"should be \[N, 32, 32, 3\]"),
        (np.zeros((2, 32, 32, 3), np.float32), "float32 should be int16 HU"),
        (np.full((2, 32, 32, 3), 99999), "should be int16 HU"),
    ],
)
def test_images_of_another_form_are_refused(model, images, message):
    for method in (model.features, model.logits, model.attribute):
        with pytest.raises(InputError, match=message):
            method(images)


def test_attributions_equal_those_of_the_verb(model, trained, shards, tmp_path):
    source = shards.source("test")
    labels = list(model.labels[:2])
    ids = [source[number].id for number in range(3)]
    images = np.stack([source[number].image for number in range(3)])
    ours = model.attribute(images, labels, steps=4, refine=0)
    attribute.attribute(
        trained,
        tmp_path / "maps",
        SelectionOptions(split="test", ids=ids, labels=None, top=len(model.labels)),
        PathOptions(steps=4, refine=0),
    )
    stored = {}
    for path in (tmp_path / "maps" / "cases").glob("*.npz"):
        metadata, content = load_result(path)
        places = {e["label"]: e["map"] for e in metadata["models"][0]["labels"]}
        maps = content["maps_0"].astype(np.float32) * content["scale_0"][:, None, None, None]
        stored[metadata["id"]] = [maps[places[label]] for label in labels]
    for row, name in enumerate(ids):
        for column in range(2):
            np.testing.assert_allclose(
                ours.maps[row, column], stored[name][column], atol=2e-3 * abs(ours.maps).max()
            )
    assert ours.labels == (tuple(labels),) * 3 and ours.ids == ("0", "1", "2")
    change = ours.maps.sum((2, 3, 4)) - (ours.end - ours.start)
    np.testing.assert_allclose(
        np.abs(change) / np.maximum(np.abs(ours.end - ours.start), 0.01), ours.relative, atol=1e-4
    )


def test_a_prediction_is_explained_where_it_is_most_confident(model, result):
    label = result.series[0].covers[0].label
    column = model.labels.index(label)
    maps = model.attribute(result, [label], steps=2, refine=0)
    assert repr(maps).startswith(f"<Integrated Gradients of {label}: maps 1 x 1 x ")
    assert "\n" not in repr(maps)
    best = int(np.argmax(result.confidences[:, column]))
    assert maps.ids == (f"{result.series[0].id}:{best}",) and maps.labels == ((label,),)
    volume = result.series[0].read()
    image, _ = preprocess.make_triplet(preprocess.neighbours(volume.hu, best), model.size)
    np.testing.assert_array_equal(maps.images[0], image)
    assert maps.end[0, 0] == pytest.approx(result.confidences[best, column], abs=1e-5)
    most = model.attribute(result, top=2, steps=2, refine=0)
    assert len(most.labels) == 1 and len(most.labels[0]) == 2
    with pytest.raises(InputError, match="'nowhere' is unknown"):
        model.attribute(result, ["nowhere"])
    with pytest.raises(InputError, match="options pace: choose from steps"):
        model.attribute(result, [label], pace=3)


def test_sources_that_cannot_be_loaded_are_named(tmp_path, trained):
    with pytest.raises(InputError, match=r"nowhere not found: pass a workdir .*released model \("):
        maknet_jax.load("nowhere")
    with pytest.raises(InputError, match="has no config.json"):
        maknet_jax.load(tmp_path)
    with pytest.raises(InputError, match="'newest'"):
        maknet_jax.load(trained, checkpoint="newest")


def test_a_released_model_is_loaded_by_its_name(trained, tmp_path, monkeypatch):
    maknet_jax.export(trained, tmp_path / "released" / "phantom-torso", zipped=True)
    shutil.rmtree(tmp_path / "released" / "phantom-torso")
    from maknet_jax.runs import bundle

    monkeypatch.setattr(bundle, "__file__", str(tmp_path / "runs" / "bundle.py"))
    assert list(bundle.released()) == ["phantom-torso"]
    model = maknet_jax.load("phantom-torso")
    assert model.run.is_bundle and model.run.source.name == "phantom-torso.zip"
    with pytest.raises(InputError, match=r"released model \(phantom-torso\)"):
        maknet_jax.load("phantom-tors")


def test_the_network_of_the_api_is_the_networks_of_the_verbs(model, trained):
    one, two = model._network, open_networks(trained)[0]
    assert one.identity == two.identity and one.name == two.name


def test_predict_writes_features_with_their_ids(model, trained, series, result, tmp_path):
    out, features = tmp_path / "labels.csv", tmp_path / "features.npz"
    argv = ["predict", str(series), "--model", str(trained), "--out", str(out)]
    assert cli.main([*argv, "--features", str(features)]) == 0
    with np.load(features, allow_pickle=False) as stored:
        assert stored["features"].dtype == np.float32
        np.testing.assert_allclose(stored["features"], result.features, atol=1e-5)
        one = result.series[0]
        assert stored["ids"].tolist() == [f"{one.id}:{k}" for k in range(len(one))]
    assert cli.main([*argv, "--features", str(tmp_path / "features.csv")]) == 2


def test_a_series_is_read_once_for_all_its_slices(model, series, monkeypatch):
    result = model.predict(series)
    reads, load = [], volumes.load_series
    monkeypatch.setattr(
        "maknet_jax.ct.volumes.load_series", lambda *a, **k: reads.append(a) or load(*a, **k)
    )
    (one,) = result.series
    read = dataclasses.replace(one, read=lambda: reads.append(1) or one.read())
    result = dataclasses.replace(result, series=(read,))
    reads.clear()
    features = model.features(result, batch_size=8)  # two batches
    assert len(features) == len(result) > 8 and reads.count(1) == 1
    labels = [model.labels[k] for k in np.argsort(-result.confidences.max(axis=0))[:3]]
    best = {int(np.argmax(result.confidences[:, model.labels.index(name)])) for name in labels}
    reads.clear()
    assert len(model.attribute(result, labels, steps=1, refine=0).ids) == len(best)
    assert reads.count(1) == 1


def test_records_can_be_explained_too(model, shards):
    assert isinstance(shards, records.Dataset)
    image = shards.source("test")[0].image[None]
    assert model.attribute(image, top=1, steps=2, refine=0).maps.shape == (1, 1, 32, 32, 3)
