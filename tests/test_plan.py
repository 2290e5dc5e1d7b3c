"""`maknet plan`: arithmetic on the costs of a compiled step; the compilation itself is slow."""

import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest

from maknet_jax import plan
from maknet_jax.errors import InputError
from maknet_jax.planning import bounds, chips, compiled, hlo
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


def test_a_batch_in_parts_has_the_flops_of_the_whole_batch(monkeypatch):
    one, two = (configs.load("linear", [f"accumulate={parts}"]) for parts in (1, 2))
    assert compiled.count_flops(one, "train", 7) == compiled.count_flops(two, "train", 7) > 0
    monkeypatch.setattr(compiled, "devices_of", lambda topology: [])
    with pytest.raises(InputError, match="--batch 3, .* accumulate 2"):
        compiled.compile_step(two, "train", 3, "v5e:2x2", labels=7)


def test_lower_bounds_follow_from_the_shapes_of_the_layers():
    config = configs.load("teacher", ["data.size=64"])
    rows = {row.part: row for row in bounds.training_bounds(config, 7)}
    image, stem = 64 * 64 * 3, 16 * 16 * 32
    assert rows["stem"].once == 2 * 2 * stem
    assert rows["stem"].by_layer == 2 * (3 * image + 2 * stem)
    assert rows["stem"].state == 2 * 4 * 4 * (7 * 7 * 3 * 32 + 2 * 32)
    layers = [(32, 16), (48, 16), (64, 16), (80, 64)]  # of block 0: channels read and written
    assert rows["block_0"].once >= 2 * 16 * 16 * sum(2 * new for _, new in layers)
    expected = 2 * 16 * 16 * sum(3 * old + 2 * new for old, new in layers)
    assert rows["block_0"].by_layer == pytest.approx(expected, rel=0.02)  # CBAM is small


@pytest.mark.slow  # needs libtpu
def test_bytes_are_exact_for_programs_whose_traffic_is_known():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed")
    code = textwrap.dedent(
        """
        from maknet_jax.planning import chips
        chips.use_host_only()
        import json, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from maknet_jax.planning import compiled
        jax.config.update("jax_enable_compilation_cache", False)
        mesh = Mesh(np.array(compiled.devices_of("v5e:2x2")[:1]), ("d",))
        def array(*shape, kind):
            one = NamedSharding(mesh, PartitionSpec())
            return jax.ShapeDtypeStruct(shape, kind, sharding=one)
        def convolve(x, kernel):
            dimensions = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        square, half = array(8192, 8192, kind=jnp.float32), array(8192, 8192, kind=jnp.bfloat16)
        images = array(256, 128, 128, 128, kind=jnp.bfloat16)
        kernel = array(3, 3, 128, 128, kind=jnp.bfloat16)
        programs = {
            "matmul": (jnp.matmul, half, half), "copy": (lambda a: a + 1, square),
            "transpose": (lambda a: a.T + 0, square),
            "two passes": (lambda a: jnp.tanh(a) * jnp.tanh(a).sum(0), square),
            "convolution": (convolve, images, kernel),
        }
        print(json.dumps({name: jax.jit(f).lower(*x).compile().as_text()
                          for name, (f, *x) in programs.items()}))
        """
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    texts = json.loads(done.stdout)
    square, images = 8192**2 * 4, 256 * 128**3 * 2
    assert hlo.hbm_bytes(texts["matmul"]) == 3 * square / 2
    assert hlo.hbm_bytes(texts["copy"]) == hlo.hbm_bytes(texts["transpose"]) == 2 * square
    assert hlo.hbm_bytes(texts["two passes"]) == pytest.approx(3 * square, rel=1e-3)
    entry = texts["convolution"].partition("ENTRY")[2]
    copies = entry.count("} copy(%fusion")  # the compiler may change the layout of the output
    expected = (2 + 2 * copies) * images + 9 * 128 * 128 * 2
    assert hlo.hbm_bytes(texts["convolution"]) == expected


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
