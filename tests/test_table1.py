"""Table 1: its numbers are those of `evaluate` and of the paper; resuming; rejected arguments."""

import csv
import os
import re
import signal

import pytest
import toy
from rich.markdown import Markdown

from benchmarks import harness
from benchmarks.experiments import paper_table, table1
from benchmarks.real_data import PAPER
from maknet_jax import evaluate, files
from maknet_jax.data import pipeline
from maknet_jax.errors import InputError, Stopped

STEPS = 10
SHORT = [f"epochs={STEPS * toy.BATCH / toy.TRAIN}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy data with the four splits of table 1: test is its val, hand its train."""
    out = toy.write(tmp_path_factory.mktemp("data") / "toy")
    info = files.read_json(out / "dataset.json")
    info["splits"] |= {"test": info["splits"]["val"], "hand": info["splits"]["train"]}
    files.write_json(out / "dataset.json", info)
    return out


@pytest.fixture(scope="module")
def config_names(data, tmp_path_factory):
    """Configs of three linear models instead of the paper's networks, which would take minutes."""
    folder = tmp_path_factory.mktemp("configs")
    stand_ins = {"vgg16": 4, "resnet18": 8, "maknet": 16}
    for name, edge in stand_ins.items():
        changes = toy.overrides(data, "linear", **{"model.options.edge": edge})
        text = "from maknet_jax.runs import config\n\n\ndef get_config():\n"
        text += f"    return config.load('linear', {changes})\n"
        (folder / f"{name}.py").write_text(text)
    return {name: str(folder / f"{name}.py") for name in stand_ins}


@pytest.fixture(scope="module")
def finished(data, config_names, tmp_path_factory):
    """(folder, result of table1) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "table1"
    return folder, table1.table1(
        folder, data=data, seed=3, overrides=SHORT, config_names=config_names
    )


def markdown_rows(path):
    """The cells of the table as rendered."""
    rows = []
    for token in Markdown(path.read_text()).parsed:
        if token.type == "table_close":
            return rows
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(token.content)


def test_the_papers_rows_match_its_text():
    if not PAPER.is_file():
        pytest.skip(f"the paper's text is not at {PAPER}")
    expected = {}
    for line in PAPER.read_text().partition("Table 1.")[2].partition("\n### ")[0].splitlines():
        title, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"[\d.]+M", "".join(numbers[:1])):
            expected[title] = [float(number.rstrip("M")) for number in numbers if number]
    ours = {
        "parameters": 0,
        "splits": {s: dict.fromkeys(paper_table.METRICS, 0) for s in paper_table.SETS},
    }
    rows = table1.table_rows(dict.fromkeys(table1.TITLES, ours))
    printed = {row[0]: [row[2] / 1e6, *row[3:]] for row in rows if row[1] == "paper"}
    assert printed == expected
    assert list(printed) == list(expected)  # in the same order


def test_the_table_has_the_numbers_of_evaluate(finished):
    folder, result = finished
    with (folder / "table1.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row[""], row["from"]) for row in rows] == [
        (title, source) for title in ("VGG16", "ResNet18", "MAKNet") for source in ("ours", "paper")
    ]
    for row, name in zip(rows[::2], ("vgg16", "resnet18", "maknet"), strict=True):
        evaluated = evaluate.evaluate(folder / name)["splits"]
        assert evaluated["test"]["auc"] != evaluated["hand"]["auc"]
        assert result["networks"][name]["splits"] == evaluated
        for split, metric, column in (
            ("test", "auc", "test AUC"),
            ("test", "f1", "test F1"),
            ("test", "precision", "test precision"),
            ("test", "recall", "test recall"),
            ("hand", "auc", "hand AUC"),
            ("hand", "f1", "hand F1"),
            ("hand", "precision", "hand precision"),
            ("hand", "recall", "hand recall"),
        ):
            assert float(row[column]) == evaluated[split][metric], column
        trained = files.read_json(folder / name / "summary.json")
        assert int(row["parameters"]) == trained["parameters"]
    counts = {int(row["parameters"]) for row in rows[::2]}
    assert len(counts) == 3  # three different networks


def test_markdown_renders_as_one_table_with_its_settings(finished, data):
    folder, result = finished
    rows = markdown_rows(folder / "table1.md")
    assert [len(row) for row in rows] == [11] * 7
    assert rows[0] == table1.HEADER
    for (_, _, count, *numbers), row in zip(
        table1.table_rows(result["networks"]), rows[1:], strict=True
    ):
        assert row[2] == f"{count / 1e6:.2f} M"
        assert [float(cell) for cell in row[3:]] == pytest.approx(numbers, abs=5e-5)
    text = (folder / "table1.md").read_text()
    fingerprint = files.read_json(data / "dataset.json")["fingerprint"]
    for value in (
        fingerprint[:16],
        "seed 3",
        "2 epochs",
        f"changed: {SHORT[0]}",
        "train 40, val 13",
        "train 17,697",
        "8 x cpu",
    ):
        assert value in text
    assert "FORM" not in text  # the notes of the small forms


def test_the_phantom_of_another_seed_is_rejected(tmp_path):
    (tmp_path / "phantom").mkdir()
    arguments = {"seed": 0, **table1.FORMS["quick"][0]}
    files.write_json(tmp_path / "phantom" / "phantom.json", {"arguments": arguments, "counts": {}})
    (tmp_path / "shards").mkdir()
    files.write_json(tmp_path / "shards" / "dataset.json", {})
    with pytest.raises(InputError, match="seed 0, not 5"):
        table1.table1(tmp_path, form="quick", seed=5)


def test_an_undefined_metric_is_a_dash(finished, tmp_path):
    networks = finished[1]["networks"]
    unknown = {
        "test": dict.fromkeys(paper_table.METRICS),
        "hand": dict.fromkeys(paper_table.METRICS),
    }
    networks = networks | {"vgg16": networks["vgg16"] | {"splits": unknown}}
    table1.write(tmp_path, finished[1] | {"networks": networks})
    assert markdown_rows(tmp_path / "table1.md")[1][3:] == ["-"] * 8


def test_json_has_the_data_the_seed_and_the_device(finished, data):
    folder, result = finished
    assert files.read_json(folder / "table1.json") == result
    info = files.read_json(data / "dataset.json")
    assert result["data"]["fingerprint"] == info["fingerprint"]
    assert result["data"]["images"] == {"train": 40, "val": 13, "test": 13, "hand": 40}
    assert (result["form"], result["seed"], result["overrides"]) == ("full", 3, SHORT)
    assert result["device"]["platform"] == "cpu"
    assert files.read_json(folder / "vgg16" / "config.json")["seed"] == 3


def test_a_run_stopped_in_the_second_network_resumes(
    finished, data, config_names, tmp_path, monkeypatch
):
    def batches(*args, **kwargs):
        for batch in original(*args, **kwargs):
            consumed.append(1)
            if len(consumed) == STEPS + 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    consumed, original = [], pipeline.train_batches
    arguments = {"data": data, "seed": 3, "overrides": SHORT, "config_names": config_names}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", batches)
        with pytest.raises(Stopped, match=f"step 4 of {STEPS}"):
            table1.table1(tmp_path / "run", **arguments)
    assert not list((tmp_path / "run").glob("table1.*"))
    summary = (tmp_path / "run" / "vgg16" / "summary.json").stat()
    result = table1.table1(tmp_path / "run", **arguments)
    assert (tmp_path / "run" / "vgg16" / "summary.json").stat() == summary  # not trained again
    for name, whole in finished[1]["networks"].items():
        for key in ("parameters", "checkpoint_step", "splits"):
            assert result["networks"][name][key] == whole[key]


def test_another_recipe_in_the_same_folder_is_rejected(finished, data, config_names):
    with pytest.raises(InputError, match="with .*epochs "):
        table1.table1(finished[0], data=data, seed=3, config_names=config_names)


def test_small_forms_generate_their_data(config_names, tmp_path):
    changes = ["epochs=1", "evaluate_every=1"]
    arguments = {"form": "quick", "seed": 5, "overrides": changes, "config_names": config_names}
    result = table1.table1(tmp_path / "run", **arguments)
    assert files.read_json(tmp_path / "run" / "phantom" / "phantom.json")["arguments"]["seed"] == 5
    text = (tmp_path / "run" / "table1.md").read_text()
    assert "QUICK FORM" in text and "32 x 32" in text
    assert table1.table1(tmp_path / "run", **arguments)["data"] == result["data"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], "--data --small --quick"),
        (["--small", "--quick"], "--quick"),
        (["--small", "--seed=-1"], "--seed -1"),
        (["--small", "--config.seed=1"], "use --seed"),
        (["--data=x", "--config.data.path=y"], "use --data"),
        (["--small", "--config.model.name=linear"], "'--config.model.name=linear'"),
        (["--small", "--epochs=3"], "'--epochs=3'"),
        (["--small", "--config.epochs"], "'--config.epochs'"),
        (["--small", "--config.epoch=3"], "'epochs'"),
        (["--small", "--config.model.options.stem=8"], "'model.options.stem'"),
        (["--data=nothing"], "nothing"),
    ],
)
def test_bad_arguments_are_rejected_before_anything_is_written(arguments, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        harness.run(lambda: table1.main([*arguments, f"--workdir={tmp_path / 'run'}"]))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert value in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_without_hand_labels_are_rejected_before_training(config_names, tmp_path):
    bare = toy.write(tmp_path / "toy")
    with pytest.raises(InputError, match="'test'"):
        table1.table1(tmp_path / "run", data=bare, config_names=config_names)
    info = files.read_json(bare / "dataset.json")
    info["splits"] |= {"test": info["splits"]["val"]}
    info["splits"]["hand"] = {"count": 0, "label_counts": [0] * 4, "shards": []}
    files.write_json(bare / "dataset.json", info)
    with pytest.raises(InputError, match="'hand': 0"):
        table1.table1(tmp_path / "run", data=bare, config_names=config_names)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # compiles the three networks in full width
def test_the_three_recipes_differ_only_in_the_model(tmp_path):
    table1.main(["--quick", f"--workdir={tmp_path / 'run'}"])
    recipes = []
    for name, paper in (("vgg16", 14.78), ("resnet18", 11.25), ("maknet", 4.50)):
        recipe = files.read_json(tmp_path / "run" / name / "config.json")
        assert recipe.pop("model")["name"] == name
        recipes.append(recipe)
        count = files.read_json(tmp_path / "run" / "table1.json")["networks"][name]["parameters"]
        assert 0.97 < count / (paper * 1e6) <= 1.001  # fewer labels than the paper's
    assert recipes[0] == recipes[1] == recipes[2]
