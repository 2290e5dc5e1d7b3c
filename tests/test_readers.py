"""Open shards: few file handles, and errors of the system that are not called damage."""

import contextlib
import errno
import os
import pickle
import re
import resource
import threading

import numpy as np
import organ_cases
import pytest
import test_records

from maknet_jax import cli
from maknet_jax.ct import nifti
from maknet_jax.data import readers, records
from maknet_jax.errors import InputError, Rejected

SHARDS = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return records.open_dataset(test_records.write_set(folder, counts=(2,) * SHARDS))


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """An empty pool for each test."""
    monkeypatch.setattr(readers, "POOL", readers.Readers())
    return readers.POOL


def handles():
    return len(os.listdir("/proc/self/fd")) - 1  # without that of the listing


@contextlib.contextmanager
def at_most(count):
    """Leaves `count` file handles free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard)
    )
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        while len(taken) < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 2, hard))
            taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in taken:
            os.close(handle)


def test_few_handles_read_many_shards_in_any_order(dataset, pool, monkeypatch):
    monkeypatch.setattr(readers.Readers, "limit", staticmethod(lambda: 8))
    source = dataset.source("train")
    pool.close()
    before = handles()
    for number in np.random.default_rng(0).permutation(len(source)):
        assert source[number].id == f"slice ü {number}"
        assert handles() <= before + 8
    assert len(pool) == 8 and handles() == before + 8


def test_the_shard_not_read_for_longest_is_closed(dataset, pool, monkeypatch):
    monkeypatch.setattr(readers.Readers, "limit", staticmethod(lambda: 2))
    source = dataset.source("train")
    pool.close()
    for number in (0, 2, 1, 4):  # shards 0, 1, 0, 2
        assert source[number].id == f"slice ü {number}"
    names = [os.path.basename(path) for path in pool._open]
    assert names == ["part-00000.array_record", "part-00002.array_record"]


def test_the_length_of_a_source_is_the_sum_of_its_shards(dataset):
    source = dataset.source("train")
    assert len(source) == 2 * SHARDS and len(pickle.loads(pickle.dumps(source))) == 2 * SHARDS
    paths = [dataset.path / shard["file"] for shard in dataset.split("train")["shards"]]
    assert len(records.RecordSource(paths)) == 2 * SHARDS  # counts from the files


def test_a_low_limit_of_handles_suffices(dataset, pool):
    source = dataset.source("train")
    pool.close()
    with at_most(6):  # half of the limit is more than is free: handles run out, and are given back
        ids = [source[number].id for number in range(len(source))]
    assert ids == [f"slice ü {number}" for number in range(len(source))]


def test_threads_share_the_pool(dataset, monkeypatch):
    monkeypatch.setattr(readers.Readers, "limit", staticmethod(lambda: 3))
    source, wrong = dataset.source("train"), []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, len(source), 200):
            if source[number].id != f"slice ü {number}":
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_free_handle_is_not_called_damage(dataset, pool):
    source = dataset.source("train")
    pool.close()
    with at_most(0), pytest.raises(OSError) as caught:
        source[0]
    assert caught.value.errno == errno.EMFILE
    assert caught.value.filename.endswith("part-00000.array_record")
    assert source[0].id == "slice ü 0"  # usable again


class Failing:
    """Stands for an open shard."""

    def __init__(self, text, times):
        self.text, self.times = text, times

    def __call__(self, path, **_):
        self.path = path
        return self

    def read(self, _):
        if self.times:
            self.times -= 1
            raise RuntimeError(f"{self.text}; reading {self.path}; at byte 0")
        return [records.encode(test_records.make_example())]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOENT])
def test_errors_of_the_system_keep_their_number(dataset, monkeypatch, code):
    source = dataset.source("train")
    readers.POOL.close()
    failing = Failing(f"read() failed: {os.strerror(code)}", times=9)
    monkeypatch.setattr(readers.array_record_module, "ArrayRecordReader", failing)
    with pytest.raises(OSError) as caught:
        source[0]
    assert caught.value.errno == code and failing.times == 7
    failing.times = 1  # passes: it is tried twice
    assert source[0].id == "slice ü 0"


def test_no_input_is_rejected_for_lack_of_file_handles(tmp_path):
    path = tmp_path / "ct.nii.gz"
    organ_cases.write_nifti(path, organ_cases.ct())
    nifti.read_nifti(path)
    with at_most(0), pytest.raises(OSError) as caught:
        nifti.read_nifti(path)
    assert caught.value.errno == errno.EMFILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Rejected):
        nifti.read_nifti(path)


def test_damage_is_damage(dataset, monkeypatch):
    source = dataset.source("train")
    readers.POOL.close()
    failing = Failing("Corrupted Riegeli/records file: chunk header hash mismatch", times=1)
    monkeypatch.setattr(readers.array_record_module, "ArrayRecordReader", failing)
    with pytest.raises(InputError, match=re.escape("part-00000.array_record: Corrupted")):
        source[0]
    assert source[0].id == "slice ü 0"  # opened again after it was repaired


def test_the_command_line_raises_the_soft_limit(capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert cli.main(["predict", "nowhere", "--model", "nowhere", "--out", "x.csv"]) == 2
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65_536), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
