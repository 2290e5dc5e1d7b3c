"""The benchmarks in small: what they count, what they write, what they refuse."""

import json
import os
import signal
import statistics
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks import harness
from benchmarks.experiments import organs
from benchmarks.speed import against_captum as attribution
from benchmarks.speed import against_pytorch, makconv, networks, startup
from benchmarks.speed import augmentation as augment
from benchmarks.speed import lesanet_against_pytorch as lesanet
from maknet_jax.errors import InputError, Stopped
from maknet_jax.models import layers

PAGE = """from maknet_jax.runs import config

def get_config():
    return config.load("smoke", ["model.options.stem=8", "model.options.blocks=(1,)",
                                 "model.options.growth_rates=(8,)", "model.options.widths=(8,)"])
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A very narrow MAKNet."""
    path = tmp_path_factory.mktemp("page") / "maknet.py"
    path.write_text(PAGE)
    return str(path)


@pytest.fixture(scope="module")
def network(page):
    """The network of that page."""
    return harness.Network(page, size=32, batch_size=8, precision="float32")


def run(main, out, *argv):
    """What a benchmark writes; eight images, because the tests have eight devices."""
    main(["--size", "32", "--repeats", "2", "--out", str(out), *argv])
    written = json.loads(out.read_text())
    keys = {"benchmark", "device", "versions", "date", "command", "settings", "rows"}
    assert keys <= written.keys() and written["rows"]
    assert written["versions"]["jax"] == jax.__version__
    path = f"{main.__module__.replace('.', '/')}.py"
    assert written["command"].startswith(f"python {path} --size 32")
    assert written["device"]["name"] and written["device"]["count"] == jax.device_count()
    return written


def test_turns_alternate_and_a_timer_gives_seconds_per_call():
    asked, order = [], []

    def step(calls):
        asked.append(calls)
        return 0.25 * calls

    measure = harness.timer(step, at_least=1.0)
    assert (measure(), asked) == (0.25, [1, 1, 4])
    timers = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    seconds = harness.take_turns(timers, 2)
    assert order == ["a", "b", "a", "b"] and seconds == {"a": [1, 3], "b": [2, 4]}
    assert harness.ratios(seconds["b"], seconds["a"]) == {
        "median": statistics.median([2, 4 / 3]),
        "low": 4 / 3,
        "high": 2,
    }


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such page"), 2, "no such page"),
        (Stopped("SIGTERM; run it again"), 75, "stopped: SIGTERM; run it again"),
        (FileNotFoundError(2, "No such file", "labels.csv"), 2, "labels.csv: No such file"),
    ],
)
def test_errors_of_a_benchmark_are_one_line_and_exit_codes_of_maknet(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        harness.run(main)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.startswith("benchmarks/") and err.endswith(f": {said}\n") and err.count("\n") == 1


@pytest.mark.parametrize(("given", "code"), [(None, 0), (3, 3)])
def test_a_benchmark_that_ends_gives_its_own_code(given, code):
    with pytest.raises(SystemExit) as stop:
        harness.run(lambda: given)
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("kept", "SIGTERM; run the same command again to resume"),
        (None, "nothing is kept without --workdir: begin again"),
    ],
)
def test_a_signal_stops_a_benchmark_wherever_it_is(folder, said, tmp_path, capsys):
    seen = []

    def main():
        with harness.kept(folder and tmp_path / folder) as kept:
            seen.append(kept)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        harness.run(main)
    assert stop.value.code == 75
    assert capsys.readouterr().err.endswith(f": stopped: {said}\n")
    assert folder or not seen[0].exists()


def test_networks(page, tmp_path, capsys):
    argv = ["--networks", page, "--precision", "float32", "--batches", "8,10000000"]
    written = run(networks.main, tmp_path / "out.json", *argv)
    predict, train, *left_out = written["rows"]
    assert (predict["step"], train["step"], train["batch"]) == ("predict", "train", 8)
    for row in (predict, train):
        median = statistics.median(8 / seconds for seconds in row["seconds"])
        assert row["images_per_second"]["median"] == pytest.approx(median)
        assert row["first_is_faster"]["low"] == row["first_is_faster"]["high"] == 1
    assert written["matmul_flops_per_second"]["float32"] > 1e8
    assert all(row["skipped_seconds_a_step"] > 600 and "seconds" not in row for row in left_out)
    printed = capsys.readouterr().out
    assert written["device"]["name"] in printed and printed.count("left out: about") == 2


