"""Signals interrupt a command once, or are noted; time limits act like signals."""

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from maknet_jax import console
from maknet_jax.cli import exit_codes, options
from maknet_jax.errors import STOP_SIGNALS, InputError, Stopped
from maknet_jax.runs import stopping


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def default_hangup():
    """The tests themselves may run under `nohup`, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_raises_and_the_handlers_are_handed_back(number):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with pytest.raises(Stopped, match=signal.Signals(number).name), stopping.raising_signals():
        send(number)
        raise AssertionError("not stopped")
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_second_signal_does_not_interrupt_the_clean_up():
    done = []
    with pytest.raises(Stopped, match="SIGUSR1"), stopping.raising_signals():
        try:
            send(signal.SIGUSR1)
        finally:
            try:
                send(signal.SIGTERM)
                raise KeyError
            except KeyError:
                send(signal.SIGINT)
            done.append(True)
    assert done


def test_a_signal_after_a_lost_one_raises_again():
    with pytest.raises(Stopped), stopping.raising_signals():
        try:
            send()
        except BaseException:
            pass
        send()
        raise AssertionError("not stopped")


def test_a_signal_during_the_import_of_compiled_code_stops_the_command(capsys):
    def load():  # as `import numpy` does: C code raises an ImportError in place of any exception
        try:
            send()
        except BaseException as error:
            raise ImportError("numpy._core.multiarray failed to import") from error

    assert exit_codes.exit_code("maknet", load) == 75
    assert capsys.readouterr().err == "maknet: stopped: SIGTERM; run the same command to resume\n"


def test_a_signal_during_an_import_waits_for_its_end(tmp_path, monkeypatch):
    code = (
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.2)\nend = 1\n"
    )
    (tmp_path / "signalled.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = []

    def work():
        loaded.append(importlib.import_module("signalled").end)
        time.sleep(5)

    with pytest.raises(Stopped, match="SIGTERM"), stopping.raising_signals():
        work()
    assert loaded == [1]


def test_an_error_of_the_clean_up_after_a_signal_is_reported(capsys):
    def work():
        try:
            send()
        finally:
            raise OSError(errno.ENOSPC, "No space left on device", "x")

    assert exit_codes.exit_code("maknet", work) == 2
    assert "x: No space left" in capsys.readouterr().err


def test_signals_stay_ignored_after_the_end_of_a_process():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert exit_codes.exit_code("maknet", send, final=True) == 75
        assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.raising_signals(), stopping.noted_signals() as caught:
            send(signal.SIGHUP)
        assert not caught
    finally:
        signal.signal(signal.SIGHUP, before)


def test_noted_signals_are_raised_for_the_caller_at_the_end(monkeypatch):
    said = []
    monkeypatch.setattr(console, "say_from_signal", said.append)
    with pytest.raises(Stopped, match="SIGUSR2"), stopping.raising_signals():
        assert not stopping.is_noting()
        with stopping.noted_signals() as caught:
            assert stopping.is_noting()
            send(signal.SIGUSR2)
            send(signal.SIGUSR2)
            assert caught == [signal.SIGUSR2] * 2
    assert len(said) == 1 and not stopping.is_noting()


def test_a_time_limit_stops_like_a_signal(capsys):
    assert exit_codes.exit_code("maknet", lambda: time.sleep(5), seconds=0.05) == 75
    assert "the time limit of 0.05 s has passed" in capsys.readouterr().err
    assert exit_codes.exit_code("maknet", lambda: None, seconds=0.05) == 0
    time.sleep(0.1)  # the timer of a command that has ended does nothing
    stopping.request("too late")


@pytest.mark.parametrize(
    "text, seconds",
    [("11h50m", 42_600), ("90s", 90), ("2d", 172_800), ("1d1h1m1.5s", 90_061.5), ("5m", 300)],
)
def test_durations(text, seconds):
    assert options.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "12", "h", "1m2h", "-5m", "1e9d", "99999999999d"])
def test_other_texts_are_not_durations(text):
    with pytest.raises(argparse.ArgumentTypeError, match="11h50m"):
        options.duration(text)


def test_a_request_after_the_command_reaches_no_other_handler():
    """Such as that of `maknet_jax.__main__`, which would hide the error that is being reported."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with pytest.raises(InputError), stopping.raising_signals():
            raise InputError("a full disk")
        stopping.request("another process failed")
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == []


EARLY = """
import os, signal, sys
from maknet_jax import __main__
class Finder:
    def find_spec(self, name, *_):
        if name == "maknet_jax.cli":
            os.kill(os.getpid(), signal.{})
sys.meta_path.insert(0, Finder())
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_before_the_command_line_is_read_stops_the_command(name):
    script = [sys.executable, "-c", EARLY.format(name), "--version"]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (75, "")
    assert ended.stderr == f"maknet: stopped: {name}; run the same command to resume\n"
