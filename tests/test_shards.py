"""Writing a data set: equal bytes from any number of workers, resumable, atomic."""

import dataclasses
import json
import os
import re
import signal
import time

import numpy as np
import pytest

from maknet_jax.data import labels, records, shards, unit_results
from maknet_jax.errors import InputError

VOCABULARY = labels.Vocabulary.from_names(["even", "any"])


@dataclasses.dataclass(frozen=True)
class Unit:
    number: int
    count: int = 2

    @property
    def source(self):
        return f"unit {self.number}"


def make(unit):
    """`count` records of a unit; multiples of 7 fail."""
    if unit.number % 7 == 0:
        return unit_results.UnitResult(failures=((f"unit {unit.number}", "a multiple of 7"),))
    examples = []
    for k in range(unit.count):
        rng = np.random.default_rng([unit.number, k])
        image = rng.integers(-1024, 3000, (8, 8, 3)).astype(np.int16)
        vector = np.array([unit.number % 2 == 0, 1], np.uint8)
        mask = np.array([unit.number % 3 == 0, 1], np.uint8)
        example = records.Example(f"{unit.number}-{k}", image, vector, mask, {})
        examples.append((records.encode(example), vector, mask))
    return unit_results.UnitResult(tuple(examples), counters={"seen": 1})


class Stopping:
    """`make` that raises at its `limit`-th call."""

    def __init__(self, limit):
        self.limit = limit
        self.numbers = []

    def __call__(self, unit):
        if len(self.numbers) == self.limit:
            raise KeyboardInterrupt
        self.numbers.append(unit.number)
        return make(unit)


