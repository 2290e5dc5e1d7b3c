"""Table 3: its numbers are those of `evaluate` and of the paper; rejected arguments."""

import csv
import re

import lesion_runs
import pytest
import toy

from benchmarks.experiments import paper_table, table3
from benchmarks.real_data import PAPER
from maknet_jax import files
from maknet_jax.errors import InputError


def splits(start):
    values = [start + k / 100 for k in range(4)]
    return {name: dict(zip(paper_table.METRICS, values, strict=True)) for name in paper_table.SETS}


def test_rows_are_means_over_seeds_and_the_papers():
    runs = {"random": [splits(0.1), splits(0.3)], "tcia": [splits(0.5)]}
    runs["random"][0]["hand"]["auc"] = None  # undefined without positives
    rows = table3.table_rows(runs)
    assert [row[:3] for row in rows] == [
        ["LesaNet (random)", "ours", 2],
        ["LesaNet (tcia)", "ours", 1],
        ["LesaNet (tcia)", "paper", 1],
    ]
    assert rows[0][3:7] == pytest.approx([0.2, 0.21, 0.22, 0.23])
    assert rows[0][7] is None and rows[0][8:] == pytest.approx([0.21, 0.22, 0.23])
    assert rows[2][3:] == [0.9331, 0.3569, 0.3045, 0.6669, 0.9403, 0.4972, 0.4754, 0.7531]
    assert all(len(row) == len(table3.HEADER) for row in rows)


@pytest.mark.skipif(not PAPER.exists(), reason=f"the paper's text is not at {PAPER}")
def test_the_papers_rows_match_its_text():
    text = PAPER.read_text()
    for name, title in (("imagenet", "ImageNet"), ("tcia", "TCIA")):
        (line,) = re.findall(rf"^.*LesaNet \({title}\).*$", text, re.M)
        numbers = tuple(float(value) for value in re.findall(r"0\.\d{4}", line))
        assert numbers == (*table3.PAPER[name]["test"], *table3.PAPER[name]["hand"])


@pytest.mark.slow
def test_table_of_two_seeds_on_a_phantom(phantom, tmp_path):
    data = lesion_runs.write(phantom, tmp_path / "data", 32)
    changes = ["epochs=1", "data.batch_size=8"]
    trunk = ("maknet", lesion_runs.TRUNK)
    result = table3.table3(
        tmp_path / "out",
        data,
        {"random": ""},
        seeds=2,
        overrides=changes,
        trunk=trunk,
        notes=["a note"],
    )
    assert len(result["runs"]["random"]) == 2
    with (tmp_path / "out" / "table3.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == table3.HEADER and len(rows) == 2
    mean = sum(each["test"]["auc"] for each in result["runs"]["random"]) / 2
    assert float(rows[1][3]) == pytest.approx(mean)
    assert "a note." in (tmp_path / "out" / "table3.md").read_text()
    assert files.read_json(tmp_path / "out" / "table3.json")["overrides"] == changes


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--data=x"], "--init NAME=PATH"),
        (["--quick", "--init=a=b"], "--init NAME=PATH"),
        (["--data=x", "--init=imagenet"], "--init 'imagenet'"),
        (["--data=x", "--init=imagenet="], "--init 'imagenet='"),
        (["--data=x", "--init=random=y"], "--init 'random=y'"),
        (["--data=x", "--init=tcia=a", "--init=tcia=b"], "'tcia'"),
        (["--data=x", "--init=random=", "--config.seed=3"], "use --seeds"),
        (["--data=x", "--init=random=", "--config.init.path=y"], "use --init"),
        (["--quick", "--config.model.options.trunk=vgg16"], "'--config.model.options.trunk=vgg16'"),
        (["--quick", "--config.model.options.trunk_options.stem=8"], "trunk_options.stem=8'"),
    ],
)
def test_bad_arguments_are_rejected_before_anything_is_written(arguments, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        table3.main([*arguments, f"--workdir={tmp_path / 'run'}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert value in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_without_a_split_are_rejected(tmp_path):
    data = toy.write(tmp_path / "toy")
    with pytest.raises(InputError, match="'test'"):
        table3.table3(tmp_path / "out", data, {"random": ""})


def test_metrics_follow_lesanets_rules(tmp_path, monkeypatch):
    data = toy.write(tmp_path / "toy")
    info = files.read_json(data / "dataset.json")
    info["splits"] |= {"test": info["splits"]["val"], "hand": info["splits"]["val"]}
    files.write_json(data / "dataset.json", info)
    rules = []

    def evaluated(folder, **options):
        rules.append(options["rules"])
        return {"splits": splits(0.1)}

    monkeypatch.setattr(table3.train, "train", lambda *_: None)
    monkeypatch.setattr(table3.evaluate, "evaluate", evaluated)
    table3.table3(tmp_path / "out", data, {"random": ""}, seeds=2)
    assert rules == ["lesanet", "lesanet"]