def test_the_peak_is_that_of_all_devices(page, tmp_path, monkeypatch):
    """The product runs on one of them, the steps on eight."""
    monkeypatch.setattr(harness, "matmul", lambda precision: (lambda: time.sleep(0.02), 1e9))
    argv = ["--networks", page, "--precision", "float32", "--batches", "8"]
    written = run(networks.main, tmp_path / "out.json", *argv)
    assert 8 * 1e9 / 0.1 < written["matmul_flops_per_second"]["float32"] <= 8 * 1e9 / 0.02


@pytest.mark.parametrize(
    "argv, extent, file",
    [
        ([], "full", "some-here.json"),
        (["--size", "256"], "full", "some-here.json"),
        (["--size", "128"], "partial", "some-partial-here.json"),
        (["--quick", "--size", "64"], "quick", "some-quick-here.json"),
    ],
)
def test_only_full_results_go_in_their_place(argv, extent, file, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "device", lambda: {"name": "Here"})
    parser = harness.parser("some.py", "")
    chosen = harness.parse(parser, argv, full={"size": 256, "repeats": 1}, quick={"size": 32})
    harness.report("some.py", argv, chosen, ["a"], [["b"]], [], {})
    assert json.loads((tmp_path / file).read_text())["settings"]["extent"] == extent