SPLITS = {
    "train": [Unit(n) for n in range(1, 17)],
    "val": [Unit(n, count=3) for n in range(20, 24)],
    "none": [],
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_RECORDS", 6)


def write(out, make=make, splits=SPLITS, workers=1, size=8, finish=True, division=None):
    advanced = []
    info, failures = shards.write_shards(
        out,
        splits,
        make,
        kind="test",
        size=size,
        vocabulary=VOCABULARY,
        about={"why": "test"},
        workers=workers,
        advance=advanced.append,
        division=division,
    )
    assert sum(advanced) == sum(map(len, splits.values()))
    if finish:
        shards.finish(out, info)
    return info, failures


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of an uninterrupted run with one worker: (folder, info)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_RECORDS", 6)
        return out, write(out)[0]


def test_all_records_are_written_in_order_and_counted(whole):
    out, info = whole
    dataset = records.open_dataset(out)
    for split, units in SPLITS.items():
        source = dataset.source(split)
        expected = [f"{u.number}-{k}" for u in units if u.number % 7 for k in range(u.count)]
        assert [source[k].id for k in range(len(source))] == expected
        entry = dataset.split(split)
        assert entry["count"] == len(expected)
        masks = [source[k].label_mask for k in range(len(source))]
        assert entry["known_counts"] == np.sum([[0, 0], *masks], axis=0).tolist()
        assert dataset.known_counts(split).tolist() == entry["known_counts"]
        # What is unknown is not counted.
        vectors = [source[k].labels & source[k].label_mask for k in range(len(source))]
        assert entry["label_counts"] == np.sum([[0, 0], *vectors], axis=0).tolist()
        assert all(shard["count"] <= 6 for shard in entry["shards"])
    assert dataset.vocabulary == VOCABULARY and dataset.size == 8
    assert info["counters"] == {"seen": 17} and info["about"] == {"why": "test"}
    assert not list(out.rglob(".*")), "temporary files are left"


def test_a_rejected_unit_leaves_nothing_of_its_pieces_in_its_shard(tmp_path):
    """Neither records nor counts, in the middle of a shard, at its end, or as all of it."""

    def join(unit, results, count):
        assert count == 2 and [result.examples for result in results] == [(), (), ()]
        return unit_results.UnitResult(failures=((unit.source, "rejected as a whole"),))

    def pieces(unit):
        # The second piece is a multiple of 7 and gives no record.
        return [Unit(1, 1), Unit(7, 1), Unit(2, 1)] if unit.number in (30, 31, 32) else [unit]

    kept = [Unit(1, 1), Unit(2, 1), Unit(3, 2), Unit(4, 2)]
    longer = [kept[0], Unit(30, 1), kept[1], Unit(31, 1), *kept[2:], Unit(32, 6)]
    division = unit_results.Division(pieces, join)
    info, failures = write(tmp_path / "long", splits={"train": longer}, division=division)
    assert [name for name, _ in failures] == ["unit 30", "unit 31", "unit 32"]
    dataset = records.open_dataset(tmp_path / "long")
    source = dataset.source("train")
    expected = [f"{unit.number}-{k}" for unit in kept for k in range(unit.count)]
    assert [source[k].id for k in range(len(source))] == expected
    other, _ = write(tmp_path / "short", splits={"train": kept})
    for name in ("count", "label_counts", "known_counts"):
        assert info["splits"]["train"][name] == other["splits"]["train"][name]
    assert info["counters"] == other["counters"]


def test_failures_are_returned(tmp_path):
    _, failures = write(tmp_path / "out")
    assert failures == [(f"unit {n}", "a multiple of 7") for n in (7, 14, 21)]


def test_two_workers_write_the_bytes_of_one(whole, tmp_path):
    write(tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(whole[0])


@pytest.mark.parametrize("limit", [0, 1, 4, 13, 19])
def test_an_interrupted_run_resumes_to_the_same_bytes(whole, tmp_path, limit):
    out = tmp_path / "out"
    stopping = Stopping(limit)
    with pytest.raises(KeyboardInterrupt):
        write(out, stopping)
    assert not (out / "dataset.json").exists()
    with pytest.raises(InputError, match=re.escape(str(out))):
        records.open_dataset(out)
    parts = [path for path in out.rglob("*.array_record")]
    again = Stopping(None)
    _, failures = write(out, again)
    assert content(out) == content(whole[0])
    assert len(failures) == 3, "failures of the finished shards are listed, too"
    # Finished shards, of three units each, are not written again.
    assert len(again.numbers) == 20 - 3 * (len(stopping.numbers) // 3)
    assert bool(parts) == (limit >= 3)


def test_a_run_killed_before_finish_resumes_to_the_same_bytes(whole, tmp_path):
    write(tmp_path / "out", finish=False)
    assert not (tmp_path / "out" / "dataset.json").exists()
    again = Stopping(0)
    write(tmp_path / "out", again)
    assert content(tmp_path / "out") == content(whole[0])


def kill(unit):
    """`make` whose process dies with unit 5."""
    if unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(unit)


def test_a_worker_that_dies_ends_the_run_and_its_unit_is_named(tmp_path):
    out = tmp_path / "out"
    started = time.monotonic()
    with pytest.raises(InputError, match=r"signal 9.* unit 5,.*--workers"):
        write(out, kill, workers=2)
    assert time.monotonic() - started < 60
    # Again, even with one worker: the rest is prepared, and the killer is rejected.
    _, failures = write(out, kill)
    assert [name for name, _ in failures] == ["unit 5", "unit 7", "unit 14", "unit 21"]
    assert "died twice (signal 9)" in failures[0][1]
    dataset = records.open_dataset(out)
    ids = [dataset.source("train")[k].id for k in range(len(dataset.source("train")))]
    assert ids == [f"{n}-{k}" for n in range(1, 17) if n not in (5, 7, 14) for k in range(2)]


def test_a_worker_that_died_once_leaves_no_trace(whole, tmp_path):
    with pytest.raises(InputError, match="unit 5"):
        write(tmp_path / "out", kill, workers=2)
    _, failures = write(tmp_path / "out", workers=2)
    assert len(failures) == 3 and content(tmp_path / "out") == content(whole[0])


def fail(unit):
    raise ArithmeticError(f"unit {unit.number}")


def test_an_exception_of_a_worker_is_raised_here(tmp_path):
    with pytest.raises(ArithmeticError, match="unit 1"):
        write(tmp_path / "out", fail, workers=2)


def test_a_run_stopped_before_its_plan_was_written_can_be_repeated(whole, tmp_path):
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    (out / ".parts" / ".plan.json.x.tmp").write_text("{")  # the write was interrupted
    (out / "failures.csv").write_text("input,reason\n")  # of a run that could use no input
    write(out)
    assert content(out).keys() == content(whole[0]).keys() | {"failures.csv"}


def test_an_unfinished_folder_accepts_the_same_plan_only(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(out, Stopping(4))
    for other in ({"size": 16}, {"splits": SPLITS | {"val": [Unit(30)]}}):
        with pytest.raises(InputError, match="with plan "):
            write(out, **other)
    write(out)


def test_a_finished_or_foreign_folder_is_rejected_and_unchanged(whole, tmp_path):
    before = content(whole[0])
    with pytest.raises(InputError, match=f"{re.escape(str(whole[0]))} .* finished"):
        write(whole[0])
    assert content(whole[0]) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="choose a new --out"):
        write(tmp_path)
    assert content(tmp_path) == {"thesis.txt": b"mine"}


def test_a_run_without_records_is_rejected_and_leaves_no_files(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="a multiple of 7"):
        write(out, splits={"train": [Unit(7)], "val": []})
    assert content(out) == {}
    with pytest.raises(InputError, match=re.escape(str(out))):
        write(out, splits={"train": []})
    write(out)


def test_the_fingerprint_depends_on_the_records(whole, tmp_path):
    fingerprint = whole[1]["fingerprint"]
    assert write(tmp_path / "same")[0]["fingerprint"] == fingerprint
    fewer = SPLITS | {"train": SPLITS["train"][:-1]}
    other = SPLITS | {"test": SPLITS["val"]}
    del other["val"]
    others = [
        write(tmp_path / str(k), splits=splits)[0]["fingerprint"]
        for k, splits in enumerate((fewer, other))
    ]
    assert len({fingerprint, *others}) == 3


def test_dataset_json_is_plain_json(whole):
    info = json.loads((whole[0] / "dataset.json").read_text())
    assert info["window"] == [-1024.0, 3071.0]
    assert "body mask" in info["crop"] and "numpy" in info["versions"]
    assert info == json.loads(json.dumps(whole[1]))
