"""The bundle format: a written bundle is read back, and a changed one is refused."""

import hashlib
import json
import pathlib
import shutil
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from bundles import info_of, refused, resign

import maknet_jax
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import bundle, card, workdir
from maknet_jax.training import transfer


@pytest.fixture
def copy(exported, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "copy")


def change_weights(folder, change):
    """Rewrites the weights as change(name -> array) returns them, with digests that fit."""
    arrays = safetensors.numpy.load_file(folder / bundle.WEIGHTS)
    safetensors.numpy.save_file(change(arrays), folder / bundle.WEIGHTS)
    resign(folder)


def equal_runs(one, two, tolerance=0.0):
    a, b = (jax.device_get(run.variables) for run in (one, two))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance), a, b)
    np.testing.assert_array_equal(one.thresholds, two.thresholds)
    assert one.vocabulary == two.vocabulary
    assert (one.step, one.name, one.size, one.window) == (two.step, two.name, two.size, two.window)


def test_a_folder_and_a_zip_open_like_the_workdir(exported, trained, tmp_path):
    run = workdir.open_run(trained)
    equal_runs(workdir.open_run(exported), run)
    equal_runs(workdir.open_run(f"{exported}.zip"), run)
    with zipfile.ZipFile(f"{exported}.zip") as archive:  # repacked, without a folder
        archive.extractall(tmp_path)
    with zipfile.ZipFile(tmp_path / "flat.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "torso").iterdir():
            archive.write(file, file.name)
    equal_runs(workdir.open_run(tmp_path / "flat.zip"), run)


def test_a_moved_or_downloaded_bundle_with_hidden_files_opens(copy):
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".cache").mkdir()
    target = copy.parent / "blob"  # as the cache of the Hugging Face Hub stores files
    (copy / bundle.WEIGHTS).rename(target)
    (copy / bundle.WEIGHTS).symlink_to(target)
    assert workdir.open_run(copy).is_bundle


def test_bundle_json_has_the_documented_fields_and_digests(exported):
    info = json.loads((exported / bundle.INFO).read_text())
    assert set(info) == set(bundle.FIELDS)
    for name, entry in info["files"].items():
        payload = (exported / name).read_bytes()
        assert entry == {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    unsigned = {key: value for key, value in info.items() if key != "sha256"}
    text = json.dumps(unsigned, sort_keys=True, separators=(",", ":"))
    assert info["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    weights = safetensors.numpy.load_file(exported / bundle.WEIGHTS)
    assert "params/stem/conv/kernel" in weights
    parameters = sum(a.size for name, a in weights.items() if name.startswith("params/"))
    assert info["weights"]["parameters"] == parameters


def test_the_weights_of_a_bundle_are_a_weights_file_too(exported, trained):
    params, batch_stats, _ = transfer.read(exported / bundle.WEIGHTS)
    info = json.loads((exported / bundle.INFO).read_text())
    digest = transfer.digest(params, batch_stats)
    assert digest == info["weights"]["digest"] == info["checkpoint"]["digest"]
    assert digest == workdir.open_weights(trained).metadata["digest"]
    assert digest == workdir.open_weights(exported).metadata["digest"]


def test_equal_content_gives_equal_zips(trained, tmp_path):
    for number in (1, 2):
        maknet_jax.export(trained, tmp_path / str(number) / "torso", zipped=True)
    one, two = ((tmp_path / f"{n}" / "torso.zip").read_bytes() for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("name", [bundle.INFO, *bundle.CONTENT])
def test_a_missing_file_is_refused(copy, capsys, name):
    (copy / name).unlink()
    # Without bundle.json it is any folder.
    refused(copy, capsys, "no config.json" if name == bundle.INFO else f"{name} is missing")


@pytest.mark.parametrize("name", [bundle.INFO, *bundle.CONTENT])
def test_a_truncated_file_is_refused(copy, capsys, name):
    payload = (copy / name).read_bytes()
    (copy / name).write_bytes(payload[:-9])
    says = "is not the JSON" if name == bundle.INFO else f"{name} has {len(payload) - 9:,} bytes"
    refused(copy, capsys, says)


@pytest.mark.parametrize("name", bundle.CONTENT)
@pytest.mark.parametrize("place", [0.0, 0.4, 0.999])
def test_a_flipped_bit_is_refused(copy, capsys, name, place):
    payload = bytearray((copy / name).read_bytes())
    payload[int(place * len(payload))] ^= 4
    (copy / name).write_bytes(payload)
    refused(copy, capsys, f"{name} does not match its digest")


def test_a_flipped_bit_in_bundle_json_never_changes_the_content(copy):
    path, run = copy / bundle.INFO, bundle.read(copy)
    payload = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for place in rng.choice(len(payload), 300, replace=False):
        changed = bytearray(payload)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            assert bundle.read(copy).info == run.info  # white space
            outcomes.add("equal")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_an_extra_file_or_folder_is_refused(copy, capsys):
    (copy / "loader.py").write_text("import os")
    refused(copy, capsys, "loader.py does not belong there")
    (copy / "loader.py").unlink()
    (copy / "code").mkdir()
    refused(copy, capsys, "code does not belong there")


def test_another_shape_or_name_is_refused(copy, capsys):
    kernel = "params/stem/conv/kernel"

    def wider(arrays):
        return arrays | {kernel: np.concatenate([arrays[kernel]] * 2, axis=-1)}

    change_weights(copy, wider)
    refused(copy, capsys, f"{kernel} is (7, 7, 3, 16) in model.safetensors, (7, 7, 3, 8)")


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda a: {n: v for n, v in a.items() if "spl" not in n},
            "params/spl/dense/bias is missing",
        ),
        (lambda a: a | {"params/more": np.zeros(2, np.float32)}, "params/more is (2,)"),
        (lambda a: a | {"other": np.zeros(2, np.float32)}, "other is (2,)"),
        (
            lambda a: {n: v.astype(np.float64) if n.endswith("bias") else v for n, v in a.items()},
            "has dtype F64: expected F32, F16, BF16",
        ),
        (lambda a: {n: np.full_like(v, np.nan) for n, v in a.items()}, "holds NaN or infinity"),
    ],
)
def test_other_weights_are_refused(copy, capsys, change, says):
    change_weights(copy, change)
    refused(copy, capsys, says)


