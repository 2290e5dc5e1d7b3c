"""Truncated or odd files of a run end every command in one line with code 2, not in a traceback."""

import itertools
import pathlib
import shutil

import pytest
import toy

from maknet_jax import cli, files
from maknet_jax.errors import InputError
from maknet_jax.runs import config as configs
from maknet_jax.training import transfer

ODD = ("", "{", "[]", "null", "3", "{}", '{"model": 3}', '{"labels": 3}', "\x00\xff", "[" * 9999)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A toy run with an evaluation, its data, unlabelled images and pseudo-labels."""
    folder = tmp_path_factory.mktemp("damaged")
    data = toy.write(folder / "data")
    images = toy.write_unlabelled(folder / "images")
    toy.write_pseudo(folder / "pseudo", images)
    assert cli.main([*train_argv(data), "--workdir", str(folder / "run")]) == 0
    assert cli.main(["evaluate", "--model", str(folder / "run"), "--split", "val"]) == 0
    return folder


def train_argv(data, *changes):
    fields = [*toy.overrides(data, "linear", epochs=1.0, evaluate_every=1.0), *changes]
    return ["train", "--config", "linear", *(f"--config.{field}" for field in fields)]


def verbs_of(folder, out):
    """The commands that read the files of the folder."""
    run, data = str(folder / "run"), str(folder / "data")
    pseudo = (f"pseudo.path={folder / 'pseudo'}", "pseudo.batch_size=8")
    return {
        "train": [*train_argv(data), "--workdir", run],
        "student": [*train_argv(data, *pseudo), "--workdir", str(out / "student")],
        "evaluate": ["evaluate", "--model", run, "--split", "val", "--out", str(out / "e")],
        "pseudo-label": ["pseudo-label", "--model", run, "--records", str(folder / "images")]
        + ["--out", str(out / "p")],
        "export": ["export", run, "--out", str(out / "b")],
        "from": [*train_argv(data, f"init.path={run}"), "--workdir", str(out / "from")],
        "verify": ["verify", run],
    }


READERS = {
    "run/config.json": ("train", "evaluate", "from", "verify"),
    "run/dataset.json": ("train", "pseudo-label", "from", "verify"),
    "run/summary.json": (),
    "run/evaluation/summary_*.json": ("export",),
    "data/dataset.json": ("train", "evaluate"),
    "pseudo/pseudo.json": ("student",),
}


@pytest.mark.parametrize("name", READERS)
def test_odd_json_ends_in_one_line(whole, tmp_path, name, capsys):
    folder = pathlib.Path(shutil.copytree(whole, tmp_path / "all"))
    for path in (folder / "run").glob("dataset.json"):  # names the data of the copy
        files.write_json(path, files.read_json(path) | {"path": str(folder / "data")})
    info = files.read_json(folder / "pseudo" / "pseudo.json")
    files.write_json(folder / "pseudo" / "pseudo.json", info | {"records": str(folder / "images")})
    (path,) = folder.glob(name)
    content = path.read_text()
    for text, verb in itertools.product((*ODD, content[: len(content) // 2]), READERS[name]):
        path.write_text(text, encoding="latin-1")
        capsys.readouterr()
        code = cli.main(verbs_of(folder, tmp_path)[verb])
        output = capsys.readouterr()
        assert code == 2, (text[:20], verb)
        if verb != "verify":
            assert len(output.err.splitlines()) == 1, (text[:20], verb, output.err)


def drop(values, path):
    *groups, last = path
    for group in groups:
        values = values[group]
    del values[last]


@pytest.mark.parametrize(
    "path",
    [("data",), ("data", "size"), ("model", "name"), ("loss", "name"), ("augment",), ("epochs",)],
)
def test_a_config_without_a_field_is_refused(whole, tmp_path, path):
    values = files.read_json(whole / "run" / "config.json")
    assert configs.read_stored(whole / "run").data.size == toy.SIZE
    drop(values, path)
    files.write_json(tmp_path / "config.json", values)
    with pytest.raises(InputError, match="config.json is not the config"):
        configs.read_stored(tmp_path)


def test_a_field_of_another_type_is_refused(whole, tmp_path):
    values = files.read_json(whole / "run" / "config.json")
    for field, value in (("size", "32"), ("window", 3), ("path", None)):
        changed = values | {"data": values["data"] | {field: value}}
        files.write_json(tmp_path / "config.json", changed)
        with pytest.raises(InputError, match=f"data.{field} is not of type"):
            configs.read_stored(tmp_path)


def test_weights_that_are_truncated_or_odd_are_refused(tmp_path):
    import numpy as np

    path = tmp_path / "w.safetensors"
    transfer.write(path, {"a": {"kernel": np.ones((3, 3), np.float32)}}, {}, {})
    assert transfer.read(path)[0]["a"]["kernel"].shape == (3, 3)
    content = path.read_bytes()
    for length in (0, 4, 8, 40, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="w.safetensors"):
            transfer.read(path)
    for arrays, metadata in (({"x": np.ones(2)}, {"digest": "0"}), ({"params/x": np.ones(2)}, {})):
        path.write_bytes(transfer.encode_arrays(arrays, {"format": transfer.FORMAT, **metadata}))
        with pytest.raises(InputError, match="damaged"):
            transfer.read(path)
