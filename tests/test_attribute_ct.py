"""`maknet attribute` of CT files: slices, NIfTI maps, and the flags of `maknet predict`."""

import collections
import csv
import dataclasses
import json
import pathlib
import re
import shutil

import nibabel
import numpy as np
import pytest

import maknet_jax
from maknet_jax import attribute, cli, console
from maknet_jax.ct import search, volumes
from maknet_jax.errors import InputError
from maknet_jax.evaluation.series import FLAGS
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.runs import workdir


def rows_of(out):
    with (out / "attributions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_ct_files_are_explained(trained, phantom, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    shutil.copytree(sorted(phantom["dicom"].iterdir())[0], scans)
    series = search.find_series(scans)[0][0]
    ids = [f"{series.key}:3", f"{series.key}:0"]
    options = SelectionOptions(path=scans, ids=ids), PathOptions(steps=2)
    summary = attribute.attribute(trained, out, *options)
    assert (summary["images"], summary["groups"]) == (2, 1)
    rows = rows_of(out)
    (predicted,) = maknet_jax.load(trained).predict(scans).series
    expected = {f"{series.key}:{number}": predicted.flags_of(number) for number in (0, 3)}
    assert all(row["flags"].split("|") == list(expected[row["id"]]) for row in rows)
    page = (out / "index.html").read_text()
    names = [name for flags in expected.values() for name in flags]
    assert "phantom" in names and summary["flags"] == dict(collections.Counter(names))
    for name in summary["flags"]:
        on_cards = 0 if name == "phantom" else names.count(name)
        assert page.count(f"{name}: {FLAGS[name]}") == on_cards
        assert f"flag {name} on {names.count(name)} of 2 images" in page
    assert console.NOTICE in page and f"trained on {summary['trained_on']}" in page
    assert {row["id"] for row in rows} == set(ids) and {row["truth"] for row in rows} == {"unknown"}
    volume = volumes.load_series(series)
    assert {(entry["series"], entry["label"]) for entry in summary["nifti"]} == {
        (series.key, row["label"]) for row in rows
    }
    for entry in summary["nifti"]:
        image = nibabel.load(entry["file"])
        assert image.shape == volume.hu.shape[::-1]
        np.testing.assert_allclose(image.affine, volume.affine, atol=1e-4)
        shown = {int(row["id"][-1]) for row in rows if row["label"] == entry["label"]}
        assert set(np.flatnonzero(np.any(image.dataobj, axis=(0, 1)))) == shown
        assert entry["slices"] == len(shown)
    # With another number of slices, slice 3 may be another image.
    pathlib.Path(series.paths[-1]).unlink()
    with pytest.raises(InputError, match="selection"):
        attribute.attribute(trained, out, *options)


def test_several_paths_and_flags_on_the_terminal(trained, phantom, tmp_path, capsys):
    paths = [str(path) for path in sorted(phantom["dicom"].iterdir())[:2]]
    argv = ["--model", str(trained), "--out", str(tmp_path / "out"), "--steps", "2"]
    argv += ["--labels", workdir.open_run(trained).vocabulary.names[0], "--limit", "2"]
    assert cli.main(["attribute", *paths, *argv]) == 0
    printed = capsys.readouterr().out
    assert "flag phantom on 2 of 2 images" in printed and "trained on" in printed
    label = argv[argv.index("--labels") + 1]
    assert re.search(
        rf"^selected: the 2 of \d+ slices with the highest confidence in {label}:", printed, re.M
    )
    assert printed.splitlines()[-1] == console.NOTICE
    assert len({row["id"].rpartition(":")[0] for row in rows_of(tmp_path / "out")}) == 2
    stored = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert stored["selection"]["path"] == paths


@pytest.mark.parametrize("factor", [1, 0])
def test_without_labels_the_most_confident_slices_are_explained(
    trained, phantom, tmp_path, capsys, monkeypatch, factor
):
    """As by `Model.attribute`, with the rule; with thresholds out of reach it says so."""
    run = workdir.open_run(trained)
    thresholds = np.quantile(run.thresholds, 0.5) * np.ones(len(run.vocabulary))
    changed = dataclasses.replace(run, thresholds=thresholds if factor else thresholds + 2)
    monkeypatch.setattr(workdir, "open_run", lambda *_, **__: changed)
    path, out = str(sorted(phantom["dicom"].iterdir())[0]), tmp_path / "out"
    argv = ["attribute", path, "--model", str(trained), "--out", str(out), "--steps", "2"]
    assert cli.main([*argv, "--limit", "3", "--top", "1", "--refine", "0"]) == 0
    printed, said = capsys.readouterr()
    rule = r"^selected: the 3 of \d+ slices with the highest confidence in any label:"
    assert re.search(rule, printed, re.M)
    assert said.count("maknet attribute: 3 images") == 1 and "compiled" in said
    model = maknet_jax.api.Model(changed)
    maps = model.attribute(model.predict(path), limit=3, top=1, steps=2, refine=0)
    rows = rows_of(out)
    assert {row["id"] for row in rows} == set(maps.ids)
    for row, start, end in zip(rows, maps.start[:, 0], maps.end[:, 0], strict=True):
        assert float(row["baseline"]) == pytest.approx(start, abs=1e-5)
        assert float(row["confidence"]) == pytest.approx(end, abs=1e-5)
    reached = json.loads((out / "summary.json").read_text())["reached"]
    assert reached == sum(row["predicted"] == "True" for row in rows)
    if not factor:
        assert reached == 0
        line = "none of the labels shown reaches its threshold in 3 of 3 images"
        assert line in printed and line in (out / "index.html").read_text()
