"""`maknet pseudo-label --precision`: thresholds per label from the teacher's validation images."""

import shutil

import numpy as np
import pytest
import toy
from pseudo_runs import COUNTS, SHARDS, confidences_of, greedy, labels_of, read_rows, train_teacher
from runs import Killed, kill, on_call

from maknet_jax import export, files, pseudo_label
from maknet_jax.data import pseudo_labels, records
from maknet_jax.errors import InputError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return toy.write_unlabelled(tmp_path_factory.mktemp("images") / "data", COUNTS)


def test_thresholds_reach_a_precision_on_the_validation_images(
    teacher, images, tmp_path, monkeypatch, capsys
):
    val = [toy.example("val", number) for number in range(toy.VAL)]
    scores = confidences_of(teacher, [each.image for each in val])
    labels = np.stack([each.labels for each in val])
    expected = pseudo_labels.thresholds_for_precision(
        scores, labels, np.ones_like(labels) > 0, precision=1.0, default=0.5
    )
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        on_call(patch, pseudo_labels, "write_rows", kill, count=2)
        with pytest.raises(Killed):
            pseudo_label.pseudo_label(teacher, images, out, precision=1.0)
    stored = files.read_json(out / "thresholds.json")
    np.testing.assert_allclose(list(stored.values()), expected, atol=1e-5)
    assert list(stored) == list(toy.VOCABULARY.names) and len(set(stored.values())) > 1
    with pytest.raises(InputError, match=r"precision 1.0, not 0.9"):
        pseudo_label.pseudo_label(teacher, images, out, precision=0.9)
    # Thresholds are chosen once: the shards of a resumed run have the same ones.
    files.write_json(out / "thresholds.json", dict.fromkeys(stored, 1.0))
    (out / SHARDS[0]).unlink()
    again = pseudo_label.pseudo_label(teacher, images, tmp_path / "again", precision=1.0)
    resumed = pseudo_label.pseudo_label(teacher, images, out, precision=1.0)
    assert resumed["kept"] == 0
    assert "never given: top left" in capsys.readouterr().err
    source = records.open_dataset(images).source("unlabelled")
    confidences = confidences_of(teacher, [source[number].image for number in range(29)])
    chosen = [
        [k for k in greedy(values, threshold=-1) if values[k] > expected[k]]
        for values in confidences
    ]
    rows = read_rows(tmp_path / "again")
    assert {row["index"]: labels_of(row) for row in rows} == {
        number: columns for number, columns in enumerate(chosen) if columns
    }
    assert again["kept"] == len(rows) and again["precision"] == 1.0
    files.write_json(out / "thresholds.json", {})
    with pytest.raises(InputError, match=r"thresholds.json is damaged"):
        pseudo_label.pseudo_label(teacher, images, out, precision=1.0)


def test_a_precision_needs_the_validation_images_of_the_teacher(teacher, images, tmp_path):
    def rejected(folder, message, **options):
        with pytest.raises(InputError, match=message) as error:
            pseudo_label.pseudo_label(folder, images, tmp_path / "out", **options)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    rejected(teacher, "precision 0 ", precision=0)
    rejected(teacher, "precision 1.5 ", precision=1.5)
    export.export(teacher, tmp_path / "bundle")
    rejected(tmp_path / "bundle", "is a bundle", precision=0.9)
    shutil.copytree(teacher, tmp_path / "run")
    info = files.read_json(tmp_path / "run" / "dataset.json")
    files.write_json(tmp_path / "run" / "dataset.json", info | {"fingerprint": "another"})
    rejected(tmp_path / "run", "is not the data of the teacher", precision=0.9)
