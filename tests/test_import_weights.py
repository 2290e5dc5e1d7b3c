"""`maknet import-weights`: translates a torch file, and a run starts from the result."""

import hashlib
import json
import pathlib
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import toy
from network_weights import golden

from maknet_jax import cli, import_weights, train
from maknet_jax.errors import InputError
from maknet_jax.models import pretrained
from maknet_jax.runs import config, setup, workdir
from maknet_jax.training import transfer

HEAD = {"fc.weight": np.zeros((1000, 512), np.float32), "fc.bias": np.zeros(1000, np.float32)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """ResNet18 as torch saves it, with its head."""
    path = tmp_path_factory.mktemp("torch") / "resnet18.safetensors"
    safetensors.numpy.save_file(golden("resnet18")[0] | HEAD, path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def imported(source):
    """(the translated file, the summary)."""
    out = source.with_name("imported.safetensors")
    return out, import_weights.import_weights(source, out, model="resnet18")


def command(capsys, *argv):
    """(exit code, standard output, standard error)."""
    try:
        code = cli.main(["import-weights", *map(str, argv)])
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_file_contains_the_trunk_under_the_names_of_this_package(source, imported):
    out, summary = imported
    arrays = safetensors.numpy.load_file(out)
    expected = golden("resnet18")[0]["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(arrays["params/stem/conv/kernel"], expected)
    np.testing.assert_array_equal(
        arrays["batch_stats/input/std"], np.float32(pretrained.IMAGENET_STD)
    )
    assert not [name for name in arrays if "classifier" in name or "spl" in name]
    assert summary["placed"] == len(arrays) == 20 * 5 + 2  # convolutions with BatchNorm; the input
    assert summary["unplaced"] == ["fc.bias", "fc.weight"]
    params, batch_stats, metadata = transfer.read(out)
    assert metadata["model"] == "resnet18" and metadata["source"] == "resnet18.safetensors"
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert summary["digest"] == transfer.digest(params, batch_stats)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, source.name]


def test_the_command_reports_the_dropped_head(capsys, source, imported, tmp_path):
    out = tmp_path / "new" / "imported.safetensors"
    code, printed, err = command(
        capsys, source, "--model=resnet18", "--out", out, "--mean=.5,.5,.5", "--std=0.5,0.5,.5"
    )
    assert (code, err) == (0, "")
    assert "102" in printed and "fc.bias, fc.weight" in printed
    mine, theirs = (safetensors.numpy.load_file(path) for path in (out, imported[0]))
    changed = {name for name in mine if not np.array_equal(mine[name], theirs[name])}
    assert changed == {"batch_stats/input/mean", "batch_stats/input/std"}
    assert set(mine["batch_stats/input/mean"]) == set(mine["batch_stats/input/std"]) == {0.5}


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(kind, tmp_path):
    weights = {
        key: array.astype(kind) if array.dtype == np.float32 else array
        for key, array in golden("resnet18")[0].items()
    }
    safetensors.numpy.save_file(weights, tmp_path / "half.safetensors")
    out = tmp_path / "imported.safetensors"
    import_weights.import_weights(tmp_path / "half.safetensors", out, model="resnet18")
    bias = safetensors.numpy.load_file(out)["params/stem/norm/bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, weights["bn1.bias"].astype(np.float32))


def test_help_shows_an_example(capsys):
    code, printed, _ = command(capsys, "--help")
    assert code == 0 and "maknet import-weights vgg16_bn.safetensors" in printed


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("missing.safetensors", (), "missing.safetensors"),
        ("cut.safetensors", (), "cut.safetensors"),
        ("text.safetensors", (), "text.safetensors"),
        ("new.pth", (), "save_file(torch.load("),  # the command that converts it
        ("old.pth", (), "save_file(torch.load("),
        ("whole.safetensors", ("--model=vgg16",), "features.0.weight"),
        ("whole.safetensors", ("--std=1,0,1",), "std [1.0, 0.0, 1.0]"),
        ("whole.safetensors", ("--mean=1,2",), "'1,2'"),
        ("whole.safetensors", ("--out=whole.safetensors",), "choose another --out"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line_and_exit_code_2(
    capsys, source, tmp_path, monkeypatch, name, options, named
):
    monkeypatch.chdir(tmp_path)
    content = source.read_bytes()
    pathlib.Path("whole.safetensors").write_bytes(content)
    pathlib.Path("cut.safetensors").write_bytes(content[:-1000])
    pathlib.Path("text.safetensors").write_text("not weights\n")
    pathlib.Path("old.pth").write_bytes(pickle.dumps({"conv1.weight": 1}, protocol=2))
    with zipfile.ZipFile("new.pth", "w") as file:  # as torch.save writes it
        file.writestr("archive/data.pkl", pickle.dumps({"conv1.weight": 1}))
    before = sorted(pathlib.Path().iterdir())
    code, printed, err = command(
        capsys, name, "--model=resnet18", "--out=imported.safetensors", *options
    )
    assert (code, printed) == (2, "") and named in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(pathlib.Path().iterdir()) == before
    assert pathlib.Path("whole.safetensors").read_bytes() == content


def resnet_config(tmp_path, out):
    data = toy.write(tmp_path / "toy")
    fields = ["data.size=32", "data.batch_size=8", "epochs=0.2", "optimizer.learning_rate=1e-300"]
    return config.load("resnet18", [f"data.path={data}", f"init.path={out}", *fields])


def test_a_run_starts_with_the_trunk_of_the_file(imported, tmp_path):
    start_config = resnet_config(tmp_path, imported[0])
    run = setup.set_up(start_config, tmp_path / "run", devices=jax.devices()[:1])
    created = run.assembly.create(0, run.place)
    arrays = safetensors.numpy.load_file(imported[0])
    first = arrays["params/stem/conv/kernel"]
    np.testing.assert_array_equal(created.params["stem"]["conv"]["kernel"], first)
    np.testing.assert_array_equal(created.opt_state[-1].slow["stem"]["conv"]["kernel"], first)
    np.testing.assert_array_equal(
        created.batch_stats["input"]["mean"], np.float32(pretrained.IMAGENET_MEAN)
    )
    start = run.init
    assert (start["placed"], start["fresh"]) == (102, ["classifier", "spl"])
    assert start["digest"] == imported[1]["digest"]


@pytest.mark.slow  # 20 seconds
def test_a_step_at_rate_zero_keeps_the_trunk_and_its_normalisation(imported, tmp_path):
    summary = train.train(resnet_config(tmp_path, imported[0]), tmp_path / "run")
    assert summary["steps"] == 1 and summary["init"]["source"] == "resnet18.safetensors"
    params, batch_stats, metadata = workdir.open_weights(tmp_path / "run")[:3]
    trunk, statistics, _ = transfer.read(imported[0])
    assert (metadata["model"], metadata["step"]) == ("resnet18", 1)
    head = {part: params[part] for part in transfer.HEAD}
    assert transfer.digest(params, {}) == transfer.digest(trunk | head, {})
    assert transfer.digest({}, batch_stats["input"]) == transfer.digest({}, statistics["input"])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "C64"])
def test_weights_in_a_dtype_without_a_numpy_type_are_rejected(dtype, tmp_path, capsys):
    size = 8 if dtype == "C64" else 1
    header = {"conv1.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}
    text = json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * size))
    argv = ["import-weights", str(path), "--model", "resnet18", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"conv1.weight has dtype {dtype}" in err
    with pytest.raises(InputError, match=dtype):
        workdir.open_weights(path)
