"""The benchmarks on small inputs: counts, results and rejected arguments."""

import json
import os
import pathlib
import signal
import statistics
import sys
import time

import jax
import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless

from benchmarks import harness, timing
from benchmarks.experiments import organs
from benchmarks.speed import (
    against_captum,
    against_pytorch,
    augmentation,
    input_pipeline,
    lesanet_against_pytorch,
    makconv,
    networks,
    preparation,
    startup,
    torch_worker,
)
from maknet_jax.data import records
from maknet_jax.errors import InputError, Stopped
from maknet_jax.models import layers

CONFIG = """from maknet_jax.runs import config

def get_config():
    return config.load("smoke", ["model.options.stem=8", "model.options.blocks=(1,)",
                                 "model.options.growth_rates=(8,)", "model.options.widths=(8,)"])
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of the config of a very narrow MAKNet."""
    path = tmp_path_factory.mktemp("config") / "maknet.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def network(config):
    """The network of `config`."""
    return harness.Network(config, size=32, batch_size=8, precision="float32")


def run(main, out, *argv, repeats=("--repeats", "2")):
    """Runs a benchmark and returns its JSON. Batches of 8, because the tests have 8 devices."""
    main(["--size", "32", *repeats, "--out", str(out), *argv])
    written = json.loads(out.read_text())
    keys = {"benchmark", "device", "versions", "date", "command", "settings", "rows"}
    assert keys <= written.keys() and written["rows"]
    assert written["versions"]["jax"] == jax.__version__
    path = f"{main.__module__.replace('.', '/')}.py"
    assert written["command"].startswith(f"python {path} --size 32")
    assert written["device"]["name"] and written["device"]["count"] == jax.device_count()
    return written


def test_timers_return_seconds_per_call_and_take_turns():
    requested, order = [], []

    def step(calls):
        requested.append(calls)
        return 0.25 * calls

    measure = timing.timer(step, at_least=1.0)
    assert (measure(), requested) == (0.25, [1, 1, 4])
    timers = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    seconds = timing.take_turns(timers, 2)
    assert order == ["a", "b", "a", "b"] and seconds == {"a": [1, 3], "b": [2, 4]}
    assert timing.ratios(seconds["b"], seconds["a"]) == {
        "median": statistics.median([2, 4 / 3]),
        "low": 4 / 3,
        "high": 2,
    }


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("config nowhere"), 2, "config nowhere"),
        (Stopped("SIGTERM"), 75, "stopped: SIGTERM"),
        (FileNotFoundError(2, "No such file", "labels.csv"), 2, "labels.csv: No such file"),
    ],
)
def test_errors_are_one_line_with_the_exit_codes_of_maknet(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        harness.run(main)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err == f"tests/test_benchmarks.py: {message}\n"  # where main is defined


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (3, 3)])
def test_the_returned_code_is_the_exit_code(returned, code):
    with pytest.raises(SystemExit) as stop:
        harness.run(lambda: returned)
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs", "SIGTERM; run the same command to resume"),
        (None, "nothing was saved: pass --workdir to be able to resume"),
    ],
)
def test_a_signal_stops_a_benchmark(name, message, tmp_path, capsys):
    folders = []

    def main():
        with harness.run_folder(name and tmp_path / name) as folder:
            folders.append(folder)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        harness.run(main)
    assert stop.value.code == 75
    assert capsys.readouterr().err.endswith(f": stopped: {message}\n")
    assert name or not folders[0].exists()  # the temporary folder is removed


