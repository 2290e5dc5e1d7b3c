"""Two commands do not write one folder; the folder of a dead one is taken over."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from maknet_jax import cli
from maknet_jax.errors import InputError
from maknet_jax.runs import ownership

HOLD = """
import pathlib, sys, time
from maknet_jax.runs import ownership
with ownership.owned(pathlib.Path(sys.argv[1]), "maknet train", "--workdir"):
    print("owned", flush=True)
    time.sleep(60)
"""


def owned(folder):
    return ownership.owned(folder, "maknet test", "--out")


def foreign(folder, monkeypatch, stale):
    """The file of an owner on another host, which counts as alive for `stale` seconds."""
    monkeypatch.setattr(ownership, "STALE", stale)
    owner = {"host": "elsewhere", "pid": 7, "command": "maknet train"}
    (folder / ownership.FILE).write_text(json.dumps(owner))


def test_a_second_owner_is_refused_in_one_line_and_the_first_stays(tmp_path):
    with owned(tmp_path) as token:
        for _ in range(2):
            with pytest.raises(InputError) as error, owned(tmp_path):
                pass
            assert f"{tmp_path} is in use by `maknet test`, process {os.getpid()} on " in str(
                error.value
            )
            assert "--out" in str(error.value) and "--distributed" in str(error.value)
        assert ownership.read_token(tmp_path) == token
    assert not list(tmp_path.iterdir())
    with owned(tmp_path) as another:
        assert another != token


def test_another_process_owns_the_folder_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with contextlib.ExitStack() as stack:
        owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.callback(owner.wait)
        stack.callback(owner.kill)
        assert owner.stdout.readline() == "owned\n"
        with pytest.raises(InputError, match=f"`maknet train`, process {owner.pid} "):
            stack.enter_context(owned(tmp_path))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert (tmp_path / ownership.FILE).exists()
        stack.enter_context(owned(tmp_path))
        owner.stdout.close()


def test_an_owner_on_another_host_is_alive_while_it_renews(tmp_path, monkeypatch):
    foreign(tmp_path, monkeypatch, 5.0)
    renewing = threading.Timer(0.3, os.utime, [tmp_path / ownership.FILE])
    renewing.start()
    with pytest.raises(InputError, match="process 7 on elsewhere"), owned(tmp_path):
        pass
    renewing.join()
    assert (tmp_path / ownership.FILE).exists()


def test_a_dead_owner_on_another_host_is_succeeded(tmp_path, monkeypatch, capfd):
    foreign(tmp_path, monkeypatch, 0.5)
    with owned(tmp_path) as token:
        assert ownership.read_token(tmp_path) == token
    assert "elsewhere" in capfd.readouterr().err
    foreign(tmp_path, monkeypatch, 60.0)
    os.utime(tmp_path / ownership.FILE, (time.time() - 61,) * 2)
    with owned(tmp_path):  # without a wait
        assert capfd.readouterr().err == ""


def test_the_time_stamp_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    with owned(tmp_path):
        before = (tmp_path / ownership.FILE).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / ownership.FILE).stat().st_mtime_ns > before


def test_a_file_and_its_folder_are_owned_separately(tmp_path):
    def output(name):
        return ownership.owned(tmp_path / "new", "maknet test", "--out", file=name)

    with output("a.csv"), output("b.csv"), owned(tmp_path / "new"):
        with pytest.raises(InputError, match="a.csv is in use"), output("a.csv"):
            pass
    assert not (tmp_path / "new").exists()  # nothing was written into it


@pytest.mark.parametrize("verb", ["evaluate", "report", "export", "predict"])
def test_two_commands_do_not_write_one_output(trained, phantom, tmp_path, capsys, verb):
    out = tmp_path / ("out.csv" if verb == "predict" else "out")
    arguments = {
        "evaluate": ["--model", str(trained), "--split", "val", "--out", str(out)],
        "report": [str(trained), "--out", str(out)],
        "export": [str(trained), "--out", str(out)],
        "predict": [str(phantom["dicom"]), "--model", str(trained), "--out", str(out)],
    }[verb]
    place = (tmp_path, out.name) if verb in ("export", "predict") else (out, None)
    with ownership.owned(place[0], "maknet test", "--out", file=place[1]):
        assert cli.main([verb, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"maknet: {out} is in use by `maknet test`, process {os.getpid()}")
    assert not list(tmp_path.iterdir())
