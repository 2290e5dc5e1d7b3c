"""`maknet plan`: arithmetic on the costs of a compiled step; the compilation itself is slow."""

import importlib.util
import json
import subprocess
import sys

import pytest

from maknet_jax import plan
from maknet_jax.errors import InputError
from maknet_jax.planning import chips, compiled
from maknet_jax.runs import config as configs

COSTS = compiled.Costs(
    flops=197e9,  # 1 ms of a v5e
    hbm_bytes=1.638e9,  # 2 ms
    xla_bytes=3e9,
    memory=4e9,
    allreduces=100,
    allreduce_bytes=18e6,
    compile_seconds=1.0,
)


@pytest.fixture
def fake(monkeypatch):
    """Costs without a compiler; the topology v5e:2x4 has eight chips."""
    asked = []

    def compile_step(config, kind, batch, topology, *, labels):
        asked.append((config.model.name, kind, batch, topology, labels))
        return COSTS if batch <= 64 else None

    monkeypatch.setattr(compiled, "devices_of", lambda topology: [None] * 8)
    monkeypatch.setattr(compiled, "compile_step", compile_step)
    return asked


def test_times_are_bounds_of_the_roofline(fake, tmp_path):
    config = configs.load("teacher", ["data.path=nowhere", "epochs=10.0"])
    result = plan.plan(config, "v5e:2x4", batch=64, out=tmp_path / "plan.json")
    assert fake == [("maknet", "train", 64, "v5e:2x4", 115)]
    allreduce = 2 * 18e6 * 7 / 8 / 90e9 + 100 * chips.LATENCY["tpu"]
    assert result.step_seconds == pytest.approx(2e-3 + allreduce)
    assert result.images_per_second == pytest.approx(8 * 64 / result.step_seconds)
    assert result.hours == pytest.approx(10 * 17_697 / result.images_per_second / 3600)
    assert result.efficiency[8] == pytest.approx(2e-3 / result.step_seconds)
    assert 0.5 < result.efficiency[256] < result.efficiency[64] < result.efficiency[8] < 1
    assert json.loads((tmp_path / "plan.json").read_text())["costs"]["memory"] == 4e9
    text = plan.describe(result)
    assert "4.00 of 16 GB" in text and "not measured" in text and "bandwidth" in text


def test_the_batch_of_the_config_is_divided_among_the_chips(fake):
    config = configs.load("teacher", ["data.path=nowhere", "data.batch_size=64"])
    assert plan.plan(config, "v5e:2x4").batch == 8
    with pytest.raises(InputError, match="60 images .* 8 chips"):
        plan.plan(configs.load("teacher", ["data.batch_size=60"]), "v5e:2x4")


def test_a_step_that_does_not_fit_is_said(fake):
    result = plan.plan(configs.load("teacher", ["data.path=nowhere"]), "v5e:2x4", batch=512)
    assert result.costs is None and "does not fit" in plan.describe(result)


def test_data_give_the_images_the_labels_and_the_rate_of_the_loader(fake, data, monkeypatch):
    monkeypatch.setattr(plan, "LOADER_SECONDS", 0.05)
    config = configs.load("smoke", [f"data.path={data}"])
    result = plan.plan(config, "v5e:2x4", batch=8)
    assert result.images != 17_697 and result.labels == fake[0][-1] != 115
    assert result.loader is not None and result.loader > 0
    assert "loader of this host" in plan.describe(result)


def test_gpus_of_a_host_reduce_first():
    h100 = chips.CHIPS["h100"]
    one = chips.allreduce_seconds(h100, 8, 1e9, 0)
    assert one == pytest.approx(2e9 * 7 / 8 / 450e9)
    many = chips.allreduce_seconds(h100, 64, 1e9, 0)
    assert many == pytest.approx(one + 2e9 / 8 * 7 / 8 / 50e9)
    assert chips.allreduce_seconds(h100, 1, 1e9, 5) == 0


def test_unknown_chips_and_missing_compilers_are_named(monkeypatch):
    with pytest.raises(InputError, match="'v9:2x2'"):
        compiled.devices_of("v9:2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu: pip install 'maknet-jax\[tpu\]'"):
        compiled.devices_of("v5e:2x2")


def test_auto_means_what_it_does_on_an_accelerator():
    config = compiled.for_accelerator(configs.load("teacher", ["precision=auto"]))
    assert config.precision == "bfloat16"
    assert config.model.options.get("form", "fused") == "fused"
    float32 = configs.load("teacher", ["precision=float32"])
    assert compiled.for_accelerator(float32).precision == "float32"


@pytest.mark.parametrize("shape", ["0", "8x", "2x4x8", "a"])
def test_a_number_of_gpus_is_checked(shape, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match="h100:8"):
        compiled.devices_of(f"h100:{shape}")


@pytest.mark.slow  # a compilation, minutes
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:2"])
def test_a_step_is_compiled_for_an_absent_chip(topology, tmp_path):
    package = compiled.PACKAGES[chips.of_topology(topology).platform]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package}, which compiles for {topology}, is not installed")
    out = tmp_path / "plan.json"
    argv = ["plan", "--config", "smoke", "--topology", topology, "--batch", "8", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "maknet_jax", *argv], check=True)
    costs = json.loads(out.read_text())["costs"]
    assert costs["flops"] > 8 * 1e7 and costs["hbm_bytes"] > 1e6 and costs["memory"] > 1e6
    assert costs["allreduces"] > 0 and costs["allreduce_bytes"] > 1e5
