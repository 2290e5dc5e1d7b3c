"""`maknet models`: known sizes and FLOPs of published networks, and the command."""

import json
import pathlib
import re

import pytest

from maknet_jax import cli, model_table
from maknet_jax.errors import InputError
from maknet_jax.runs import released


def total(name, column, **sizes):
    return sum(row[column] for row in model_table.measure(name, **sizes))


@pytest.mark.parametrize(
    "name, parameters", [("maknet", 4_501_398), ("vgg16", 14_777_907), ("resnet18", 11_248_847)]
)
def test_parameters_are_those_of_table_1(name, parameters):
    assert total(name, 1) == parameters
    assert round(parameters / 1e6, 2) == model_table.PAPER_MILLIONS[name]


@pytest.mark.parametrize("name, giga_mac", [("vgg16", 15.347), ("resnet18", 1.814)])
def test_flops_are_the_published_ones(name, giga_mac):
    """G multiply-adds at 224 x 224: 15.347 (convolutions), 1.814 (with the head of 1,000)."""
    assert total(name, 2, size=224) / 2e9 == pytest.approx(giga_mac, rel=2e-3)


def test_flops_and_bytes_of_one_layer_by_hand():
    rows = {part: row for part, *row in model_table.measure("resnet18", size=64, num_classes=5)}
    # 7 x 7 over 3 channels with stride 2: 64 x 64 -> 32 x 32 of 64 channels.
    assert rows["stem"] == [
        7 * 7 * 3 * 64 + 2 * 64,
        2 * 32 * 32 * 64 * 7 * 7 * 3,
        4 * (64 * 64 * 3 + 32 * 32 * 64 + 7 * 7 * 3 * 64),
    ]
    assert rows["spl"] == [5 * 5 + 5, 2 * 5 * 5, 4 * (5 + 5 + 25)]


def test_flops_of_a_block_of_maknet_by_hand():
    """The third block at 16 x 16: six MAKConvs of 112 outputs, to 256 channels, CBAM."""
    inputs = [128 + 112 * layer for layer in range(6)]
    makconvs = sum(28 * (9 + 3 + 3 + 1) * channels for channels in inputs)
    transition, places = (128 + 6 * 112) * 256, 7 * 7 * 2
    flops = 2 * 16 * 16 * (makconvs + transition + places)
    mlp = 2 * 2 * (256 * 16 + 16 * 256)  # of the average and of the maximum
    rows = {part: row for part, *row in model_table.measure("maknet")}
    assert rows["block_2"][1] == flops + mlp


def test_flops_grow_with_the_area_and_parameters_do_not():
    small, large = (total("maknet", 2, size=size) for size in (128, 256))
    assert 3.9 < large / small <= 4
    assert total("maknet", 1, size=128) == total("maknet", 1, size=256)


def test_the_command_prints_the_paper_column_and_writes_json(capsys, tmp_path):
    out = tmp_path / "models.json"
    assert cli.main(["models", "maknet", "--size", "64", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4.50 M" in printed and "vgg16" not in printed
    written = json.loads(out.read_text())
    rows = written["networks"]["maknet"]
    assert rows[-1]["parameters"] == 4_501_398 == sum(row["parameters"] for row in rows[:-1])
    with pytest.raises(InputError, match="'alexnet'.* maknet, vgg16, resnet18"):
        model_table.measure("alexnet")


def test_the_speed_benchmarks_that_the_table_names_exist():
    speed = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "speed"
    names = re.findall(r"(\w+\.py)", model_table.SPEED)
    assert len(names) == 4 and all((speed / name).is_file() for name in names)
    assert model_table.SPEED in model_table.model_table(["resnet18"], size=32)[0].splitlines()


def test_the_released_models_are_listed():
    (listed,) = released.describe()
    assert listed[:4] == ("head-neck", "maknet", 128, "OpenKBP: head, neck, upper chest")
    assert len(listed.labels) == 7 and "larynx" in listed.labels
    title, model, labels, *_ = model_table.model_table(["resnet18"], size=32)[0].splitlines()
    assert "--model NAME" in title and model.split()[:2] == ["head-neck:", "maknet,"]
    assert labels.endswith(", ".join(listed.labels))  # first, not behind the tables