def test_the_timed_step_trains_on_a_donated_state(page, network):
    def kernel():
        return network.state.params["stem"]["conv"]["kernel"]

    before = network.state
    first = np.asarray(kernel() + 0)  # a view of the buffer itself could not be donated
    step = int(network.state.step)
    assert np.isfinite(network.train()["loss"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert int(network.state.step) == step + 1
    assert (np.asarray(kernel()) != first).any()
    assert network.predict().shape == (8, harness.LABELS)
    with pytest.raises(InputError, match="batch 9 is no multiple of the 8 devices"):
        harness.Network(page, size=32, batch_size=9, precision="float32")


def test_makconv(page, tmp_path):
    argv = ["--page", page, "--batch", "2", "--precision", "float32"]
    written = run(makconv.main, tmp_path / "out.json", *argv)
    blocks = [row for row in written["rows"] if row["what"].startswith("dense block")]
    assert len(blocks) == 2 * len(layers.FORMS)
    rows = {(row["what"], row["pass"]): row for row in written["rows"]}
    for step in ("forward", "gradient"):
        full, split, fused = (
            rows[what, step]["flops"] for what in ("full 3 x 3", "MAKConv split", "MAKConv fused")
        )
        assert fused == pytest.approx(full, rel=0.01)
        # 9 + 3 + 3 + 1 of 4 x 9 taps; at the image's edge the large kernel lacks more of them.
        assert 16 / 36 < split / full < 0.5
        assert rows["full 3 x 3", step]["faster"]["median"] == 1
        assert rows[makconv.VGG, step]["faster_than_vgg16"]["median"] == 1
        assert rows["dense block split", step]["bytes"] > 0
    # The output, and its gradients of the weights and of the input.
    costs = [rows["full 3 x 3", step]["flops"] for step in ("forward", "gradient")]
    assert costs[1] / costs[0] == pytest.approx(3, rel=0.01)
    with pytest.raises(InputError, match="parts block are unknown: choose layers, blocks or both"):
        makconv.main(["--parts", "block"])
    with pytest.raises(InputError, match="'vgg16' is a vgg16: give one of a maknet"):
        makconv.main(["--page", "vgg16"])


@pytest.mark.parametrize(
    "python, why", [("/nowhere/python", "No such file"), (sys.executable, "No module named")]
)
def test_a_python_without_torch_is_refused_in_one_line(tmp_path, capsys, monkeypatch, python, why):
    stand_in = tmp_path / "worker.py"
    stand_in.write_text("import no_such_torch")
    monkeypatch.setattr(against_pytorch, "WORKER", stand_in)
    monkeypatch.setattr(sys, "argv", ["against_pytorch.py"])
    with pytest.raises(SystemExit) as ended:
        harness.run(lambda: against_pytorch.main(["--torch-python", python]))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert why in said and "give a Python with torch and NumPy" in said


class Echo:
    """In the place of PyTorch: our own results, times `factor`."""

    def __init__(self, network, **factor):
        self.network, self.factor = network, factor
        self.asked = []

    def ask(self, **request):
        self.asked.append(request)
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
    assert against_pytorch._agree("maknet", network, echo) == {
        "logits_differ": 0,
        "first_loss_differs": 0,
    }
    assert {"weights/spl/dense/kernel", "batch/image", "batch/pos_weight"} < echo.arrays
    assert echo.asked[0]["model"] == "maknet"
    with pytest.raises(InputError, match="maknet: logits_differ by 0.002 .* nothing was timed"):
        against_pytorch._agree("maknet", network, Echo(network, predict=1.002))
    with pytest.raises(InputError, match="maknet: first_loss_differs by 0.002 "):
        against_pytorch._agree("maknet", network, Echo(network, train=1.002))


@pytest.fixture
def torch_python():
    python = os.environ.get("MAKNET_TORCH_PYTHON")
    if not python:
        pytest.skip("MAKNET_TORCH_PYTHON names no Python with torch and captum")
    return python


def test_against_pytorch(page, torch_python, tmp_path, capsys):
    argv = ["--torch-python", torch_python, "--networks", page, "--batch", "8"]
    written = run(against_pytorch.main, tmp_path / "out.json", *argv)
    assert [row["step"] for row in written["rows"]] == ["train", "predict"]
    for row in written["rows"]:
        assert row["logits_differ"] < 1e-5 and row["first_loss_differs"] < 1e-5
        assert len(row["seconds"]["jax"]) == len(row["seconds"]["torch"]) == 2
    assert written["maknet_over_vgg16"] is None and written["torch"]["threads"] >= 1
    assert "at least 1.5x" in capsys.readouterr().out


def test_attribution_agrees_with_captum(page, torch_python, tmp_path, capsys):
    argv = ["--torch-python", torch_python, "--networks", page, "--steps", "4"]
    written = run(attribution.main, tmp_path / "out.json", *argv)
    (row,) = written["rows"].values()
    assert set(row["differences"]) == {"gauss", "midpoint"}
    assert max(values["p99"] for values in row["differences"].values()) < 1e-4
    assert "5 of an image" in capsys.readouterr().out


def test_lesanet_agrees_with_torch(torch_python, tmp_path):
    argv = ["--torch-python", torch_python, "--batch", "8"]
    written = run(lesanet.main, tmp_path / "out.json", *argv)
    assert [row["step"] for row in written["rows"]] == ["train", "predict"]
    assert max(written["differences"].values()) < 1e-4


def test_augment_shows_its_share_of_the_step(page, tmp_path, capsys):
    argv = ("--batch", "8", "--network", page)
    written = run(augment.main, tmp_path / "augment.json", *argv)
    step, gather, shear = written["rows"]
    assert step["what"] == "training step"
    for row in (gather, shear):
        low, high = (
            row["ms_per_image"][one] / (row["ms_per_image"][one] + step["ms_per_image"][other])
            for one, other in (("low", "high"), ("high", "low"))
        )
        assert low * 0.999 <= row["share_of_step"]["median"] <= high * 1.001
    assert "below 10 %" in capsys.readouterr().out
    with pytest.raises(InputError, match="--network student augments: give one"):
        augment.main(["--quick", "--batch", "8", "--network", "student"])


def test_starts_of_an_unknown_page_are_one_line():
    with pytest.raises(InputError, match="'nowhere'"):
        startup.main(["--quick", "--config", "nowhere"])


@pytest.mark.slow
def test_a_warm_start_compiles_less_and_a_restart_makes_the_second_step(page, tmp_path):
    argv = ["--quick", "--config", page, "--size", "32", "--repeats", "1"]
    written = run(startup.main, tmp_path / "out.json", *argv)
    [cold], [warm], [restarted] = (row["starts"] for row in written["rows"])
    assert warm["longest"] < cold["longest"] / 2
    assert restarted["longest"] < cold["longest"] / 2
    assert (cold["stopped"], warm["stopped"], restarted["stopped"]) == (True, True, False)


def test_organs_draws_trains_and_measures(page, tmp_path):
    argv = ["--folder", str(tmp_path / "own"), "--patients", "8", "--epochs", "1", "--size", "32"]
    argv += ["--least", "0", "--images", "2", "--steps", "2"]
    written = run(organs.main, tmp_path / "out.json", *argv)
    assert sum(label["maps"] for label in written["rows"]) >= 2
    for label in written["rows"]:
        assert 0 < label["chance"] <= 1
        assert 0 <= label["inside"] <= 1
        assert 1 <= label["patients"] <= label["maps"]
    inside = written["results"]["mass inside the organ"]
    assert inside["difference"][0] == pytest.approx(inside["map"][0] - inside["random"][0])
    arguments = json.loads((tmp_path / "own" / "phantom" / "phantom.json").read_text())["arguments"]
    assert arguments["absent"] == 0.5
    with pytest.raises(InputError, match="--workdir and --masks belong together"):
        organs.main(["--workdir", str(tmp_path / "own" / "run")])
    with pytest.raises(InputError, match="--patients 9 is of a training: leave it out"):
        organs.main(["--workdir", "run", "--masks", "masks", "--patients", "9"])
    with pytest.raises(InputError, match="a phantom with patients 8, not 9: name a new folder"):
        organs.main(["--folder", str(tmp_path / "own"), "--patients", "9"])
