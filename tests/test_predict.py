"""`maknet predict` and `maknet evaluate` with a trained network."""

import csv
import json
import os
import shutil

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from maknet_jax import cli, evaluate, files, predict
from maknet_jax.ct import preprocess, search, volumes
from maknet_jax.errors import InputError
from maknet_jax.evaluation import body_parts, series_tables
from maknet_jax.runs import workdir


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(trained, phantom, tmp_path_factory):
    """(CSV, summary) of all series of the phantom, with all tables."""
    out = tmp_path_factory.mktemp("predict") / "labels.csv"
    return out, predict.predict(trained, phantom["dicom"], out, as_json=True, wide=True, audit=True)


def test_every_slice_has_rows_in_order_with_its_place_and_uid(written, phantom):
    out, summary = written
    rows, full = read(out), json.loads(out.with_suffix(".json").read_text())
    assert tuple(rows[0]) == series_tables.SLICE_COLUMNS
    series, failures = search.find_series(phantom["dicom"])
    assert not failures
    assert (summary["series"], summary["slices"]) == (len(series), sum(r.count for r in series))
    for ref, stored in zip(series, full["series"], strict=True):
        volume = volumes.load_series(ref)
        mine = [row for row in rows if row["series"] == ref.key]
        assert list(dict.fromkeys(int(row["slice"]) for row in mine)) == list(range(ref.count))
        for row in mine:
            number = int(row["slice"])
            assert float(row["z_mm"]) == pytest.approx(number * volume.spacing[0], abs=1e-3)
            assert row["sop_instance_uid"] == volume.uids[number] == stored["uids"][number]
            assert row["file"] == volume.slices[number] == stored["slices"][number]
        assert np.shape(stored["confidences"]) == (ref.count, len(full["labels"]))
        np.testing.assert_allclose(stored["z_mm"], np.arange(ref.count) * volume.spacing[0])


def test_labels_follow_from_confidences_thresholds_and_parents(written, trained):
    out, _ = written
    run = workdir.open_run(trained)
    full, rows = json.loads(out.with_suffix(".json").read_text()), read(out)
    index = run.vocabulary.index
    predicted = 0
    for series in full["series"]:
        for number, confidences in enumerate(np.asarray(series["confidences"])):
            mine = [r for r in rows if (r["series"], r["slice"]) == (series["series"], str(number))]
            labels = [row["label"] for row in mine if row["label"]]
            assert labels == series["labels"][number] and len(mine) == max(1, len(labels))
            for row in mine[: len(labels)]:
                column = index[row["label"]]
                assert float(row["confidence"]) == confidences[column]
                assert float(row["threshold"]) == run.thresholds[column]
            ordered = [float(row["confidence"]) for row in mine[: len(labels)]]
            assert ordered == sorted(ordered, reverse=True)
            # JSON rounds to four digits, so that labels at the threshold are ambiguous.
            clear = np.abs(confidences - run.thresholds) > 1e-4
            above = (confidences >= run.thresholds) & (run.thresholds < 1)
            for name, column in index.items():
                implied = any(index[name] in run.vocabulary.parents[index[c]] for c in labels)
                if clear[column] and not implied:
                    assert (name in labels) == above[column]
            for name in labels:
                parents = {run.vocabulary.names[p] for p in run.vocabulary.parents[index[name]]}
                assert parents <= set(labels)
            predicted += len(labels)
    assert predicted > 0


def test_the_series_table_has_the_range_of_slices_of_each_label_and_its_code(written):
    out, summary = written
    slices, rows = read(out), read(out.with_suffix(".series.csv"))
    assert {row["series"] for row in rows} == {row["series"] for row in slices}
    for row in rows:
        mine = [r for r in slices if (r["series"], r["label"]) == (row["series"], row["label"])]
        assert (int(row["first_slice"]), int(row["last_slice"])) == (
            int(mine[0]["slice"]),
            int(mine[-1]["slice"]),
        )
        assert (row["first_mm"], row["last_mm"]) == (mine[0]["z_mm"], mine[-1]["z_mm"])
        assert int(row["slices"]) == len(mine)
        part = body_parts.of_label(row["label"])
        assert (row["body_part_examined"], row["sct_code"]) == (part.term, part.code)
        assert row["flags"] == "phantom"
    codes = {row["label"]: row["sct_code"] for row in rows}
    assert codes["liver"] == "10200004" and "no code" in codes.values()
    assert summary["flags"] == {"phantom": summary["series"]}


def test_the_wide_table_has_one_row_per_slice(written):
    out, summary = written
    rows = read(out.with_suffix(".wide.csv"))
    full = json.loads(out.with_suffix(".json").read_text())
    confidences = [[float(row[name]) for name in full["labels"]] for row in rows]
    expected = np.concatenate([series["confidences"] for series in full["series"]])
    np.testing.assert_array_equal(confidences, expected)
    assert [row["labels"].split("|") for row in rows] == [
        labels or [""] for series in full["series"] for labels in series["labels"]
    ]
    assert len(rows) == summary["slices"]