def test_weights_other_than_safetensors_are_never_unpickled(copy, capsys):
    for payload in (b"\x80\x04\x95\x00cos\nsystem\n", b"PK\x03\x04 torch", b"", b"\xff" * 64):
        (copy / bundle.WEIGHTS).write_bytes(payload)
        resign(copy)
        refused(copy, capsys, "model.safetensors is not safetensors")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda i: {"labels": i["labels"][:-1]}, "thresholds of"),
        (
            lambda i: {"labels": i["labels"][:-1], "thresholds": i["thresholds"][:-1]},
            "params/classifier/bias is",
        ),
        (lambda i: {"thresholds": [2.0, *i["thresholds"][1:]]}, "should be in 0..1"),
        (lambda i: {"thresholds": ["a", *i["thresholds"][1:]]}, "is not complete"),
        (lambda i: {"labels": [i["labels"][0]] * len(i["labels"])}, "thresholds of"),
        (lambda i: {"labels": "liver"}, "is not complete"),
        (
            lambda i: {"labels": [i["labels"][0] | {"parents": ["none"]}, *i["labels"][1:]]},
            "is not complete",
        ),
        (lambda i: {"config": {}}, "is not complete"),
        (lambda i: {"config": i["config"] | {"model": {"name": "nn", "options": {}}}}, "'nn'"),
        (
            lambda i: {"config": i["config"] | {"model": {"name": "maknet", "options": {"a": 1}}}},
            "model maknet",
        ),
        (
            lambda i: {"config": {k: v for k, v in i["config"].items() if k != "optimizer"}},
            "describes no network",
        ),
        (
            lambda i: {"preprocessing": i["preprocessing"] | {"crop": "none"}},
            "needs crop 'none', but this version has",
        ),
        (
            lambda i: {"preprocessing": i["preprocessing"] | {"window": [0, 1]}},
            "needs window [0, 1], but this version has [-1024.0, 3071.0]",
        ),
        (lambda i: {"checkpoint": None}, "is not complete"),
        (lambda i: {"data": 7}, "is not complete"),
        (lambda i: {"data": i["data"] | {"origin": "OpenKBP"}}, "is not complete"),
        (lambda i: {"format": "maknet-jax bundle 9"}, "has format 'maknet-jax bundle 9'"),
    ],
)
def test_a_bundle_json_that_contradicts_itself_is_refused(copy, capsys, change, says):
    resign(copy, **change(info_of(copy)))
    refused(copy, capsys, says)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"format": 1}', "{}"])
def test_a_bundle_json_of_something_else_is_refused(copy, capsys, text):
    (copy / bundle.INFO).write_text(text)
    refused(copy, capsys, "is not the JSON of a bundle")


def test_a_size_that_is_not_a_number_is_refused(copy, capsys):
    info = info_of(copy)
    for size in ("9", None, 1.5, [1]):
        info["files"][bundle.CARD]["size"] = size
        info["sha256"] = bundle._self_digest(info)
        (copy / bundle.INFO).write_text(json.dumps(info))
        refused(copy, capsys, f"no size and digest of {bundle.CARD}")


def test_a_deep_config_is_refused(copy, capsys):
    deep: dict = {}
    for _ in range(700):
        deep = {"a": deep}
    resign(copy, config=info_of(copy)["config"] | {"more": deep})
    refused(copy, capsys, "is not complete")


