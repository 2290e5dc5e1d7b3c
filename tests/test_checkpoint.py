"""Checkpoints: exact, and never trusted without their digests."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import Killed, kill

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.training import checkpoint, ranger, state

MODEL, OPTIMIZER = models.build("linear", 3, edge=8), ranger.ranger(0.01)
LIKE = state.shapes(MODEL, OPTIMIZER, size=16)


def at(step):
    """A state with random numbers in every leaf, extremes among them."""
    rng = np.random.default_rng(step)

    def drawn(leaf):
        if leaf.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, 1000, leaf.shape), jnp.int32)
        values = rng.normal(size=leaf.shape).astype(np.float32)
        values.reshape(-1)[:1] = 1e-45 if values.size > 10 else -0.0  # subnormal
        return jnp.asarray(values)

    return jax.tree.map(drawn, LIKE)._replace(step=jnp.int32(step))


def opened(folder, **options):
    return contextlib.closing(checkpoint.Checkpoints(folder, **options))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints 10 and 20; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with opened(folder) as saved:
        for step in (10, 20):
            saved.save(at(step), {"best": step / 7, "thresholds": [0.3, 1.0]})
    return folder


@pytest.fixture
def folder(two, tmp_path):
    shutil.copytree(two, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)  # NamedTuples stay what they are
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return True


def test_restore_gives_back_every_bit(folder):
    with opened(folder) as saved:
        restored, meta, damaged = saved.restore(LIKE)
    assert equal(restored, at(20)) and damaged == {}
    assert meta == {"best": 20 / 7, "thresholds": [0.3, 1.0]}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))


def test_an_empty_folder_gives_none(tmp_path):
    with opened(tmp_path / "new") as saved:
        assert saved.restore(LIKE) == (None, {}, {})


def test_old_checkpoints_are_removed(folder):
    with opened(folder, keep=2) as saved:
        saved.save(at(30))
        assert saved.steps() == [20, 30]
        saved.discard(30)
        assert saved.steps() == [20]


def test_an_existing_step_is_not_overwritten(folder):
    with opened(folder) as saved:
        saved.save(at(11)._replace(step=jnp.int32(20)))
        assert saved.steps() == [10, 20]
        assert equal(saved.restore(LIKE)[0], at(20))


def test_saving_a_step_before_the_newest_is_an_error(folder):
    """Orbax drops it silently."""
    with opened(folder) as saved, pytest.raises(InputError, match="15 was not written"):
        saved.save(at(15))


@pytest.fixture
def late_errors():
    """Orbax raises at the first array that it cannot read and closes its event loop.

    The threads that read the others raise a little later: here, and not in the next test.
    """
    yield
    time.sleep(0.2)


damaging = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def largest(folder):
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_in_the_arrays(step):
    flip(largest(step / "state"))


def truncate(step):
    path = largest(step / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(step):
    largest(step / "state").unlink()


def lose_the_digests(step):
    (step / "content" / "metadata").write_text("{}")


def raise_a_threshold(step):
    content = json.loads((step / "content" / "metadata").read_text())
    content["meta"]["thresholds"][0] = 0.4
    (step / "content" / "metadata").write_text(json.dumps(content))


@damaging
@pytest.mark.parametrize(
    "damage", [flip_in_the_arrays, truncate, delete, lose_the_digests, raise_a_threshold]
)
def test_a_damaged_checkpoint_is_skipped(folder, damage, late_errors):
    damage(folder / "20")
    with opened(folder) as saved:
        restored, meta, damaged = saved.restore(LIKE)
        assert equal(restored, at(10)) and meta["best"] == 10 / 7
        assert list(damaged) == [20] and "Error: " in damaged[20]
        assert saved.steps() == [10, 20]  # reading moves nothing
        saved.set_aside(20)
        assert saved.steps() == [10]
        saved.save(at(20))  # its name is free again
        assert equal(saved.restore(LIKE)[0], at(20))
    assert (folder.parent / "checkpoints_damaged" / "20" / "state").is_dir()


def flip_the_stored_value(step):
    """A flip that Orbax cannot see: intact files, other numbers."""
    with opened(step.parent.parent / "other") as other:
        changed = at(20)
        bits = np.array(changed.params["classifier"]["kernel"]).view(np.uint32)
        bits[3, 1] ^= 1
        changed.params["classifier"]["kernel"] = jnp.asarray(bits.view(np.float32))
        other.save(changed)
    shutil.rmtree(step / "state")
    shutil.copytree(step.parent.parent / "other" / "20" / "state", step / "state")


def test_digests_detect_one_flipped_bit_that_orbax_reads(folder):
    flip_the_stored_value(folder / "20")
    with opened(folder) as saved:
        restored, _, damaged = saved.restore(LIKE)
    assert equal(restored, at(10))
    assert damaged[20].startswith("ValueError: 1 arrays ") and "kernel" in damaged[20]


@damaging
def test_an_error_if_all_are_damaged_and_nothing_is_moved(folder, late_errors):
    for step in ("10", "20"):
        flip_in_the_arrays(folder / step)
    with opened(folder) as saved:
        with pytest.raises(InputError, match=r"no checkpoint in .* can be read \(20: "):
            saved.restore(LIKE)
        assert saved.steps() == [10, 20]


@pytest.mark.parametrize(
    "other",
    [
        models.build("linear", 4, edge=8),  # the same tree, another shape
        models.build("maknet", 3, stem=8, blocks=(1,), growth_rates=(8,), widths=(8,)),
    ],
)
def test_another_networks_checkpoint_is_refused(folder, other):
    with opened(folder) as saved, pytest.raises(InputError, match="no checkpoint .* can be read"):
        saved.restore(state.shapes(other, OPTIMIZER, size=16))


def test_digests_see_type_shape_and_every_bit():
    tree = {"a": np.float32([0.0, 1.0]), "b": np.int32(3)}
    names = {"['a']", "['b']"}
    first = checkpoint.digests(tree)
    assert set(first) == names and checkpoint.digests(jax.tree.map(np.copy, tree)) == first
    for other in (np.float32([-0.0, 1.0]), np.float64([0, 1]), np.float32([[0.0, 1.0]])):
        assert checkpoint.digests(tree | {"a": other})["['a']"] != first["['a']"]


def test_weights_are_restored_without_knowing_the_network(two):
    with opened(two) as saved:
        weights, meta, damaged = saved.restore()
        whole = saved.restore(LIKE)[0]
    assert meta["best"] == 20 / 7 and not damaged and weights.opt_state == weights.ema == ()
    assert equal(weights, whole._replace(opt_state=(), ema=()))


def test_a_checkpoint_of_an_earlier_version_has_no_digest_of_its_metadata(folder):
    path = folder / "20" / "content" / "metadata"
    content = json.loads(path.read_text())
    assert len(content.pop("sha256")) == 64
    path.write_text(json.dumps(content))
    with opened(folder) as saved:
        assert saved.restore(LIKE).damaged == {} and saved.restore().metadata["best"] == 20 / 7
        assert saved.check(LIKE, 20).startswith("no digest") and saved.check(LIKE, 10) == ""


@pytest.mark.parametrize("name", ["lr=[0.1]", "a*b", "what?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """Orbax writes below it without a manifest, and nobody could read the result."""
    folder = tmp_path / name / "run" / "checkpoints"
    with pytest.raises(InputError, match="checkpoints below"):
        checkpoint.Checkpoints(folder)
    assert not (tmp_path / name).exists()


def test_checkpoints_can_be_read_where_they_cannot_be_written(folder, tmp_path):
    moved = shutil.move(folder, tmp_path / "lr=[0.1]")
    with opened(moved, writable=False) as saved:
        assert equal(saved.restore(LIKE).state, at(20)) and int(saved.restore().state.step) == 20


def test_what_was_written_is_opened(folder, monkeypatch):
    """Without the refusal of the path, the first save fails, not the first reading."""
    monkeypatch.setattr(checkpoint, "check_path", lambda _: None)
    with (
        opened(folder.parent / "lr=[0.1]") as saved,
        pytest.raises(InputError, match="10 was written but cannot be opened"),
    ):
        saved.save(at(10))


def test_what_a_killed_save_left_is_removed_by_the_next_training_only(folder):
    left = folder / "30.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    with opened(folder, writable=False):
        assert left.is_dir()
    with opened(folder) as saved:
        assert not left.parent.exists() and saved.steps() == [10, 20]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(
    folder, monkeypatch, renames
):
    original, done = pathlib.Path.rename, []

    def rename(self, target):
        if self.name == "20":
            if len(done) == renames:
                raise Killed
            done.append(self.parent.name)
        return original(self, target)

    with monkeypatch.context() as patch, opened(folder) as saved:
        patch.setattr(pathlib.Path, "rename", rename)
        patch.setattr(saved, "_restore_replaced", kill)  # after kill -9 nothing cleans up
        with pytest.raises(Killed):
            saved.replace(at(20), {"best": "new"})
    assert done == ["checkpoints", "checkpoints_new"][:renames]
    with opened(folder) as saved:
        restored = saved.restore(LIKE)
        assert saved.steps() == [10, 20] and equal(restored.state, at(20))
        assert restored.metadata["best"] == (20 / 7 if renames < 2 else "new")
        assert [path.name for path in folder.parent.iterdir()] == ["checkpoints"]
        saved.replace(at(20), {"best": "newer"})
        assert saved.restore(LIKE).metadata["best"] == "newer"
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoints"]


def fails_with(monkeypatch, error, times):
    """The next readings of a checkpoint raise `error`."""
    original, calls = checkpoint.Checkpoints._read, []

    def read(self, like, step):
        calls.append(step)
        if len(calls) <= times:
            raise error
        return original(self, like, step)

    monkeypatch.setattr(checkpoint.Checkpoints, "_read", read)
    monkeypatch.setattr(checkpoint, "_PAUSE", 0)
    return calls


SYSTEM = [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x"),
    ValueError("DATA_LOSS: Error reading x [OS error 5: Input/output error]"),
]


@pytest.mark.parametrize("error", SYSTEM)
def test_an_error_of_the_system_passes_or_is_raised_and_is_not_called_damage(
    folder, monkeypatch, error
):
    with opened(folder) as saved:
        calls = fails_with(monkeypatch, error, times=1)
        assert saved.restore(LIKE).damaged == {} and calls == [20, 20]
        fails_with(monkeypatch, error, times=9)
        with pytest.raises(OSError) as caught:
            saved.restore(LIKE)
        assert caught.value.errno in (errno.EMFILE, errno.EACCES, errno.EIO)
        assert caught.value.filename == str(folder / "20")


def test_a_full_disk_is_an_os_error_and_leaves_the_previous_checkpoints(folder, monkeypatch):
    def full(*_, **__):
        (folder / "30.orbax-checkpoint-tmp").mkdir()
        raise ValueError("Error writing x [OS error 28: No space left on device]")

    with opened(folder) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(saved._manager, "save", full)
            with pytest.raises(OSError) as caught:
                saved.save(at(30))
        assert caught.value.errno == errno.ENOSPC
        assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]
        saved.save(at(30))
        assert equal(saved.restore(LIKE).state, at(30))


@damaging
def test_a_reader_is_not_disturbed_by_a_training_that_saves_and_deletes(tmp_path, late_errors):
    folder, done = tmp_path / "checkpoints", threading.Event()
    with opened(folder, keep=1) as training, opened(folder, writable=False) as reader:
        training.save(at(1))

        def read():
            while not done.is_set():
                steps.append(int(reader.restore().state.step))

        steps, errors = [], []
        threads = [threading.Thread(target=lambda: _catch(read, errors))]
        for thread in threads:
            thread.start()
        for step in range(2, 25):
            training.save(at(step))
        done.set()
        for thread in threads:
            thread.join()
    assert errors == [] and steps == sorted(steps) and len(set(steps)) > 3


def _catch(work, errors):
    try:
        work()
    except Exception as error:
        errors.append(error)
