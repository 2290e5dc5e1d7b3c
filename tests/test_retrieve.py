"""`maknet retrieve`, and the groups of labels in `maknet evaluate`."""

import json
import shutil

import lesion_runs
import numpy as np
import pytest
import runs
from PIL import Image
from prepared import read_csv

from maknet_jax import cli, evaluate, retrieve, train
from maknet_jax.data import records
from maknet_jax.data.labels import Label, Vocabulary
from maknet_jax.errors import InputError, Stopped
from maknet_jax.evaluation import protocol
from maknet_jax.training import checkpoint

SIZE = 32


@pytest.fixture(scope="module")
def lesanet(phantom, tmp_path_factory):
    """(workdir, prepared lesions) of a LesaNet after one epoch."""
    folder = tmp_path_factory.mktemp("lesanet")
    data = lesion_runs.write(phantom, folder / "data", SIZE)
    train.train(lesion_runs.make_config(data, SIZE, epochs=1.0), folder / "run")
    return folder / "run", data


def test_a_resumed_lesanet_equals_an_uninterrupted_one(lesanet, tmp_path, monkeypatch):
    """All random draws of LesaNet's losses are functions of the step."""
    folder, data = lesanet
    config = lesion_runs.make_config(data, SIZE, epochs=1.0)
    labels = len(records.open_dataset(data).vocabulary)
    with monkeypatch.context() as patch:
        runs.signal_after(patch, 2)
        with pytest.raises(Stopped, match="step 2 of"):
            train.train(config, tmp_path / "run")
    train.train(config, tmp_path / "run")
    one, two = (
        runs.newest_checkpoint(path, config, labels=labels) for path in (folder, tmp_path / "run")
    )
    assert checkpoint.digests(one[0]) == checkpoint.digests(two[0]) and one[1] == two[1]


def query_of(phantom, example):
    """The source file of a record and its box, counted from 0."""
    name = example.meta["file"]
    path = phantom["images"] / name.rsplit("_", 1)[0] / name.rsplit("_", 1)[1]
    return path, [place - 1 for place in example.meta["slice_box"]]


def test_a_lesion_is_the_most_similar_to_itself(lesanet, phantom, tmp_path, capsys):
    folder, data = lesanet
    source = records.open_dataset(data).source("test")
    example = source[2]
    path, box = query_of(phantom, example)
    out = tmp_path / "similar.csv"
    code = cli.main(
        [
            "retrieve",
            "--workdir",
            str(folder),
            "--image",
            str(path),
            "--data",
            str(data),
            "--box",
            ",".join(map(str, box)),
            "--spacing",
            ",".join(map(str, example.meta["spacing"])),
            "--out",
            str(out),
            "--top",
            "5",
            "--split",
            "train,test",
            "--include-patient",
        ]
    )
    assert code == 0
    rows = read_csv(out)
    assert len(rows) == 5 and {row["split"] for row in rows} <= {"train", "test"}
    assert rows[0]["id"] == example.id and rows[0]["similarity"] == "1.0000"
    names = records.open_dataset(data).vocabulary.names
    assert rows[0]["labels"] == "|".join(names[k] for k in np.flatnonzero(example.labels))
    similarities = [float(row["similarity"]) for row in rows]
    assert similarities == sorted(similarities, reverse=True)
    with Image.open(tmp_path / "similar.png") as sheet:
        tile = (sheet.size[0] - 8) / 6
        assert tile == 232  # the query and five others, eight pixels apart
    assert example.id in capsys.readouterr().out


def test_the_query_and_its_patient_are_left_out(lesanet, phantom, tmp_path):
    folder, data = lesanet
    dataset = records.open_dataset(data)
    example = dataset.source("test")[2]
    path, box = query_of(phantom, example)
    copy = tmp_path / "lesion.png"  # its name does not name the patient, but its pixels do
    shutil.copy(path, copy)
    options = {"spacing": example.meta["spacing"], "top": 10**6}
    names = list(dataset.info["splits"])
    # Some lesions are in the splits test and hand, and are listed once.
    ids = {
        dataset.source(name)[k].id for name in names for k in range(dataset.split(name)["count"])
    }
    own = {name for name in ids if name[:6] == example.id[:6]}
    assert len(own) > 1
    for file in (path, copy):
        summary = retrieve.retrieve(folder, file, box, data, tmp_path / "a.csv", **options)
        assert {row["id"] for row in summary["found"]} == ids - own
        assert summary["left_out"] == len(own) and len(summary["found"]) == len(ids - own)


