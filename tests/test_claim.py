"""Claiming a folder: the same record resumes, anything else is refused and left unchanged."""

import pytest

from maknet_jax import files
from maknet_jax.errors import InputError
from maknet_jax.runs import claim as claims
from maknet_jax.runs import ownership
from maknet_jax.training import sharding

OPTIONS = {"command": "maknet test", "option": "--out"}
RECORDS = {"part.json": {"path": "a", "digest": "12"}, "claim.json": {"seed": 0, "data": {"n": 4}}}


def claim(folder, records, **rule):
    """Claims a folder for a run that ends at once."""
    with claims.claim(folder, records, **rule):
        assert (folder / ownership.FILE).exists()
    assert not (folder / ownership.FILE).exists()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    claim(tmp_path / "out", RECORDS, **OPTIONS)
    return tmp_path / "out"


def test_the_records_are_written_and_claimed_again(folder):
    assert {path.name: files.read_json(path) for path in folder.iterdir()} == RECORDS
    (folder / "result.npy").write_text("done")
    claim(folder, RECORDS, **OPTIONS)
    assert len(content(folder)) == 3


@pytest.mark.parametrize(
    "name, record, key, old, new",
    [
        ("claim.json", {"seed": 0, "data": {"n": 5}}, "data.n", 4, 5),
        ("claim.json", {"data": {"n": 4}}, "seed", 0, None),
        ("claim.json", {"seed": 0, "data": {"n": 4}, "more": True}, "more", None, True),
        ("part.json", {"path": "a", "digest": "34"}, "part.digest", "12", "34"),
    ],
)
def test_another_record_is_refused_by_key_and_values(folder, name, record, key, old, new):
    before = content(folder)
    with pytest.raises(InputError) as error:
        claim(folder, RECORDS | {name: record}, **OPTIONS)
    assert f" with {key} {old}, not {new}: " in str(error.value)
    assert str(folder) in str(error.value) and "--out" in str(error.value)
    assert content(folder) == before


def test_some_keys_may_change(folder):
    changed = {"part.json": {"path": "b", "digest": "12"}, "claim.json": {"seed": 1, "data": {}}}
    may_change = {"part.path", "seed", "data.n", "data"}
    claim(folder, changed, may_change=may_change, **OPTIONS)
    assert {path.name: files.read_json(path) for path in folder.iterdir()} == changed


def test_a_record_of_an_earlier_version_is_upgraded(folder):
    new = RECORDS | {"claim.json": RECORDS["claim.json"] | {"added": 0.5}}
    with pytest.raises(InputError, match="added None, not 0.5"):
        claim(folder, new, **OPTIONS)

    def upgrade(name, stored):
        return stored | {"added": 0.5} if name == "claim.json" else stored

    claim(folder, new, upgrade=upgrade, **OPTIONS)


def test_leftovers_of_a_killed_process_are_tolerated_and_other_files_are_not(tmp_path):
    (tmp_path / ".claim.json.k3b1.tmp").write_text("{")
    files.write_json(tmp_path / "part.json", {"digest": "of another run"})
    claim(tmp_path, RECORDS, **OPTIONS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for occupied in ("other", "other/thesis.txt"):
        with pytest.raises(InputError, match=f"{occupied} holds something other .*--out"):
            claim(tmp_path / occupied, RECORDS, **OPTIONS)
    assert content(tmp_path / "other") == {"thesis.txt": b"mine"}


def test_the_first_process_writes_after_all_have_checked(tmp_path, monkeypatch):
    checked, out = [], tmp_path / "out"

    def exchange(value):
        checked.append((out / "claim.json").exists())
        return [value]

    monkeypatch.setattr(sharding, "exchange", exchange)
    monkeypatch.setattr(sharding, "wait_for_all", exchange)
    claim(out, RECORDS, **OPTIONS)
    assert checked == [False, False, False, True]


def test_only_the_first_process_writes_and_all_must_see_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr(claims, "_PATIENCE", 0.1)
    answers = [[["", "token"], ["", None]], [["a", True], ["b", False]]]
    monkeypatch.setattr(sharding, "exchange", lambda value: answers.pop(0))
    with pytest.raises(InputError, match="process 1 on b does not see .*shared folder"):
        claim(tmp_path / "out", RECORDS, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_problem_of_one_process_is_that_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "exchange", lambda value: [value, ["out holds x", None]])
    with pytest.raises(InputError, match="^out holds x$"):
        claim(tmp_path / "out", RECORDS, **OPTIONS)
    assert not (tmp_path / "out" / "claim.json").exists()