def test_standard_output_says_what_each_series_covers(written):
    out, summary = written
    text = predict.text(summary)
    first = summary["overview"][0]
    assert f"{first['series']}: {first['slices']} slices, {first['mm']:.0f} mm; shows " in text
    assert "flag phantom on" in text and str(out) in text
    counts = {row["series"]: 0 for row in summary["overview"]}
    for row in summary["covers"]:
        counts[row["series"]] += 1
    more = sum(max(0, count - series_tables.MOST_LABELS) > 0 for count in counts.values())
    assert text.count("more labels") == more > 0
    row = max(
        (row for row in summary["covers"] if row["series"] == first["series"]),
        key=lambda row: row["slices"],
    )
    cells = (row["first_slice"], row["last_slice"], f"{row['first_mm']:.0f}")
    assert any(
        line.split()[-6:-3] == [str(cell) for cell in cells]
        for line in text.splitlines()
        if line.strip().startswith(row["label"])
    )


def test_outputs_are_never_overwritten_unless_told(trained, phantom, tmp_path, capsys):
    scans, out = sorted(phantom["dicom"].iterdir())[0], tmp_path / "labels.csv"
    argv = ["predict", str(scans), "--model", str(trained), "--out", str(out)]
    (tmp_path / "labels.json").write_text("mine")
    assert cli.main(argv) == 2 and (tmp_path / "labels.json").read_text() == "mine"
    err = capsys.readouterr().err
    assert "labels.json exists" in err and "--overwrite" in err and "=True" not in err
    with pytest.raises(InputError, match="labels.json exists.* overwrite=True") as error:
        predict.predict(trained, scans, out)
    assert "--overwrite" not in str(error.value)
    (tmp_path / "labels.json").unlink()
    assert cli.main([*argv, "--charts", "--wide"]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"labels.000.png", "labels.wide.csv", "labels.summary.json"} <= set(before)
    summary = json.loads((tmp_path / "labels.summary.json").read_text())
    assert summary["without_chart"] == 0 and "without a chart" not in predict.text(summary)
    assert "without a chart: 2" in predict.text(summary | {"without_chart": 2})
    assert cli.main([*argv, "--charts", "--wide"]) == 2
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    features = ["--features", str(tmp_path / "features.npz")]
    assert cli.main([*argv, "--overwrite", *features]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == before.keys() - {"labels.000.png", "labels.wide.csv"} | {"features.npz"}
    again = ["predict", str(scans), "--model", str(trained), "--out", str(tmp_path / "b.csv")]
    assert cli.main([*again, *features]) == 2


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--out", "folder"], "folder is a folder: name a file in it, such as folder/output.csv"),
        (["--out", "x.json"], "x.json: pass x.csv and add --json, which writes both"),
        (["--out", "x"], "x should end in .csv: pass x.csv\n"),
        (["--out", "x.csv", "--features", "folder"], "folder is a folder: name a file in it"),
        (["--out", "x.csv", "--features", "x.npy"], "x.npy should end in .npz: pass x.npz"),
    ],
)
def test_an_output_with_another_ending_or_a_folder_is_refused(
    tmp_path, monkeypatch, capsys, argv, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert cli.main(["predict", "scans", "--model", "runs", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_outputs_in_the_input_folder_are_not_inputs(trained, phantom, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(sorted(phantom["dicom"].iterdir())[0], scans / "series")
    first = predict.predict(trained, scans, scans / "labels.csv", charts=True, as_json=True)
    assert (scans / "labels.000.png").exists()
    files.write_json(scans / "maps" / "settings.json", {"networks": []})
    files.write_json(scans / "shards" / ".parts" / "plan.json", {})
    files.write_json(scans / "mine" / "dataset.json", {"numTraining": 1})  # nnU-Net's
    for name in ("maps/a.png", "shards/a.png", "copy.png"):
        shutil.copy(scans / "labels.000.png", scans / name)  # its metadata name this package
    for name in ("mine/a.png", "picture.000.png"):
        with Image.open(scans / "labels.000.png") as picture:
            picture.save(scans / name)
    found, _ = search.find_series(scans)
    assert sum(ref.count for ref in found if ref.kind == "dicom") == first["slices"]
    pictures = {path for ref in found if ref.kind == "png" for path in ref.paths}
    # Pictures of somebody else are inputs, and rejected when they are read.
    assert pictures == {str(scans / "mine" / "a.png"), str(scans / "picture.000.png")}


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
    scans = tmp_path / "scans"
    shutil.copytree(series, scans / "one")
    shutil.copytree(series, scans / "again")
    count = len(list(series.iterdir()))
    arguments = ["--workdir", str(trained), "--out", str(tmp_path / "all.csv")]
    assert cli.main(["predict", str(scans), *arguments]) == 0
    assert f"copies of slices, taken once: {count}" in capsys.readouterr().out
    summary = json.loads((tmp_path / "all.summary.json").read_text())
    assert (summary["slices"], summary["copies"], summary["failures"]) == (count, count, 0)
    run = workdir.open_run(trained)
    volume = volumes.load_series(search.find_series(scans)[0][0])
    expected = predict.score_volume(run, volume)
    for k in (0, count // 2):
        ((ref,), _) = search.find_series(scans / volume.slices[k])
        alone = predict.score_volume(run, volumes.load_series(ref))
        np.testing.assert_allclose(alone, expected[k : k + 1], atol=1e-4)
    summary = predict.predict(trained, scans / volume.slices[0], tmp_path / "one.csv")
    assert (summary["series"], summary["slices"]) == (1, 1)


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
    assert len({row["slice"] for row in read(out)}) == len(list(series.iterdir()))


def test_without_a_readable_series_nothing_is_written(trained, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    out = tmp_path / "out" / "labels.csv"
    with pytest.raises(InputError, match=r"broken\.png"):
        predict.predict(trained, scans, out)
    assert [path.name for path in out.parent.iterdir()] == ["labels.failures.csv"]
    (failure,) = read(out.with_suffix(".failures.csv"))
    assert failure["input"].endswith("broken.png")


def test_a_file_that_aborts_its_decoder_and_odd_names_leave_the_rest(
    trained, phantom, shared_data, tmp_path
):
    scans = tmp_path / os.fsdecode(b"M\xfcller $x$") / "=1\x1b[2J"
    series = next(path for path in sorted(phantom["dicom"].iterdir()) if path.is_dir())
    shutil.copytree(series, scans)
    shutil.copy(shared_data.parent / "cases" / "jpeg_lossless_abort.dcm", scans)
    values = np.random.default_rng(0).integers(-1000, 300, (48, 48, 3)).astype(np.int16)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(scans / "v.nii")
    out = tmp_path / "out" / "labels.csv"
    arguments = ["predict", str(tmp_path), "--model", str(trained), "--out", str(out)]
    for _ in range(2):
        assert cli.main([*arguments, "--json", "--charts", "--overwrite"]) == 3
        slices = {(row["series"], row["slice"]) for row in read(out)}
        assert len(slices) == len(list(series.iterdir())) + 3
        for path in out.parent.glob("*.[cj]s*"):
            content = path.read_text(encoding="utf-8")
            assert "\x1b" not in content and "\\udcfc" not in content, path
        assert {row["series"] for row in read(out)} >= {r"M\xfcller $x$/=1\x1b[2J/v.nii"}
        (failure,) = read(out.with_suffix(".failures.csv"))
        assert "aborted" in failure["reason"]


def test_real_series_in_all_formats(trained, shared_data, tmp_path):
    for name, path, count in (
        ("dicom", shared_data / "dicom" / "liver_j2k_20", 20),
        ("png", shared_data / "deeplesion" / "Images_png" / "000001_01_01", 13),
        ("nifti", shared_data / "nifti" / "torso_112" / "example_ct.nii.gz", 112),
    ):
        summary = predict.predict(trained, path, tmp_path / f"{name}.csv")
        assert (summary["series"], summary["slices"], summary["failures"]) == (1, count, 0)


def test_overrides_are_recorded(trained, phantom, tmp_path, capsys):
    series = sorted(phantom["dicom"].iterdir())[0]
    (tmp_path / "scans").mkdir()
    for path in series.iterdir():
        data = pydicom.dcmread(path)
        data.RescaleIntercept += 1024
        data.LossyImageCompression = "01"
        data.save_as(tmp_path / "scans" / path.name)
    out = tmp_path / "labels.csv"
    command = ["predict", str(tmp_path / "scans"), "--model", str(trained), "--out", str(out)]
    for options, named in (([], "--allow-lossy"), (["--allow-lossy"], "--assume-hu")):
        assert cli.main([*command, *options]) == 2
        assert named in capsys.readouterr().err
    assert cli.main([*command, "--allow-lossy", "--assume-hu", "--json"]) == 0
    for name in ("labels.json", "labels.summary.json"):
        written = json.loads((tmp_path / name).read_text())
        assert (written["assume_hu"], written["allow_lossy"]) == (True, True)
    summary = predict.predict(trained, series, tmp_path / "plain.csv")
    assert (summary["assume_hu"], summary["allow_lossy"]) == (False, False)


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
