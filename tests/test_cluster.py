"""The workers of a Dask cluster: the same bytes as local processes, also when workers die."""

import dataclasses
import os
import pathlib
import signal
import sys
import time

import distributed
import pytest
from test_prepare_dicom import outputs
from test_shards import SPLITS, VOCABULARY, Unit, content, make

from maknet_jax import cli, predict
from maknet_jax.data import cluster, shards, triplets
from maknet_jax.errors import InputError


@pytest.fixture(scope="module")
def local_cluster():
    """A Dask cluster of two processes of one thread each, which gives up after two deaths."""
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=":0",
        silence_logs=False,
    ) as running:
        running.scheduler.allowed_failures = 1
        yield running


@pytest.fixture
def address(local_cluster):
    """The address of the scheduler, with two workers."""
    with distributed.Client(local_cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    return local_cluster.scheduler_address


def write(out, make=make, splits=SPLITS, scheduler=None):
    info, failures = shards.write_shards(
        out,
        splits,
        make,
        kind="test",
        size=8,
        vocabulary=VOCABULARY,
        about={},
        workers=1,
        advance=lambda count: None,
        scheduler=scheduler,
    )
    shards.finish(out, info)
    return failures


def test_a_cluster_writes_the_bytes_of_one_process(address, tmp_path):
    failures = write(tmp_path / "one")
    assert write(tmp_path / "cluster", scheduler=address) == failures
    assert content(tmp_path / "cluster") == content(tmp_path / "one")


@dataclasses.dataclass(frozen=True)
class MarkedUnit(Unit):
    marker: str = ""


def kill_once(unit):
    """`make` whose process dies with unit 5 if its marker does not exist."""
    if unit.number == 5 and not os.path.exists(unit.marker):
        pathlib.Path(unit.marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make(unit)


def kill(unit):
    """`make` whose process always dies with unit 5."""
    if unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(unit)


def test_a_worker_killed_in_the_middle_changes_nothing(address, tmp_path):
    marker = tmp_path / "marker"
    splits = {"train": [MarkedUnit(n, marker=str(marker)) for n in range(1, 11)]}
    write(tmp_path / "one", splits=splits)
    write(tmp_path / "cluster", kill_once, splits, address)
    assert marker.exists()
    assert content(tmp_path / "cluster") == content(tmp_path / "one")


def test_a_unit_that_kills_its_workers_is_named_and_then_rejected(address, tmp_path):
    out, splits = tmp_path / "out", {"train": [Unit(n) for n in range(1, 7)]}
    with pytest.raises(InputError, match=r"killed \(2 times\) while it read unit 5,"):
        write(out, kill, splits, address)
    failures = write(out, kill, splits, address)
    assert [name for name, _ in failures] == ["unit 5"]
    assert not (out / ".parts").exists()


def fail(unit):
    raise ArithmeticError(f"unit {unit.number}")


def test_an_exception_on_a_worker_is_raised_here(address, tmp_path):
    with pytest.raises(ArithmeticError, match="unit 1"):
        write(tmp_path / "out", fail, scheduler=address)


def test_workers_must_have_the_same_versions_and_see_the_same_files(address, tmp_path, monkeypatch):
    versions = cluster.versions()
    assert cluster._checked_call(len, "ab", versions, str(tmp_path)) == (2, None)
    with pytest.raises(InputError, match=r"does not see .*absent"):
        cluster._checked_call(len, "ab", versions, str(tmp_path / "absent"))
    monkeypatch.setattr(cluster, "versions", lambda: versions | {"pydicom": "2.0"})
    with pytest.raises(InputError, match=rf"has pydicom {versions['pydicom']}, this command 2\.0"):
        write(tmp_path / "out", scheduler=address)


def test_an_unusable_scheduler_is_one_line_within_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_PATIENCE", 1)
    started = time.monotonic()
    arguments = ["prepare", "dicom", str(tmp_path), "--out", str(tmp_path / "out"), "--scheduler"]
    for address in ("tcp://127.0.0.1:1", "ftp://host"):
        assert cli.main([*arguments, address]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as empty,
        pytest.raises(InputError, match="has no workers"),
    ):
        cluster.check(empty.scheduler_address)
    assert time.monotonic() - started < 60
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main([*arguments, "tcp://127.0.0.1:1"]) == 2
    assert "maknet-jax[dask]" in capsys.readouterr().err


def test_prepare_dicom_on_a_cluster_gives_the_same_files(phantom, address, tmp_path, monkeypatch):
    monkeypatch.setattr(triplets, "PIECE", 2)
    for out, more in (("one", ["--workers", "1"]), ("cluster", ["--scheduler", address])):
        arguments = ["--min-slices", "3", "--size", "32", "--salt-file", tmp_path / "salt", *more]
        command = ["prepare", "dicom", phantom["dicom"], "--out", tmp_path / out, *arguments]
        assert cli.main(list(map(str, command))) == 0
    assert outputs(tmp_path / "cluster") == outputs(tmp_path / "one")


@pytest.mark.slow
def test_predict_on_a_cluster_gives_the_same_files(phantom, trained, address, tmp_path):
    options = {"as_json": True, "wide": True, "audit": True, "charts": True}
    for name, scheduler in (("one", None), ("cluster", address)):
        predict.predict(
            trained,
            phantom["dicom"],
            tmp_path / name / "labels.csv",
            features=tmp_path / name / "features.npz",
            scheduler=scheduler,
            **options,
        )
    expected = outputs(tmp_path / "one", "labels.summary.json", "labels.log.jsonl")
    assert len(expected) > 6
    assert outputs(tmp_path / "cluster", "labels.summary.json", "labels.log.jsonl") == expected
