"""A disk that fills up ends a command in one line with code 2, and the same command resumes."""

import contextlib
import errno
import json
import subprocess

import pytest
import runs
import toy

from maknet_jax import cli, console
from maknet_jax.training import log

# Sizes in kB at which the disk fills up: in the claim, logs, checkpoints, shards or pictures.
TRAIN = (4, 8, 12, 14, 20, 32, 48, 96, 112, 160, 200, 240)
LABEL = (4, 8, 12, 28, 48)
ATTRIBUTE = (4, 300, 800, 1000)


def test_logs_name_themselves(tmp_path):
    full = tmp_path / "log.jsonl"
    full.symlink_to("/dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    events = console.Log(full)
    with pytest.raises(OSError) as caught:
        events.event(message="x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(full))
    metrics = log.MetricLog(None)
    metrics._file = (tmp_path / "metrics.jsonl").open("a")
    metrics._board = log.SummaryWriter(str(tmp_path / "tensorboard"))
    with pytest.raises(OSError) as caught:
        metrics.write(1, {"loss": 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    metrics._board.close()
    for file in (events._file, metrics._file):
        with contextlib.suppress(OSError):
            file.close()


@pytest.fixture
def disk(tmp_path):
    """disk(kB) mounts a small disk; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")

    @contextlib.contextmanager
    def disk(size):
        mount(f"size={size}k")
        try:
            yield folder, lambda: mount("remount,size=64m")
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    return disk


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    argv = train_argv(toy.write(folder / "data"))
    assert cli.main([*argv, "--workdir", str(folder / "run")]) == 0
    return folder / "run"


def train_argv(data):
    changes = toy.overrides(data, "linear", epochs=2.0, checkpoint_every=3)
    return ["train", "--config", "linear", *(f"--config.{change}" for change in changes)]


def fills_up(disk, size, argv, capfd):
    """Runs a command on a disk of `size` kB, then again on a large one; yields its folder."""
    with disk(size) as (folder, enlarge):
        argv = [*argv, str(folder / "out")]
        capfd.readouterr()
        assert cli.main(argv) == 2
        lines = capfd.readouterr().err.splitlines()
        assert "Traceback" not in "\n".join(lines)
        assert lines[-1].startswith(f"maknet: {folder}/out") and "No space left" in lines[-1]
        enlarge()
        assert cli.main(argv) == 0
        assert not [path for path in folder.rglob("*") if "tmp" in path.name]
        yield folder / "out"


# TensorStore's threads may report that Orbax closed its event loop after the command has ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("size", TRAIN)
def test_train(disk, teacher, size, capfd):
    argv = [*train_argv(teacher.parent / "data"), "--workdir"]
    for out in fills_up(disk, size, argv, capfd):
        config = toy.config(
            teacher.parent / "data", "linear", {"epochs": 2.0, "checkpoint_every": 3}
        )
        runs.equal_runs(out, teacher, config)


@pytest.mark.slow
@pytest.mark.parametrize("size", LABEL)
def test_pseudo_label(disk, teacher, tmp_path, size, capfd):
    images = toy.write_unlabelled(tmp_path / "images")
    argv = ["pseudo-label", "--model", str(teacher), "--records", str(images), "--out"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == 0
    for out in fills_up(disk, size, argv, capfd):
        one, two = (json.loads((f / "pseudo.json").read_text()) for f in (out, tmp_path / "whole"))
        assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("size", ATTRIBUTE)
def test_attribute(disk, teacher, size, capfd):
    argv = ["attribute", "--model", str(teacher), "--split", "val", "--limit", "3", "--steps", "2"]
    for out in fills_up(disk, size, [*argv, "--out"], capfd):
        assert len(json.loads((out / "index.json").read_text())) == 3
