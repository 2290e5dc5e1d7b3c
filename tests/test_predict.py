"""`maknet predict` and `maknet evaluate` with a trained network."""

import csv
import json
import shutil

import numpy as np
import pytest

from maknet_jax import cli, evaluate, predict
from maknet_jax.ct import preprocess, search, volumes
from maknet_jax.errors import InputError
from maknet_jax.runs import workdir


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_slice_has_a_row_in_order(trained, phantom, tmp_path):
    out = tmp_path / "labels.csv"
    summary = predict.predict(trained, phantom["dicom"], out, as_json=True)
    rows = read(out)
    series, failures = search.find_series(phantom["dicom"])
    assert not failures
    assert summary["series"] == len(series)
    assert len(rows) == summary["slices"] == sum(ref.count for ref in series)
    for ref in series:
        numbers = [int(row["slice"]) for row in rows if row["series"] == ref.key]
        assert numbers == list(range(ref.count))
    full = json.loads(out.with_suffix(".json").read_text())
    assert np.shape(full["series"][0]["confidences"]) == (series[0].count, len(full["labels"]))


def test_labels_follow_from_confidences_thresholds_and_parents(trained, phantom, tmp_path):
    out = tmp_path / "labels.csv"
    predict.predict(trained, phantom["dicom"], out, as_json=True)
    run = workdir.open_run(trained)
    full = json.loads(out.with_suffix(".json").read_text())
    rows = iter(read(out))
    index = run.vocabulary.index
    predicted = 0
    for series in full["series"]:
        for confidences in np.asarray(series["confidences"]):
            row = next(rows)
            labels = set(filter(None, row["labels"].split("|")))
            # JSON rounds to four digits, so that labels at the threshold are ambiguous.
            clear = np.abs(confidences - run.thresholds) > 1e-4
            above = (confidences >= run.thresholds) & (run.thresholds < 1)
            for name, column in index.items():
                implied = any(index[name] in run.vocabulary.parents[index[c]] for c in labels)
                if clear[column] and not implied:
                    assert (name in labels) == above[column]
            for name in labels:
                parents = {run.vocabulary.names[p] for p in run.vocabulary.parents[index[name]]}
                assert parents <= labels
            predicted += len(labels)
    assert predicted > 0


def test_the_series_table_has_the_range_of_slices_of_each_label(trained, phantom, tmp_path):
    out = tmp_path / "labels.csv"
    predict.predict(trained, phantom["dicom"], out)
    slices = read(out)
    for row in read(tmp_path / "labels.series.csv"):
        numbers = [
            int(line["slice"])
            for line in slices
            if line["series"] == row["series"] and row["label"] in line["labels"].split("|")
        ]
        assert [int(row["first_slice"]), int(row["last_slice"])] == [min(numbers), max(numbers)]
        assert int(row["slices"]) == len(numbers)


def test_the_batch_size_does_not_matter(trained, phantom):
    run = workdir.open_run(trained)
    volume = volumes.load_series(search.find_series(phantom["dicom"])[0][0])
    a = predict.score_volume(run, volume, batch_size=8)
    b = predict.score_volume(run, volume, batch_size=24)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.shape == (len(volume.hu), len(run.vocabulary))