def test_the_query_equals_the_patch_of_the_record(lesanet, phantom):
    example = records.open_dataset(lesanet[1]).source("train")[0]
    path, box = query_of(phantom, example)
    query = retrieve.read_query(path, box, example.meta["spacing"], SIZE)
    np.testing.assert_array_equal(query.image, example.image)
    assert list(query.meta["box"]) == list(example.meta["box"])


def test_the_spacing_of_a_dicom_slice_is_read_from_the_file(phantom):
    path = sorted((phantom["dicom"] / "series_00").glob("*.dcm"))[3]
    query = retrieve.read_query(path, (20, 20, 30, 34), None, SIZE)
    assert query.image.shape == (SIZE, SIZE, 3) and query.image.dtype == np.int16
    other = retrieve.read_query(path, (20, 20, 30, 34), (1.0, 1.0, 5.0), SIZE)
    assert not np.array_equal(query.image, other.image)


@pytest.mark.parametrize(
    "image, box, spacing, part",
    [
        ("lesion", None, None, "--spacing"),
        ("lesion", (9, 9, 3, 3), (1, 1, 1), r"9\D+9\D+3\D+3"),
        ("nowhere.png", (1, 1, 3, 3), (1, 1, 1), "nowhere.png"),
        ("series", (1, 1, 3, 3), None, "12"),
    ],
)
def test_an_unreadable_query_is_an_error_of_one_line(lesanet, phantom, image, box, spacing, part):
    path, record_box = query_of(phantom, records.open_dataset(lesanet[1]).source("train")[0])
    path = {"lesion": path, "series": phantom["dicom"] / "series_00"}.get(image, image)
    with pytest.raises(InputError, match=part) as caught:
        retrieve.read_query(path, box or record_box, spacing, SIZE)
    assert "\n" not in str(caught.value)


def test_a_run_of_another_network_is_rejected(trained, lesanet, tmp_path):
    with pytest.raises(InputError, match=str(trained)):
        retrieve.retrieve(trained, "x.png", (0, 0, 1, 1), lesanet[1], tmp_path / "out.csv")


def test_means_by_class_and_frequency():
    kinds = ("bodypart", "type", "bodypart", "attribute")
    vocabulary = Vocabulary(tuple(Label(f"label {k}", kind) for k, kind in enumerate(kinds)))
    rows = [
        {"label": k, "evaluated": k != 3, "auc": v, "f1": v / 2, "precision": v, "recall": 1.0}
        for k, v in enumerate((0.5, 0.7, 0.9, 0.1))
    ]
    report = protocol.Report({}, rows)
    groups = evaluate.by_group(report, vocabulary, [100, 101, 1000, 1001])["groups"]
    assert list(groups) == ["bodypart", "type", "attribute", "rare", "medium", "frequent"]
    assert groups["bodypart"] == {
        "labels": 2,
        "auc": pytest.approx(0.7),
        "f1": pytest.approx(0.35),
        "precision": pytest.approx(0.7),
        "recall": 1.0,
    }
    assert groups["attribute"] == {
        "labels": 0,
        "auc": None,
        "f1": None,
        "precision": None,
        "recall": None,
    }
    assert groups["rare"]["auc"] == 0.5 and groups["medium"]["labels"] == 2
    assert "rare" not in evaluate.by_group(report, vocabulary)["groups"]
    one = Vocabulary((Label("a"), Label("b")))
    assert evaluate.by_group(protocol.Report({}, rows[:2]), one) == {}


def test_evaluate_writes_the_groups(lesanet):
    folder, _ = lesanet
    summary = evaluate.evaluate(folder)
    written = json.loads((folder / "evaluation" / "test.json").read_text())
    groups = written["groups"]
    assert groups == summary["splits"]["test"]["groups"]
    assert {"bodypart", "type", "attribute", "rare"} <= set(groups)
    kinds = ("bodypart", "type", "attribute")
    assert sum(groups[kind]["labels"] for kind in kinds) == written["labels_evaluated"]
    total = sum(groups[k]["auc"] * groups[k]["labels"] for k in kinds if groups[k]["labels"])
    assert total / written["labels_evaluated"] == pytest.approx(written["auc"])
    lines = (folder / "evaluation" / "test_groups.csv").read_text().splitlines()
    assert lines[0] == ",labels,auc,f1,precision,recall" and lines[1].startswith("bodypart,")