def test_a_lacking_field_and_a_large_json_are_refused(copy, capsys, monkeypatch):
    info = info_of(copy)
    del info["metrics"]
    info["sha256"] = bundle._self_digest(info)
    (copy / bundle.INFO).write_text(json.dumps(info))
    refused(copy, capsys, "bundle.json lacks metrics")
    monkeypatch.setattr(bundle, "LARGEST_INFO", 100)
    refused(copy, capsys, "bundle.json has ")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stores_the_kernels_only(dtype):
    rng = np.random.default_rng(0)
    params = {"conv": {"kernel": rng.normal(size=(3, 3, 2, 2)).astype(np.float32)}}
    params["norm"] = {"bias": np.float32([1e-9, 1e9])}
    stats = {"norm": {"var": np.float32([1e-9, 1e9])}}
    stored = bundle.pack(params, stats, dtype)
    assert stored["params"]["conv"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(stored["params"]["norm"]["bias"], params["norm"]["bias"])
    np.testing.assert_array_equal(stored["batch_stats"]["norm"]["var"], stats["norm"]["var"])
    restored = stored["params"]["conv"]["kernel"].astype(np.float32)
    np.testing.assert_allclose(
        restored, params["conv"]["kernel"], rtol=2 ** (-11 if dtype == "float16" else -8)
    )


def test_weights_beyond_float16_and_unknown_dtypes_are_refused():
    params = {"kernel": np.full((2, 2), 1e6, np.float32)}
    with pytest.raises(InputError, match="params/kernel .*bfloat16 or float32"):
        bundle.pack(params, {}, "float16")
    stored = bundle.pack(params, {}, "bfloat16")["params"]["kernel"]
    np.testing.assert_allclose(stored.astype(np.float32), 1e6, rtol=0.01)
    with pytest.raises(InputError, match="'int8' is unknown: choose one of float32, float16"):
        bundle.pack(params, {}, "int8")


def test_writing_is_atomic_and_never_overwrites(exported, tmp_path, monkeypatch):
    info = info_of(exported)
    content = {name: (exported / name).read_bytes() for name in info["files"]}
    out = tmp_path / "out"
    bundle.write(out, info, content)
    with pytest.raises(InputError, match="out exists: choose another name or pass overwrite=True"):
        bundle.write(out, info, content)
    original, calls = bundle.files.write_whole, []

    def fail(path, *args, **options):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(bundle.files, "write_whole", fail)
    with pytest.raises(OSError, match="No space"):
        bundle.write(out, info | {"name": "new"}, content, overwrite=True)
    assert bundle.read(out).info["name"] == info["name"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    bundle.write(out, info | {"name": "new"}, content, overwrite=True, zipped=True)
    assert bundle.read(out).info["name"] == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.zip"]
    with pytest.raises(InputError, match="out.zip exists"):
        shutil.rmtree(out)
        bundle.write(out, info, content, zipped=True)


def test_a_folder_with_other_contents_is_never_replaced(exported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="mine exists and is not a bundle"):
            bundle.check_free(tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    bundle.check_free(tmp_path / "empty")


def test_the_config_of_a_bundle_contains_no_paths(exported, trained, shards):
    text = "".join((exported / name).read_text() for name in (bundle.INFO, bundle.CARD))
    for place in (trained, shards.path, pathlib.Path.home()):
        assert str(place) not in text
    config = bundle.read(exported).config
    assert config.data.path == config.pseudo.path == config.init.path == ""


def test_the_card_lists_the_intervals_of_every_label():
    labels = {"larynx": {"patients": 16, "auc": [0.971, 0.95, 0.98], "f1": [0.8, 0.7, 0.9]}}
    labels["brainstem"] = {"patients": 0}
    intervals = {"patients": 33, "auc": [0.98, 0.97, 0.99], "f1": [0.9, 0.88, 0.92]}
    values = {"auc": 0.98, "f1": 0.9, "precision": 0.9, "recall": 0.9, "examples": 918}
    info = {"data": {"images": {"val": 749}}, "config": {"data": {"val_split": "val"}}}
    tuning = {"validation": {name: values[name] for name in ("auc", "f1")}}
    metrics = tuning | {"test": values | {"intervals": intervals | {"labels": labels}}}
    text = card._scores(info | {"metrics": metrics})
    assert "| tuning (split val) | 0.980 | 0.900 | - | - | 749 |" in text
    assert "33 patients" in text
    assert "| larynx | 16 | 0.971 (0.950 to 0.980) | 0.800 (0.700 to 0.900) |" in text
    assert "| brainstem | 0 | - | - |" in text
    assert "33 patients" not in card._scores(info | {"metrics": {"test": values}})


def test_the_card_says_how_the_images_were_chosen():
    about = {"rules": {"every": 3, "min_area_mm2": 50.0}, "patients": {"train": 140, "test": 33}}
    about["splits"] = {"by folder": 33}
    dataset = records.Dataset(pathlib.Path(), {"about": about, "splits": {}})
    text = card._data({"choice": dataset.choice, "images": {"test": 918}})
    assert "- Patients: 140 train, 33 test" in text and "one slice of 3" in text
    assert "by folder (33 cases)" in text and "918 test" in text
    others = records.Dataset(pathlib.Path(), {"about": {"numbering": "by file"}})
    assert others.choice == {} and "Choice" not in card._data({"choice": {}})