def test_the_edge_slice_repeats_and_channels_run_head_to_feet(trained, phantom):
    run = workdir.open_run(trained)
    volume = volumes.load_series(search.find_series(phantom["dicom"])[0][0])
    scores = predict.score_volume(run, volume)
    size = run.config.data.size
    image, _ = preprocess.make_triplet([volume.hu[0], volume.hu[0], volume.hu[1]], size)
    batch = np.repeat(image[None], 8, axis=0)
    logits = run.predict(run.variables, {"image": batch})["logits"][0]
    np.testing.assert_allclose(scores[0], 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_one_slice_has_its_neighbours_as_channels_and_copies_count_once(
    trained, phantom, tmp_path, capsys
):
    series = sorted(path for path in phantom["dicom"].iterdir() if path.is_dir())[0]
    shutil.copytree(series, tmp_path / "scans" / "one")
    shutil.copytree(series, tmp_path / "scans" / "again")
    out = tmp_path / "all.csv"
    summary = predict.predict(trained, tmp_path / "scans", out, as_json=True)
    count = len(list(series.iterdir()))
    assert (summary["slices"], summary["copies"], summary["failures"]) == (count, count, 0)
    rows = read(out)
    for k in (0, count // 2):
        file = tmp_path / "scans" / rows[k]["file"]
        predict.predict(trained, file, tmp_path / "one.csv", as_json=True)
        (row,) = read(tmp_path / "one.csv")
        assert row["labels"] == rows[k]["labels"] and row["series"] == rows[k]["series"]
        one, all_slices = (
            json.loads((tmp_path / name).read_text())["series"][0]["confidences"]
            for name in ("one.json", "all.json")
        )
        np.testing.assert_allclose(one[0], all_slices[k], atol=1e-4)


def test_unreadable_files_are_listed_and_the_others_labelled(trained, phantom, tmp_path, capsys):
    scans = tmp_path / "scans"
    series = sorted(phantom["dicom"].iterdir())[0]
    shutil.copytree(series, scans / "good")
    (scans / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    (scans / "notes.txt").write_text("no image")
    out = tmp_path / "labels.csv"
    code = cli.main(["predict", str(scans), "--workdir", str(trained), "--out", str(out)])
    assert code == 3
    failures = read(tmp_path / "labels.failures.csv")
    assert [row["input"].endswith("broken.png") for row in failures] == [True]
    assert len(read(out)) == len(list(series.iterdir()))


def test_without_a_readable_series_nothing_is_written(trained, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    out = tmp_path / "out" / "labels.csv"
    with pytest.raises(InputError, match=r"broken\.png"):
        predict.predict(trained, scans, out)
    assert not out.parent.exists()


def test_real_series_in_all_formats(trained, shared_data, tmp_path):
    for name, path, count in (
        ("dicom", shared_data / "dicom" / "liver_j2k_20", 20),
        ("png", shared_data / "deeplesion" / "Images_png" / "000001_01_01", 13),
        ("nifti", shared_data / "nifti" / "torso_112" / "example_ct.nii.gz", 112),
    ):
        summary = predict.predict(trained, path, tmp_path / f"{name}.csv")
        assert (summary["series"], summary["slices"], summary["failures"]) == (1, count, 0)


def test_8_bit_pngs_need_a_window(trained, shared_data, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    one = sorted((shared_data / "body_part_ordinal").glob("*.png"))[0]
    shutil.copy(one, folder)
    with pytest.raises(InputError, match="png-window"):
        predict.predict(trained, folder, tmp_path / "a.csv")
    summary = predict.predict(trained, folder, tmp_path / "a.csv", png_window=(-175, 275))
    assert summary["slices"] == 1


def test_evaluate_writes_tables_and_counts_each_image_once(trained, shards):
    summary = evaluate.evaluate(trained)
    assert set(summary["splits"]) == {"test", "hand"}
    for split, values in summary["splits"].items():
        rows = read(trained / "evaluation" / f"{split}_labels.csv")
        evaluated = [row for row in rows if row["evaluated"] == "True"]
        assert values["labels_evaluated"] == len(evaluated) > 0
        assert np.mean([float(row["auc"]) for row in evaluated]) == pytest.approx(values["auc"])
        assert values["examples"] == shards.split(split)["count"]
    again = evaluate.evaluate(trained, batch_size=8, splits=["test"])
    for name, value in again["splits"]["test"].items():
        assert value == pytest.approx(summary["splits"]["test"][name], abs=1e-6), name


def test_evaluate_rejects_unknown_splits_and_other_folders(trained, tmp_path):
    with pytest.raises(InputError, match="'nine'"):
        evaluate.evaluate(trained, splits=["nine"])
    with pytest.raises(InputError, match=str(tmp_path)):
        evaluate.evaluate(tmp_path)
    with pytest.raises(InputError, match="dataset.json"):
        evaluate.evaluate(trained, data=tmp_path)
