"""Data sets in object stores: copied to a local cache, checked, and used as local ones."""

import errno
import os
import pathlib
import shutil

import fsspec
import pytest
import test_records
import toy

from maknet_jax import cli, files, plan
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import config

URL = "memory://bucket/set"

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def remote(tmp_path):
    """A data set of two shards in train, in memory."""
    folder = test_records.write_set(tmp_path / "set", counts=(5, 3))
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        store.pipe_file(f"/bucket/set/{path.relative_to(folder)}", path.read_bytes())
    return store


def ids(source):
    return [source[number].id for number in range(len(source))]


def test_a_data_set_is_copied_once(remote, cache):
    dataset = records.open_dataset(URL)
    assert dataset.address == URL and dataset.path.parent == cache
    assert [path.name for path in dataset.path.iterdir()] == ["dataset.json"]  # shards when needed
    assert ids(dataset.source("train")) == [f"slice ü {number}" for number in range(8)]
    remote.rm("/bucket/set/train", recursive=True)
    assert ids(records.open_dataset(URL).source("train")) == ids(dataset.source("train"))
    assert not [path for path in cache.rglob("*") if path.suffix == ".tmp"]


def test_only_the_shards_that_are_read_are_copied(remote):
    dataset = records.open_dataset(URL)
    assert ids(dataset.shards(dataset.split("train")["shards"][1:])) == [
        f"slice ü {number}" for number in (5, 6, 7)
    ]
    assert len(list(dataset.path.rglob("*.array_record"))) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "other"])
def test_a_damaged_copy_is_refused_and_not_kept(remote, damage):
    name = "/bucket/set/train/part-00000.array_record"
    content = bytearray(remote.cat_file(name))
    if damage == "flip":
        pixels = test_records.make_example(2).image.transpose(2, 0, 1).tobytes()
        content[content.find(pixels[100:116])] ^= 1
    elif damage == "truncate":
        content = content[:-1000]
    else:
        content = remote.cat_file("/bucket/set/train/part-00001.array_record")
    remote.pipe_file(name, bytes(content))
    dataset = records.open_dataset(URL)
    with pytest.raises(InputError, match="memory://bucket/set/train/part-00000") as caught:
        dataset.source("train")
    assert "\n" not in str(caught.value)
    assert "part-00000.array_record" not in os.listdir(dataset.path / "train")


def test_a_changed_data_set_has_another_folder(remote, tmp_path):
    first = records.open_dataset(URL).path
    info = files.read_json(tmp_path / "set" / "dataset.json")
    files.write_json(tmp_path / "set" / "dataset.json", info | {"fingerprint": "g"})
    remote.put(str(tmp_path / "set" / "dataset.json"), "/bucket/set/dataset.json")
    assert records.open_dataset(URL).path != first


def test_a_plan_takes_the_counts_of_a_data_set_and_copies_no_shard(remote):
    dataset = plan._dataset(config.load("teacher", [f"data.path={URL}"]))
    assert dataset.split("train")["count"] == 8
    assert not list(dataset.path.rglob("*.array_record"))


def test_a_full_cache_names_the_file(remote, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dataset = records.open_dataset(URL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError) as caught:
            dataset.source("train")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.startswith(str(dataset.path / "train" / "part-0000"))
    assert not [path for path in dataset.path.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 1}', None])
def test_what_is_no_data_set_is_one_line(remote, content):
    if content is None:
        remote.rm("/bucket/set/dataset.json")
    else:
        remote.pipe_file("/bucket/set/dataset.json", content)
    with pytest.raises(InputError, match=URL) as caught:
        records.open_dataset(URL)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("install s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r"s3://bucket/set .*maknet-jax\[cloud\]"):
        records.open_dataset("s3://bucket/set")


def test_train_and_evaluate_read_from_s3(bucket, tmp_path, cache, capsys):
    data = toy.write(tmp_path / "data")
    bucket.put(str(data), "bucket/shards/toy", recursive=True)
    shutil.rmtree(data)
    url = "s3://bucket/shards/toy"
    changes = toy.overrides(url, "linear", epochs=1.0, evaluate_every=1.0)
    argv = ["train", "--config", "linear", *(f"--config.{change}" for change in changes)]
    assert cli.main([*argv, "--workdir", str(tmp_path / "run")]) == 0
    assert files.read_json(tmp_path / "run" / "dataset.json")["path"] == url
    assert cli.main(["evaluate", "--model", str(tmp_path / "run"), "--split", "val"]) == 0
    assert len(list(cache.rglob("*.array_record"))) == 2
    capsys.readouterr()
    absent = ["evaluate", "--model", str(tmp_path / "run"), "--data", "s3://bucket/absent"]
    assert cli.main(absent) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("maknet: s3://bucket/absent")
