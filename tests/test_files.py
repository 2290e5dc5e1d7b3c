"""Files are written atomically."""

import json
import os
import stat

import pytest

from maknet_jax import files


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_text_and_bytes_are_written_and_the_folder_created(tmp_path):
    with files.write_whole(tmp_path / "a" / "b.txt") as file:
        file.write("Grüße\n")
    with files.write_whole(tmp_path / "a" / "b.bin", "wb") as file:
        file.write(b"\0\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "Grüße\n".encode()
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\0\n"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.bin", "b.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path, error):
    path = tmp_path / "old.txt"
    path.write_text("old")
    with pytest.raises(error), files.write_whole(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.txt"]


def test_the_old_content_stays_until_the_block_ends(tmp_path):
    path = tmp_path / "old.txt"
    path.write_text("old")
    with files.write_whole(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_permissions_obey_the_umask(tmp_path, umask):
    with files.write_whole(tmp_path / "open") as file:
        file.write("x")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o666 & ~umask


def test_only_the_owner_can_read_a_private_file(tmp_path, umask):
    with files.write_whole(tmp_path / "secret", private=True) as file:
        file.write("x")
        (temporary,) = tmp_path.iterdir()
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_json_round_trips_and_nan_is_rejected(tmp_path):
    value = {"a": [1, 2.5, None, "Ö"], "b": {}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    assert json.loads((tmp_path / "x.json").read_text()) == value
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "x.json") == value


def test_leftovers_of_a_killed_writer_are_not_foreign_files(tmp_path):
    assert not files.has_foreign_files(tmp_path / "new") and not files.has_foreign_files(tmp_path)
    (tmp_path / ".claim.json.k3b1.tmp").write_text("ha")
    (tmp_path / "own.json").write_text("{}")
    assert not files.has_foreign_files(tmp_path, "own.json")
    assert files.has_foreign_files(tmp_path) and files.has_foreign_files(tmp_path / "own.json")
    for name in ("x.tmp", ".hidden", "other.json"):
        (tmp_path / name).write_text("mine")
        assert files.has_foreign_files(tmp_path, "own.json"), name
        (tmp_path / name).unlink()
