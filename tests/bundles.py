"""Shared by the tests of bundles: damaging one, and what a refusal is."""

import hashlib
import json

import pytest

from maknet_jax import cli
from maknet_jax.errors import InputError
from maknet_jax.runs import bundle, workdir


def info_of(folder):
    return json.loads((folder / bundle.INFO).read_text())


def resign(folder, **changes):
    """Rewrites bundle.json with changed fields, sizes and digests that fit the files."""
    info = json.loads((folder / bundle.INFO).read_text()) | changes
    for name in info["files"]:
        payload = (folder / name).read_bytes()
        digest = hashlib.sha256(payload).hexdigest()
        info["files"][name] = {"size": len(payload), "sha256": digest}
    info["sha256"] = bundle._self_digest(info)
    (folder / bundle.INFO).write_text(json.dumps(info))


def refused(path, capsys, part):
    """Asserts that a verb refuses a bundle in one line with exit code 2, `part` in it."""
    with pytest.raises(InputError) as error:
        workdir.open_run(path)
    assert part in str(error.value), str(error.value)
    argv = ["evaluate", "--model", str(path), "--data", "x", "--out", str(path) + "-out"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and part in err and len(err) < 600
