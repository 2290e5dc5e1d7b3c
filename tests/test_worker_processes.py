"""Local worker processes: how they start, die and end, and what they do during the search."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from maknet_jax.ct import search
from maknet_jax.ct.reading import STRICT
from maknet_jax.data import processes, series_search
from maknet_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Unit:
    number: int
    source: str = "a file"


def answer(unit):
    """(the number, the process and its parent); the process of a negative number dies."""
    if unit.number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit.number, os.getpid(), os.getppid()


def died(unit, how):
    return unit.number, how, None


@pytest.fixture(params=[True, False], ids=["forked", "started"])
def pool(request, monkeypatch):
    monkeypatch.setattr(processes, "FORK", request.param and processes.FORK)
    pool = processes.Processes(2, __name__)
    yield pool
    pool.close()


def run(pool, numbers):
    return list(pool.map(answer, [Unit(n) for n in numbers], alone=lambda unit: False, died=died))


def test_a_dead_worker_is_replaced_and_the_others_continue(pool):
    results = run(pool, [1, 2, -3, 4, 5, 6])
    assert [number for number, *_ in results] == [1, 2, -3, 4, 5, 6]
    assert results[2][1] == "signal 9"
    workers = {worker for number, worker, _ in results if number > 0}
    assert 2 <= len(workers) <= 3 and os.getpid() not in workers
    # Forked workers are children of the server, others of this process.
    parents = {parent for number, _, parent in results if number > 0}
    assert (parents == {os.getpid()}) == (pool._server is None)
    pool.close()
    for worker in workers | parents - {os.getpid()}:
        assert not os.path.exists(f"/proc/{worker}/cmdline")


def sleep(unit):
    """When the call ended, after as many seconds as the number of the unit."""
    time.sleep(unit.number)
    return time.monotonic()


def test_a_long_first_unit_does_not_keep_the_other_workers_waiting():
    pool = processes.Processes(2, __name__)
    units = [Unit(1), Unit(0), Unit(0)]
    long, _, last = pool.map(sleep, units, alone=lambda unit: False, died=died)
    pool.close()
    assert last < long


def test_workers_that_cannot_start_are_one_line(monkeypatch):
    for forked in (True, False):
        monkeypatch.setattr(processes, "FORK", forked and processes.FORK)
        pool = processes.Processes(1, "maknet_jax.nowhere")
        with pytest.raises(InputError, match="could not start .exit code 1.*--workers 1"):
            run(pool, [1])
        pool.close()


@pytest.mark.skipif(not processes.FORK, reason="workers are forked on Linux only")
def test_a_server_is_started_early_for_one_module_and_folder(tmp_path, monkeypatch):
    started = []
    server = processes._Server
    monkeypatch.setattr(
        processes, "_Server", lambda module: started.append(module) or server(module)
    )
    processes.start_early(__name__)
    pool = processes.Processes(1, __name__)
    assert started == [__name__] and run(pool, [1])[0][0] == 1
    pool.close()
    processes.start_early(__name__)
    monkeypatch.chdir(tmp_path)  # relative paths would be those of another folder
    processes.Processes(1, __name__).close()
    assert started == [__name__] * 3
    processes._close_early()


SCRIPT = """
import time
from maknet_jax.data import processes
from test_worker_processes import answer, Unit, died
pool = processes.Processes(2, "test_worker_processes")
for _, worker, server in pool.map(answer, [Unit(1), Unit(2)], alone=lambda unit: False, died=died):
    print(worker, server, flush=True)
print("done", flush=True)
time.sleep(60)
"""


def test_a_script_needs_no_guard_and_its_workers_end_with_it(tmp_path):
    """The workers do not import the script, ignore signals, and end when their parent dies."""
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline().split() for _ in range(3)]
    assert lines[2] == ["done"], process.communicate()
    others = {int(number) for line in lines[:2] for number in line}
    assert len(others) == 3
    for number in others:
        os.kill(number, signal.SIGTERM)
    time.sleep(0.2)
    assert all(map(running, others))
    process.kill()
    _, error = process.communicate(timeout=60)
    assert error == ""
    deadline = time.monotonic() + 30
    while any(running(number) for number in others):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_find_the_series_that_this_process_finds(shared_data, monkeypatch):
    """Whether they are ready at once, later, or never; two files are a chunk."""
    folder = shared_data / "dicom" / "transfer_syntaxes"
    expected = search.find_series(folder)
    assert expected[0] and expected[1]
    monkeypatch.setattr(series_search, "_CHUNK", 2)
    pool = processes.Processes(2, series_search.__name__)
    for refusals in (0, 3, 1000):
        answers = iter([False] * refusals + [True])
        monkeypatch.setattr(pool, "is_ready", answers.__next__)
        assert series_search.find_series(folder, pool, workers=2, overrides=STRICT) == expected
        assert (next(answers, None) is None) == (refusals < 1000)
    pool.close()


def test_small_jobs_are_those_that_take_less_time_than_starting_workers():
    def series(count, encoded):
        return search.SeriesRef("dicom", ("x",), "x", count, ".", encoded=encoded)

    assert series_search.is_small([series(100, False)] * 2)
    assert not series_search.is_small([series(100, False)] * 3)
    assert series_search.is_small([series(40, True)])
    assert not series_search.is_small([series(60, True)])
