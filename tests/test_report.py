"""`maknet report`."""

import dataclasses
import json
import shutil
import types

import jinja2
import numpy as np
import pytest
from test_page import check_page

from maknet_jax import attribute, cli, evaluate, perturb, report
from maknet_jax.data import records
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
    # Three curves, sample images, and 2 + 2 cases of one CT, CT and map, and 5 maps to tap.
    assert check_page(text) == 3 + text.count('class="stack square"') + 4 * (1 + 2 + 5)
    assert text.count('class="stack square"') == 18
    for heading in ("Training", "Scores", "Best cases of test", "Worst cases of test"):
        assert f"<h2>{heading}</h2>" in text
    for split, values in evaluated["splits"].items():
        assert f"<td>{split}</td><td>{values['auc']:.4g}</td>" in text
        assert f"<b>{values['auc']:.3f}</b> <span>AUC, split {split} (" in text
        assert f"on {split}: {values['labels_evaluated']} labels</summary>" in text
    assert text.count('id="mix"') == 1
    assert "trained on a generated CT phantom" in text and "not on patients" in text
    # Labels that a report does not mention are scored, but not called known.
    assert "scored labels" in text and "known labels" not in text and "scored as absent" in text


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
    every = {name: loss(name) for name, example in examples.items() if example.labels.any()}
    best = min(every, key=every.get)
    # The second is the best one of another patient with other labels.
    others = [
        every[name]
        for name, example in examples.items()
        if name in every
        and name[:6] != best[:6]
        and (example.labels != examples[best].labels).any()
    ]
    assert sorted(losses["best"]) == pytest.approx([every[best], min(others)], rel=1e-4)
    assert max(losses["worst"]) == pytest.approx(max(map(loss, examples)), rel=1e-4)
    assert min(losses["worst"]) > max(losses["best"])


def example(name, labels):
    return records.Example(name, None, np.array(labels, np.uint8), None, {})


@pytest.mark.parametrize(
    "names, labels, count, chosen",
    [
        # The first of each patient.
        (["000001_01_01_1#1", "000001_02_01_1#2", "000002_01_01_1#3"], [1, 2, 3], 2, [0, 2]),
        # Other labels before labels that were shown already, which fill up in their order.
        (["a:1", "b:1", "c:1"], [1, 1, 2], 2, [0, 2]),
        (["a:1", "b:1", "c:1"], [1, 1, 1], 2, [0, 1]),
        (["a:1", "b:1", "c:1"], [1, 1, 2], 3, [0, 1, 2]),
        # One series has one case.
        (["a:1", "a:2", "a:3"], [1, 2, 3], 3, [0]),
    ],
)
def test_cases_are_of_different_patients_and_labels(names, labels, count, chosen):
    source = [example(name, [label]) for name, label in zip(names, labels, strict=True)]
    assert report._varied(range(len(source)), source, count) == chosen


def test_a_curve_of_one_point_is_a_sentence(tmp_path):
    rows = [{"step": 5, "train/loss": 0.25, "val/auc": 0.5}, {"step": 9, "val/auc": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves, sentences = report._curves(tmp_path, 9)
    assert [alt for _, alt in curves] == ["validation AUC from 0.5 at step 5 to 0.75 at step 9"]
    assert len(sentences) == 1 and "0.25" in sentences[0] and "5" in sentences[0]


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


def test_perturbations_state_how_many_labels_there_are_and_on_how_few_series():
    result = {"model": "m", "strategy": "random", "images": 4, "groups": 2}
    result |= {"fall": (0.1, 0.0, 0.2), "stay": (0.9, 0.8, 1.0)}
    summary = {"top": 5, "labels": 7, "images": 4, "trained_on": "", "results": [result]}
    header, rows = perturb.table(summary)
    assert header[-1] == "share still in top 5 of 7" and rows[0][-1] == "0.900 (0.800 to 1.000)"
    lead = str(page.perturbation_lead(summary, header, rows, 4))
    assert lead.count("top 5 of 7") == 3  # the headline, the text and the table
    assert "the 2 patients or series" in lead and "fewer than 10 are unreliable" in lead


@pytest.mark.parametrize(
    "images, reached, where", [(1, 0, "1 of 1 image"), (3, 1, "2 of 3 images"), (3, 3, "")]
)
def test_images_without_a_label_at_its_threshold_are_counted(images, reached, where):
    lines = attribute.warnings({"images": images, "reached": reached, "flags": {}})
    assert [line.partition(" in ")[2] for line in lines] == [where] * bool(where)


def test_templates_escape_text_and_need_all_their_values():
    model = {"name": "<m>", "columns": [{"title": "<t>", "labels": [], "uri": "data:image/x"}]}
    card = page.perturbation_card("<i>", [model])
    summary = {"images": 2, "top": 5, "labels": 7, "results": [], "trained_on": "<o>", "flags": {}}
    lead = page.perturbation_lead(summary, ["<h>"], [["<c>"]], 1)
    text = page.document("<d>", lead, [card])
    for tag in ("<m>", "<t>", "<i>", "<d>", "<h>", "<c>", "<o>"):
        assert tag not in text and f"&lt;{tag[1]}&gt;" in text
    del model["columns"][0]["uri"]
    with pytest.raises(jinja2.UndefinedError, match="uri"):
        page.perturbation_card("<i>", [model])
