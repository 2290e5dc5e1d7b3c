"""Every file of a data set, of pseudo-labels and of a workdir: truncated, absent, one flipped bit.

Either `maknet verify` reports the damage, or the reader does, or what is read is what was written.
"""

import itertools
import shutil

import numpy as np
import pytest
import toy

from maknet_jax import cli, train, verify
from maknet_jax.data import pseudo_labels, records
from maknet_jax.errors import InputError
from maknet_jax.runs import domain_file, workdir
from maknet_jax.training import transfer

# Readable by people, without a digest: a flipped bit in a name or a number is not seen.
TEXT = ("config.json", "dataset.json", "metrics.jsonl", "log.jsonl", "summary.json")
TEXT += ("parameters.txt",)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def read_run(folder):
    """What the commands read of a workdir."""
    run = workdir.open_run(folder, checkpoint_name="last")
    domain = {name: array.tobytes() for name, array in run.domain.arrays.items()}
    return run.step, transfer.digest(**run.variables), run.thresholds.tolist(), domain


def read_data(folder):
    dataset = records.open_dataset(folder)
    return [
        dataset.source(split).payload(number)
        for split, entry in dataset.info["splits"].items()
        for number in range(entry["count"])
    ]


def read_pseudo(folder):
    source = pseudo_labels.PseudoSource(
        folder, size=toy.SIZE, names=toy.VOCABULARY.names, balance=False, seed=0
    )
    return [source[number].labels.tolist() for number in range(len(source))]


def check(folder, read, tmp_path, harmless=()):
    """Damages each file in turn; returns the number of files and of reported damages."""
    before, reported, count = read(folder), 0, 0
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    paths = [path for path in paths if "tensorboard" not in path.parts]
    for path, damage in itertools.product(paths, (truncate, remove, flip)):
        if damage is flip and path.name in harmless:
            continue
        if damage is remove and path.name == domain_file.FILE:  # optional
            continue
        copy = shutil.copytree(folder, tmp_path / "copy")
        damage(copy / path.relative_to(folder))
        try:
            found = any(each.problem for each in verify.verify(copy))
            if not found:
                assert read(copy) == before, (path, damage.__name__)
        except InputError as error:
            found = "\n" not in str(error)
            assert found
        reported += found
        count += 1
        shutil.rmtree(copy)
    return len(paths), count, reported


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_no_damage_of_any_file_is_read_silently(data, tmp_path):
    pseudo = toy.write_pseudo(tmp_path / "labels", toy.write_unlabelled(tmp_path / "images"))
    config = toy.config(data, "linear", {"domain_components": 4, "epochs": 4.0})
    train.train(config, tmp_path / "run")
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    totals = np.zeros(3, int)
    for folder, read, harmless in (
        (data, read_data, ()),
        (pseudo, read_pseudo, ()),
        (tmp_path / "run", read_run, TEXT),
    ):
        counts = check(folder, read, tmp_path, harmless)
        print(folder.name, *counts)
        assert counts[2] > 0
        totals += counts
    # Orbax's descriptions of a checkpoint are not read when it is restored: their damage changes
    # nothing, and `check` has compared what was read.
    files, cases, reported = totals
    assert files > 17 and reported > cases // 3