def test_networks_reports_rates_and_skips_what_exceeds_the_budget(config, tmp_path, capsys):
    argv = ["--networks", config, "--precision", "float32", "--batches", "8,10000000000"]
    written = run(networks.main, tmp_path / "out.json", *argv)
    predict, train, *skipped = written["rows"]
    assert (predict["step"], train["step"], train["batch"]) == ("predict", "train", 8)
    for row in (predict, train):
        median = statistics.median(8 / seconds for seconds in row["seconds"])
        assert row["images_per_second"]["median"] == pytest.approx(median)
        assert row["first_is_faster"]["low"] == row["first_is_faster"]["high"] == 1
    assert written["matmul_flops_per_second"]["float32"] > 1e8
    assert all(row["skipped_seconds_a_step"] > 600 and "seconds" not in row for row in skipped)
    assert len(skipped) == 2
    assert written["device"]["name"] in capsys.readouterr().out


def test_the_matmul_peak_is_that_of_all_devices(config, tmp_path, monkeypatch):
    """The product runs on one device, the steps on eight."""
    monkeypatch.setattr(timing, "matmul", lambda precision: (lambda: time.sleep(0.02), 1e9))
    argv = ["--networks", config, "--precision", "float32", "--batches", "8"]
    written = run(networks.main, tmp_path / "out.json", *argv)
    assert 8 * 1e9 / 0.1 < written["matmul_flops_per_second"]["float32"] <= 8 * 1e9 / 0.02


