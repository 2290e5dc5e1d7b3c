"""Workdirs in object stores: uploaded atomically, owned by one command, read from a copy."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest
import runs
import toy
import two_commands

from maknet_jax import cli, train
from maknet_jax.data import object_store
from maknet_jax.errors import InputError, Stopped
from maknet_jax.runs import ownership, remote, remote_owner

URL = "memory://bucket/run"
OWNER = f"/bucket/run/{ownership.FILE}"
FILES = ("state/d/0", "state/manifest.ocdbt", "content/metadata")

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


opened = functools.partial(remote.opened, command="maknet train")


def write(folder, name, text):
    """A stand-in for a checkpoint; `text` is in each of its files."""
    for file in FILES:
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} {file}")


def claim(folder, text="{}"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)


def content(folder):
    """{checkpoint: the text of its files}, which must all be there and have the same text."""
    found = {}
    for path in sorted(folder.glob("*/*/state")):
        texts = {(path.parent / file).read_text().split()[0] for file in FILES}
        assert len(texts) == 1
        found[path.parent.relative_to(folder).as_posix()] = texts.pop()
    return found


def start(url=URL):
    """A run with two checkpoints in the bucket."""
    with opened(url) as copy:
        claim(copy.folder)
        copy.upload()
        for step in (1, 2):
            write(copy.folder, f"checkpoints/{step}", f"s{step}")
            write(copy.folder, f"best/{step}", f"s{step}")
            shutil.rmtree(copy.folder / f"best/{step - 1}", ignore_errors=True)
            copy.upload()
    return {"best/2": "s2", "checkpoints/1": "s1", "checkpoints/2": "s2"}


def test_a_run_is_resumed_and_read_from_the_bucket_alone(store, cache):
    expected = start()
    assert OWNER not in store.store
    shutil.rmtree(cache)
    view = remote.view(URL)
    assert view.name == "run" and content(view) == expected
    with opened(URL) as copy:
        assert content(copy.folder) == expected and copy.folder != view
        write(copy.folder, "checkpoints/3", "s3")
        shutil.rmtree(copy.folder / "checkpoints/1")
    assert content(remote.view(URL)) == {
        "best/2": "s2",
        "checkpoints/2": "s2",
        "checkpoints/3": "s3",
    }
    assert not [path for path in store.store if "checkpoints/1/" in path]


def test_the_bucket_decides_and_only_what_differs_is_copied(store, monkeypatch):
    expected, copied = start(), []
    original = object_store.copy_object

    def copy_object(memory, source, target):
        copied.append(source)
        return original(memory, source, target)

    monkeypatch.setattr(object_store, "copy_object", copy_object)
    with opened(URL) as copy:
        assert copied == ["/bucket/run/config.json"]
    folder = copy.folder  # as a run leaves it that was killed before its upload
    write(folder, "checkpoints/3", "s3")
    write(folder, "checkpoints/2", "other")
    (folder / "summary.json").write_text("{}")
    with opened(URL) as copy:
        assert content(folder) == expected and not (folder / "summary.json").exists()
    store.store.clear()
    with opened(URL):
        assert not folder.exists()


class Killed(BaseException):
    """Ends an upload as kill -9 does."""


def test_a_kill_at_any_request_of_an_upload_leaves_the_old_or_the_new_checkpoints(
    store, cache, monkeypatch
):
    """Also where a checkpoint replaces another one of the same step."""
    new = {"checkpoints/2": "S2", "checkpoints/3": "s3"}
    seen, left, count = [], 1, 0
    while left:
        store.store.clear()
        old = start()
        remaining = [count]

        def killing(name, remaining=remaining):
            original = getattr(type(store), name)

            def call(self, *args, **options):
                if remaining[0] == 0:
                    raise Killed
                remaining[0] -= 1
                return original(self, *args, **options)

            return call

        with monkeypatch.context() as patch:
            with pytest.raises((Killed, Stopped)), opened(URL) as copy:
                write(copy.folder, "checkpoints/2", "S2")
                write(copy.folder, "checkpoints/3", "s3")
                for gone in ("checkpoints/1", "best/2"):
                    shutil.rmtree(copy.folder / gone)
                patch.setattr(remote, "_THREADS", 1)
                for name in ("put_file", "pipe_file", "rm"):
                    patch.setattr(type(store), name, killing(name))
                copy.upload()
                left = 0
                raise Killed
        seen.append(content(remote.view(URL)))
        count += 1
    assert seen[0] == old and seen[-1] == new and all(each in (old, new) for each in seen)
    assert len(seen) > 8
    with opened(URL):
        pass
    names = {path.split("/run/")[1] for path in store.store}
    folders = {entry["folder"] for entry in _manifest(store).values()}
    expected = {"config.json", "manifest.json"}
    assert names == expected | {f"{folder}/{file}" for folder in folders for file in FILES}


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_a_kill_while_a_run_is_claimed_leaves_a_whole_claim_or_none(store, monkeypatch, requests):
    done, original = [], type(store).pipe_file

    def pipe_file(self, path, value, **options):
        if not options:  # those of the owner's object
            if len(done) == requests:
                raise Killed
            done.append(path.rpartition("/")[2])
        return original(self, path, value, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed), opened(URL) as copy:
        claim(copy.folder)
        (copy.folder / "dataset.json").write_text("{}")
        patch.setattr(type(store), "pipe_file", pipe_file)
        copy.upload()
        raise Killed
    assert done == ["dataset.json", "config.json"][:requests]
    with opened(URL) as copy:
        names = sorted(path.name for path in copy.folder.glob("*.json"))
        assert names == (["config.json", "dataset.json"] if requests == 2 else [])


def _manifest(store):
    return json.loads(store.cat_file("/bucket/run/manifest.json"))["checkpoints"]


def test_a_damaged_checkpoint_is_skipped_and_the_previous_one_is_used(store, cache, capfd):
    start()
    for number, step in enumerate((2, 1)):
        shutil.rmtree(cache)
        path = f"/bucket/run/checkpoints/{step}/state/d/0"
        store.pipe_file(path, store.cat_file(path)[:-1] + b"?")
        if number == 0:
            assert content(remote.view(URL)) == {"best/2": "s2", "checkpoints/1": "s1"}
            assert "checkpoints/2: state/d/0 does not match" in capfd.readouterr().err
    with pytest.raises(InputError, match=f"no checkpoint in {URL} can be read"):
        remote.view(URL)


def manifest(name, folder, file, description):
    return json.dumps({"checkpoints": {name: {"folder": folder, "files": {file: description}}}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"checkpoints": {"checkpoints/1": {"files": {}}}}',
        manifest("checkpoints/1", "checkpoints/1", "a", ["1", "digest"]),
        # Paths that would be deleted or written outside of the copy or the workdir.
        manifest("checkpoints/../..", "checkpoints/../..", "a", [1, "digest"]),
        manifest("checkpoints/1", "", "a", [1, "digest"]),
        manifest("checkpoints/1", "checkpoints/1", "../../a", [1, "digest"]),
    ],
)
def test_a_damaged_manifest_is_one_line_and_changes_nothing(store, cache, text):
    expected = start()
    view = remote.view(URL)
    store.pipe_file("/bucket/run/manifest.json", text.encode())
    before = dict(store.store)
    for read in (remote.view, lambda url: opened(url).__enter__()):
        with pytest.raises(InputError, match="manifest.json is damaged"):
            read(URL)
    assert content(view) == expected and store.store.keys() == before.keys()


def test_other_objects_are_not_touched_and_only_runs_are_opened(store):
    store.pipe_file("/bucket/run/photo.jpg", b"x")
    with pytest.raises(InputError, match="something other than output of `maknet train`"):
        with opened(URL):
            pass
    for url in (URL, "memory://bucket/absent"):
        with pytest.raises(InputError, match=f"{url} does not exist, or is not a workdir"):
            remote.view(url)
    assert list(store.store) == ["/bucket/run/photo.jpg"]


def foreign(store, **changes):
    owner = {"host": "elsewhere", "pid": 7, "command": "maknet train", "token": "t", "beat": 0}
    store.pipe_file(OWNER, json.dumps(owner | changes).encode())


def test_an_owner_that_renews_is_waited_for_and_refused(store, monkeypatch):
    start()
    foreign(store)
    renewing = threading.Timer(0.2, foreign, [store], {"beat": 1})
    renewing.start()
    monkeypatch.setattr(remote_owner, "STALE", 5.0)
    with pytest.raises(InputError, match=f"{URL} is in use by .* process 7 on elsewhere"):
        with opened(URL):
            pass
    renewing.join()
    assert json.loads(store.cat_file(OWNER))["token"] == "t"


def test_the_place_of_a_dead_owner_is_taken(store, monkeypatch):
    start()
    foreign(store)
    monkeypatch.setattr(remote_owner, "STALE", 0.3)
    with opened(URL):
        pass
    monkeypatch.setattr(remote_owner, "STALE", 600.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    foreign(store, host=os.uname().nodename, pid=ended.pid)
    with opened(URL):  # without a wait
        pass


def test_a_command_whose_place_was_taken_writes_nothing_more(store):
    start()
    before = dict.fromkeys(store.store)
    with pytest.raises(InputError, match="in use by .* process 7 on elsewhere"):
        with opened(URL) as copy:
            foreign(store)
            write(copy.folder, "checkpoints/3", "s3")
    assert dict.fromkeys(store.store) == before | {OWNER: None}


def test_the_owner_renews_its_object(store, monkeypatch):
    monkeypatch.setattr(remote_owner, "BEAT", 0.02)
    with opened(URL) as copy:
        claim(copy.folder)
        deadline = time.monotonic() + 30
        while json.loads(store.cat_file(OWNER))["beat"] < 3:
            assert time.monotonic() < deadline


def arguments(data, url, domain=4):
    changes = toy.overrides(data, "linear", domain_components=domain)
    fields = [f"--config.{each}" for each in changes]
    return ["train", "--config", "linear", *fields, "--workdir", url]


@pytest.mark.slow
def test_training_in_a_bucket_equals_training_in_a_folder(
    bucket, data, tmp_path, cache, monkeypatch, capsys
):
    """With two signals, each resumed without the local copy; then read by the other commands."""
    url = "s3://bucket/runs/teacher"
    for count in (17, 5):
        with monkeypatch.context() as patch:
            runs.signal_after(patch, count)
            assert cli.main(arguments(data, url)) == 75
        assert f"is saved in {url}; run the same command" in capsys.readouterr().err
        shutil.rmtree(cache)
    assert cli.main(arguments(data, url)) == 0
    assert cli.main(arguments(data, str(tmp_path / "teacher"))) == 0
    shutil.rmtree(cache)
    view, config = remote.view(url), toy.config(data, "linear", {"domain_components": 4})
    runs.equal_runs(view, tmp_path / "teacher", config)
    assert (view / "domain.safetensors").read_bytes() == (
        tmp_path / "teacher" / "domain.safetensors"
    ).read_bytes()
    capsys.readouterr()
    evaluate = ["evaluate", "--split", "val", "--model"]
    assert cli.main([*evaluate, url, "--out", str(tmp_path / "remote")]) == 0
    assert cli.main([*evaluate, str(tmp_path / "teacher"), "--out", str(tmp_path / "local")]) == 0
    for name in ("val.json", "val_labels.csv", "thresholds.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert cli.main(["verify", url]) == 0
    capsys.readouterr()
    assert cli.main([*evaluate, url]) == 2  # without --out
    other = [
        each.replace("learning_rate=0.01", "learning_rate=0.02") for each in arguments(data, url)
    ]
    assert cli.main(other) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("maknet: ")]) == 2
    assert not bucket.exists(f"bucket/runs/teacher/{ownership.FILE}")


@pytest.mark.slow
def test_two_processes_train_in_a_bucket(bucket, data, cache):
    """The first one uploads, and each resumes from a copy of its own."""
    url = "s3://bucket/runs/teacher"
    with two_commands.start(*arguments(data, url)) as both:
        both.wait_for_batch()
        both.send(signal.SIGTERM, 1)
        assert both.codes(120)[0] == [75, 75], both.messages
    shutil.rmtree(cache)
    with two_commands.start(*arguments(data, url)) as both:
        assert both.codes(120)[0] == [0, 0], both.messages
        assert "resuming from step" in both.messages[0]
    assert (cache / "workdirs-1").is_dir()
    view = remote.view(url)
    assert json.loads((view / "summary.json").read_text())["steps"] == 40
    assert (view / "domain.safetensors").is_file() and (view / "checkpoints" / "40").is_dir()


def test_errors_of_the_object_store_are_one_line(bucket, data, monkeypatch, capsys):
    def fails(command, url):
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"maknet: {url}")

    for url in ("s3://absent/run", "s3://bucket/absent"):
        fails(["verify", url], url)
    fails(arguments(data, "s3://absent/run"), "s3://absent/run")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(type(bucket), "retries", 1)
    bucket.clear_instance_cache()
    fails(arguments(data, "s3://bucket/run"), "s3://bucket/run")


def test_a_failed_upload_stops_the_training_and_it_resumes(bucket, data, monkeypatch, capsys):
    url = "s3://bucket/runs/teacher"
    original, calls = remote.Copy._upload_checkpoint, []

    def fail(self, name):
        calls.append(name)
        if name == "checkpoints/15":
            raise ConnectionError("the network is gone")
        return original(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(remote.Copy, "_upload_checkpoint", fail)
        assert cli.main(arguments(data, url, domain=0)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"maknet: {url}: the network is gone"
    assert train.train(toy.config(data, "linear"), url)["steps"] == 40
    assert "resuming from step 8 of 40" in capsys.readouterr().err
    assert not pathlib.Path("s3:").exists()
