"""`maknet report`."""

import dataclasses
import json
import shutil
import types

import jinja2
import numpy as np
import pytest
from test_page import check_page

from maknet_jax import cli, evaluate, report
from maknet_jax.errors import InputError
from maknet_jax.explain import results
from maknet_jax.figures import page
from maknet_jax.runs import workdir


def test_the_report_is_one_page_with_curves_scores_and_cases(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    path = report.report(folder, count=2, steps=4)
    assert path == folder / "report" / "index.html"
    assert "<h2>Scores</h2>" in path.read_text() and "<table>" not in path.read_text()
    evaluated = evaluate.evaluate(folder)
    text = report.report(folder, count=2, steps=4).read_text()
    # Curves, contact sheet and 2 + 2 cases of one CT, CT and map, and 5 maps to tap.
    assert check_page(text) == 2 + 4 * (1 + 2 + 5)
    for heading in ("Training", "Scores", "Best cases of test", "Worst cases of test"):
        assert f"<h2>{heading}</h2>" in text
    for split, values in evaluated["splits"].items():
        assert f"<td>{split}</td><td>{values['auc']:.4g}</td>" in text
        assert f"on {split}: {values['labels_evaluated']} labels</summary>" in text
    assert text.count('id="mix"') == 1


def test_best_have_a_lower_loss_than_worst(trained, shards, tmp_path):
    report.report(trained, tmp_path / "out", count=2, steps=2)
    run = workdir.open_run(trained)
    source = shards.source("test")
    examples = {source[k].id: source[k] for k in range(len(source))}

    def loss(name):
        hu = np.repeat(examples[name].image[None], 8, axis=0)
        logits = run.predict(run.variables, {"image": hu})["logits"][0]
        labels, mask = examples[name].labels, examples[name].label_mask > 0
        right = 1 / (1 + np.exp(np.where(labels > 0, -logits, logits)))
        return -np.log(right[mask]).mean()

    losses = {}
    for kind in ("best", "worst"):
        paths = (tmp_path / "out").glob(f"{kind}-*/cases/*.npz")
        losses[kind] = [loss(results.load(path)[0]["id"]) for path in paths]
    every = sorted(loss(name) for name, example in examples.items() if example.labels.any())
    assert sorted(losses["best"]) == pytest.approx(every[:2], rel=1e-4)
    assert min(losses["worst"]) >= every[-2] - 1e-4


def test_other_cases_or_other_weights_get_another_folder(trained, tmp_path, monkeypatch):
    out, options = tmp_path / "out", {"count": 1, "steps": 1}
    report.report(trained, out, **options)
    folders = {path.name for path in out.glob("*-test-*")}
    assert len(folders) == 2
    report.report(trained, out, **options)
    assert {path.name for path in out.glob("*-test-*")} == folders  # resumed
    scores = report.Evaluator.scores

    def reversed_scores(self, variables):
        original = scores(self, variables)
        return dataclasses.replace(original, scores=1 - original.scores)

    monkeypatch.setattr(report.Evaluator, "scores", reversed_scores)
    text = report.report(trained, out, **options).read_text()
    assert len(list(out.glob("*-test-*"))) > 2 and "<h2>Best cases of test</h2>" in text


def test_a_network_that_takes_a_box_has_no_cases(trained, tmp_path, monkeypatch):
    opened, box = workdir.open_run, types.SimpleNamespace(takes_box=True)

    def with_box(*args, **options):
        run = opened(*args, **options)
        return dataclasses.replace(run, assembly=dataclasses.replace(run.assembly, model=box))

    monkeypatch.setattr(workdir, "open_run", with_box)
    text = report.report(trained, tmp_path / "out").read_text()
    assert "<h2>Cases of test</h2>" in text and "<h2>Training</h2>" in text
    assert "Best cases" not in text and 'class="card"' not in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


def test_the_command_prints_the_path(trained, tmp_path, capsys):
    assert cli.main(["report", str(trained), "--out", str(tmp_path / "r"), "--cases", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r" / "index.html")


def test_invalid_arguments_are_rejected(trained, tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        report.report(tmp_path)
    with pytest.raises(InputError, match="'nine'"):
        report.report(trained, tmp_path / "out", split="nine")
    folder = tmp_path / "moved"
    shutil.copytree(trained, folder)
    info = json.loads((folder / "dataset.json").read_text()) | {"path": str(tmp_path / "gone")}
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="gone"):
        report.report(folder)


def test_templates_escape_text_and_need_all_their_values():
    model = {"name": "<m>", "columns": [{"title": "<t>", "labels": [], "uri": "data:image/x"}]}
    card = page.perturbation_card("<i>", [model])
    lead = page.perturbation_lead({"images": 2, "top": 5}, ["<h>"], [["<c>"]], 1)
    text = page.document("<d>", lead, [card])
    for tag in ("<m>", "<t>", "<i>", "<d>", "<h>", "<c>"):
        assert tag not in text and f"&lt;{tag[1]}&gt;" in text
    del model["columns"][0]["uri"]
    with pytest.raises(jinja2.UndefinedError, match="uri"):
        page.perturbation_card("<i>", [model])