def test_the_timed_step_trains_with_a_donated_state(config, network):
    def kernel():
        return network.state.params["stem"]["conv"]["kernel"]

    before = network.state
    first = np.asarray(kernel() + 0)  # a copy: a buffer with views cannot be donated
    step = int(network.state.step)
    assert np.isfinite(network.train()["loss"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert int(network.state.step) == step + 1
    assert (np.asarray(kernel()) != first).any()
    assert network.predict().shape == (8, harness.LABELS)
    with pytest.raises(InputError, match="batch 9 .* 8 devices"):
        harness.Network(config, size=32, batch_size=9, precision="float32")


@pytest.mark.parametrize("option", ["--config", "--page"])
def test_makconv_accepts_the_old_name_of_its_option(option, monkeypatch):
    monkeypatch.setattr(makconv, "places", lambda *_: iter(()))
    chosen = []
    monkeypatch.setattr(harness, "report", lambda file, argv, options, *_: chosen.append(options))
    makconv.main(["--quick", option, "smoke"])
    makconv.main(["--quick"])
    assert [options.page for options in chosen] == ["smoke", "maknet"]


def test_makconv_counts_flops_and_times_all_forms(config, tmp_path):
    argv = ["--config", config, "--batch", "2", "--precision", "float32"]
    written = run(makconv.main, tmp_path / "out.json", *argv)
    blocks = [row for row in written["rows"] if row["what"].startswith("dense block")]
    assert len(blocks) == 2 * len(layers.FORMS)
    rows = {(row["what"], row["pass"]): row for row in written["rows"]}
    for step in ("forward", "gradient"):
        full, split, fused = (
            rows[operation, step]["flops"]
            for operation in ("full 3 x 3", "MAKConv split", "MAKConv fused")
        )
        assert fused == pytest.approx(full, rel=0.01)
        # 9 + 3 + 3 + 1 of 4 x 9 taps. Taps in the padding do not count: the 3 x 3 kernel has most.
        assert 16 / 36 < split / full < 0.5
        assert rows["full 3 x 3", step]["faster"]["median"] == 1
        assert rows[makconv.VGG, step]["faster_than_vgg16"]["median"] == 1
        assert rows["dense block split", step]["bytes"] > 0
    # The output and the gradients of weights and input.
    costs = [rows["full 3 x 3", step]["flops"] for step in ("forward", "gradient")]
    assert costs[1] / costs[0] == pytest.approx(3, rel=0.01)
    with pytest.raises(InputError, match="--parts block"):
        makconv.main(["--parts", "block"])
    with pytest.raises(InputError, match="--config 'vgg16'"):
        makconv.main(["--config", "vgg16"])


@pytest.mark.parametrize(
    ("python", "reason"),
    [("/nowhere/python", "No such file"), (sys.executable, "No module named")],
)
def test_a_python_without_torch_is_rejected(tmp_path, capsys, monkeypatch, python, reason):
    stand_in = tmp_path / "worker.py"
    stand_in.write_text("import no_such_torch")
    monkeypatch.setattr(torch_worker, "NETWORKS", stand_in)
    monkeypatch.setattr(sys, "argv", ["against_pytorch.py"])
    with pytest.raises(SystemExit) as stop:
        harness.run(lambda: against_pytorch.main(["--torch-python", python]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert f"--torch-python {python}: " in err and reason in err


def test_reading_is_compared_with_pydicom(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "EDGE", 32)
    folder = preparation.write_data(tmp_path / "data", 2, 3, compressed=True)
    paths = sorted(folder.rglob("*.dcm"))
    assert len(paths) == 6
    assert {pydicom.dcmread(path).file_meta.TransferSyntaxUID for path in paths} == {
        JPEG2000Lossless
    }
    ratios = preparation.reading(folder, 2)
    assert len(ratios) == 2 and all(ratio > 0 for ratio in ratios)


def test_the_worker_imports_from_this_checkout(tmp_path, monkeypatch):
    """The Python with torch need not have this repository on its path."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "worker.py"
    script.write_text("import json, benchmarks.speed as s; print(json.dumps({'file': s.__file__}))")
    with torch_worker.Worker(sys.executable, script) as worker:
        speed = pathlib.Path(torch_worker.__file__).parent
        assert pathlib.Path(worker.versions["file"]).parent == speed


class Echo(torch_worker.Worker):
    """Stands in for PyTorch: the results of JAX, scaled by `factor`."""

    def __init__(self, network, **factor):
        self.network, self.factor = network, factor
        self.requests = []

    def ask(self, **request):
        self.requests.append(request)
        if "load" in request:
            with np.load(request["load"]) as arrays:
                self.arrays = set(arrays)
            return {}
        network, step = self.network, request["step"]
        result = np.asarray(network.predict()) if step == "predict" else network.last_loss
        return {"result": result * self.factor.get(step, 1.0)}


def test_networks_that_disagree_are_not_timed(network, monkeypatch):
    def train(original=network.train):
        metrics = original()
        network.last_loss = float(metrics["loss"])
        return metrics

    monkeypatch.setattr(network, "train", train)
    echo = Echo(network)
    assert against_pytorch.compare("maknet", network, echo) == {
        "logits_differ": 0,
        "first_loss_differs": 0,
    }
    assert {"weights/spl/dense/kernel", "batch/image", "batch/pos_weight"} < echo.arrays
    assert echo.requests[0]["model"] == "maknet"
    with pytest.raises(
        InputError, match=r"maknet: .*\(logits_differ\) is 0.002, .* nothing was timed"
    ):
        against_pytorch.compare("maknet", network, Echo(network, predict=1.002))
    with pytest.raises(InputError, match=r"maknet: .*\(first_loss_differs\) is 0.002"):
        against_pytorch.compare("maknet", network, Echo(network, train=1.002))


@pytest.fixture
def torch_python():
    python = os.environ.get("MAKNET_TORCH_PYTHON")
    if not python:
        pytest.skip("set MAKNET_TORCH_PYTHON to a Python with torch and captum")
    return python


def test_networks_agree_with_torch(config, torch_python, tmp_path):
    argv = ["--torch-python", torch_python, "--networks", config, "--batch", "8"]
    written = run(against_pytorch.main, tmp_path / "out.json", *argv)
    assert [row["step"] for row in written["rows"]] == ["train", "predict"]
    for row in written["rows"]:
        assert row["logits_differ"] < 1e-5 and row["first_loss_differs"] < 1e-5
        assert len(row["seconds"]["jax"]) == len(row["seconds"]["torch"]) == 2
    assert written["maknet_over_vgg16"] is None and written["torch"]["threads"] >= 1


def test_attribution_agrees_with_captum(config, torch_python, tmp_path):
    argv = ["--torch-python", torch_python, "--networks", config, "--steps", "4"]
    written = run(against_captum.main, tmp_path / "out.json", *argv)
    (row,) = written["rows"].values()
    assert set(row["differences"]) == {"gauss", "midpoint"}
    assert max(values["p99"] for values in row["differences"].values()) < 1e-4
    assert {"one", "several", "of_the_bare_gradient"} <= row.keys()


def test_lesanet_agrees_with_torch(torch_python, tmp_path):
    argv = ["--torch-python", torch_python, "--batch", "8"]
    written = run(lesanet_against_pytorch.main, tmp_path / "out.json", *argv)
    assert [row["step"] for row in written["rows"]] == ["train", "predict"]
    assert max(written["differences"].values()) < 1e-4


def test_augmentation_is_a_share_of_the_step(config, tmp_path):
    argv = ("--batch", "8", "--network", config)
    written = run(augmentation.main, tmp_path / "augment.json", *argv)
    step, gather, shear = written["rows"]
    assert step["what"] == "training step"
    for row in (gather, shear):
        low, high = (
            row["ms_per_image"][one] / (row["ms_per_image"][one] + step["ms_per_image"][other])
            for one, other in (("low", "high"), ("high", "low"))
        )
        assert low * 0.999 <= row["share_of_step"]["median"] <= high * 1.001
    with pytest.raises(InputError, match="--network student "):
        augmentation.main(["--quick", "--batch", "8", "--network", "student"])


def test_repeated_shards_hold_at_least_the_requested_records(shards, tmp_path):
    source = records.open_dataset(shards.path)
    period = source.split("train")["count"]
    repeated = input_pipeline.repeat_shards(shards.path, tmp_path / "many", "train", 2 * period + 1)
    examples = repeated.source("train")
    assert len(examples) == repeated.split("train")["count"] > 2 * period
    first = source.source("train")[0]
    assert examples[period].id == first.id
    np.testing.assert_array_equal(examples[period].image, first.image)


@pytest.mark.slow
def test_a_warm_start_compiles_less_and_a_restart_runs_the_second_step(config, tmp_path):
    argv = ["--quick", "--config", config, "--size", "32", "--repeats", "1"]
    written = run(startup.main, tmp_path / "out.json", *argv)
    [cold], [warm], [restarted] = (row["starts"] for row in written["rows"])
    assert warm["longest"] < cold["longest"] / 2
    assert restarted["longest"] < cold["longest"] / 2
    assert (cold["stopped"], warm["stopped"], restarted["stopped"]) == (True, True, False)


def test_organs_trains_on_a_phantom_and_measures(tmp_path):
    argv = [
        "--folder",
        str(tmp_path / "organs"),
        "--patients",
        "8",
        "--epochs",
        "1",
        "--size",
        "32",
    ]
    argv += ["--least", "0", "--images", "2", "--steps", "2"]
    written = run(organs.main, tmp_path / "out.json", *argv, repeats=())
    assert sum(label["maps"] for label in written["rows"]) >= 2
    for label in written["rows"]:
        assert 0 < label["chance"] <= 1
        assert 0 <= label["inside"] <= 1
        assert 1 <= label["patients"] <= label["maps"]
    inside = written["results"]["mass inside the organ"]
    assert inside["difference"][0] == pytest.approx(inside["map"][0] - inside["random"][0])
    arguments = json.loads((tmp_path / "organs" / "phantom" / "phantom.json").read_text())[
        "arguments"
    ]
    assert arguments["absent"] == 0.5
    with pytest.raises(InputError, match="--workdir and --masks"):
        organs.main(["--workdir", str(tmp_path / "organs" / "run")])
    with pytest.raises(InputError, match="--patients 9"):
        organs.main(["--workdir", "run", "--masks", "masks", "--patients", "9"])
    with pytest.raises(InputError, match="patients 8, not 9"):
        organs.main(["--folder", str(tmp_path / "organs"), "--patients", "9"])
