"""Untrusted bundles as .zip files."""

import pathlib
import stat
import zipfile

import numpy as np
import pytest
from bundles import refused

from maknet_jax.errors import InputError
from maknet_jax.runs import bundle


def zip_of(folder, path, **entries):
    """A zip of a bundle with further or other entries: name -> bytes or (ZipInfo, bytes)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            if file.name not in entries:
                archive.write(file, f"torso/{file.name}")
        for name, payload in entries.items():
            if payload is not None:
                archive.writestr(*payload) if isinstance(payload, tuple) else archive.writestr(
                    name, payload
                )
    return path


def test_a_damaged_zip_is_refused_or_read_unchanged(exported, tmp_path):
    payload, run = pathlib.Path(f"{exported}.zip").read_bytes(), bundle.read(exported)
    rng = np.random.default_rng(1)
    path, refusals = tmp_path / "torso.zip", 0
    for number in range(200):
        changed = bytearray(payload)
        if number % 2:
            place = rng.integers(len(payload) - 600, len(payload))  # in the directory
            changed[place] ^= 1 << rng.integers(8)
        else:
            del changed[rng.integers(len(payload)) :]
        path.write_bytes(changed)
        try:
            again = bundle.read(path)
        except InputError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        assert again.info == run.info
    assert refusals > 100


def link(name, target):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return (entry, target)


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"../evil": b"x"}, "'../evil' is not the name"),
        ({"torso/../evil": b"x"}, "'torso/../evil' is not the name"),
        ({"/etc/evil": b"x"}, "'/etc/evil' is not the name"),
        ({"C:\\evil": b"x"}, "is not the name"),
        ({"torso/evil": b"x"}, "evil does not belong there"),
        ({"other/evil": b"x"}, "does not belong there"),
        ({"torso/deep/evil": b"x"}, "does not belong there"),
        ({"torso/evil": link("torso/evil", "/etc/passwd")}, "is a link"),
        ({"README.md": link("torso/README.md", "/etc/passwd")}, "'torso/README.md' is a link"),
        ({"README.md": ("torso/README.md", b"\0" * (50 << 20))}, "expands 100 times"),
        ({"README.md": None}, "README.md is missing"),
        ({"bundle.json": None}, "it has no bundle.json"),
        ({"README.md": ("torso/README.md", b"other text")}, "README.md has 10 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_zips_are_refused_and_write_nothing(exported, tmp_path, capsys, entries, says):
    path = zip_of(exported, tmp_path / "torso.zip", **entries)
    before = sorted(tmp_path.rglob("*"))
    refused(path, capsys, says)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_twice_and_an_encrypted_one_are_refused(exported, tmp_path, capsys):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zip_of(exported, tmp_path / "twice.zip", again=("torso/README.md", b"x"))
    refused(path, capsys, "'torso/README.md' does not belong there")
    payload = bytearray(zip_of(exported, tmp_path / "secret.zip").read_bytes())
    payload[payload.rindex(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    (tmp_path / "secret.zip").write_bytes(payload)
    refused(tmp_path / "secret.zip", capsys, "is encrypted")


def test_a_file_that_is_not_a_zip_is_refused(tmp_path, capsys):
    for payload in (b"", b"PK\x05\x06", b"x" * 100):
        (tmp_path / "torso.zip").write_bytes(payload)
        refused(tmp_path / "torso.zip", capsys, "not a readable zip")
