"""What one process concludes from the entries of the others, without JAX's store."""

import json
import time

import pytest

from maknet_jax.runs import peers

OTHER = {"host": "b", "pid": 7, "beat": 1}


class Store:
    """JAX's key-value store of one process."""

    def __init__(self, entries):
        self.entries = {f"maknet/processes/{number}": json.dumps(e) for number, e in entries}

    def key_value_set(self, key, value, allow_overwrite):
        self.entries[key] = value

    def key_value_dir_get(self, prefix):
        return list(self.entries.items())


@pytest.fixture
def watched(monkeypatch):
    """watched(entry of the other, number, heartbeat) -> `Peers` with one other process."""
    monkeypatch.setattr(peers.Peers, "_judge", lambda self: None)
    monkeypatch.setattr(peers.signal, "set_wakeup_fd", lambda *_, **__: -1)

    def watch(entry, number=1, heartbeat=60.0):
        watching = peers.Peers(heartbeat)
        store = Store([(number, entry)])
        watching.watch(store, 1 - number, 2)
        ends = time.monotonic() + 5
        while watching._others[number].entry != entry and time.monotonic() < ends:
            time.sleep(0.01)
        return watching, store

    return watch


@pytest.mark.parametrize(
    "entry, code, text",
    [
        ({}, None, ""),
        ({"code": 0, "message": ""}, None, ""),
        ({"code": 3, "message": ""}, None, ""),
        ({"code": 75, "message": "SIGTERM"}, 75, "process 1 (pid 7 on b) was stopped: SIGTERM"),
        ({"code": 2, "message": "x: full"}, 2, "process 1 (pid 7 on b) failed: x: full"),
        ({"code": 1, "message": "bug"}, 2, "process 1 (pid 7 on b) failed: bug"),
    ],
)
def test_the_verdict_follows_from_how_the_other_ended(watched, entry, code, text):
    verdict = watched(OTHER | entry)[0]._find_verdict()
    assert verdict == (None if code is None else (code, text))


@pytest.mark.parametrize("number", [0, 1])
def test_a_silent_process_is_lost_unless_it_is_done(watched, number):
    watching, store = watched(OTHER, number, heartbeat=0.3)
    if number == 0:
        assert watching._find_verdict() is None  # the store answers
        watching.report_first_gone()
    else:
        time.sleep(0.4)
    code, text = watching._find_verdict()
    assert code == 75 and f"process {number} (pid 7 on b) died" in text
    store.entries[f"maknet/processes/{number}"] = json.dumps(OTHER | {"code": 0})
    time.sleep(0.3)
    assert watching._find_verdict() is None


@pytest.mark.parametrize(
    "verdict, code, unexpected, expected",
    [
        (None, 2, False, (2, "mine")),
        ((75, "lost"), 2, True, (75, "lost")),  # a broken connection is explained by the verdict
        ((75, "lost"), 2, False, (2, "mine")),  # bad input of its own is not
        ((2, "failed"), 75, False, (2, "failed")),
        ((75, "stopped"), 75, False, (75, "mine")),
    ],
)
def test_the_own_end_and_the_verdict_give_one_code(watched, verdict, code, unexpected, expected):
    watching, store = watched(OTHER | {"code": 0})
    watching.verdict = verdict
    assert watching.conclude(code, "mine", unexpected=unexpected) == expected
    entry = json.loads(store.entries["maknet/processes/0"])
    assert (entry["code"], entry["message"]) == expected
