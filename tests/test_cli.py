"""The command line: exit codes, errors of one line, help with an example."""

import os
import pathlib
import platform
import pwd
import re
import subprocess
import sys

import pytest

from maknet_jax import cli, files, train
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.runs import config

VERBS = (
    ["demo"],
    ["select", "idc"],
    ["prepare", "deeplesion"],
    ["prepare", "dicom"],
    ["prepare", "table"],
    ["prepare", "segmentations"],
    ["prepare", "openkbp"],
    ["plan"],
    ["train"],
    ["import-weights"],
    ["pseudo-label"],
    ["noisy-student"],
    ["evaluate"],
    ["predict"],
    ["attribute"],
    ["perturb"],
    ["report"],
    ["models"],
    ["retrieve"],
    ["export"],
    ["verify"],
)


def run(capsys, *argv):
    """(exit code, standard output, standard error) of a command."""
    try:
        code = cli.main([str(part) for part in argv])
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_an_example(capsys, verb):
    code, out, _ = run(capsys, *verb, "--help")
    assert code == 0
    assert f"example:\n  maknet {' '.join(verb)}" in out


@pytest.mark.parametrize(
    "argv, part",
    [
        (["fly"], "fly"),
        (["predikt"], "'predict'"),
        (["prepare", "dcom"], "'dicom'"),
        (["report", "runs/a", "--cases", "0"], "'0'"),
        (["train", "--workdir", "x"], "--config"),
        (["train", "--config", "teecher", "--workdir", "x"], "teacher"),
        (["train", "--config", "teacher", "--workdir", "x", "--config.epoch=3"], "'epochs'"),
        (["train", "--config", "teacher", "--workdir", "x", "--config.epochs=many"], "many"),
        (["train", "--config", "teacher", "--workdir", "x", "--confg.epochs=3"], "--confg.epochs"),
        (
            ["train", "--config", "teacher", "--workdir", "x", "--config.data.path=no"],
            "dataset.json",
        ),
        (["plan", "--config", "teacher", "--topology", "v9:2x2"], "v9:2x2"),
        (["evaluate", "--workdir", "nowhere"], "nowhere"),
        (["evaluate", "--workdir", "x", "--config.epochs=3"], "--config.epochs=3"),
        (["predict", "nowhere", "--workdir", "x", "--out", "y.csv"], "nowhere"),
        (["prepare", "dicom", "nowhere", "--out", "y"], "nowhere"),
        (["prepare", "dicom", ".", "--out", "y", "--min-slices", "0"], "'0'"),
        (["prepare", "table", "nowhere.csv", "--out", "y"], "nowhere.csv"),
        (["prepare", "table", "t.csv", "--out", "y", "--png-window=275,-175"], "275,-175"),
        (["prepare", "table", "t.csv", "--out", "y", "--png-window=-inf,inf"], "-inf,inf"),
        (["prepare", "deeplesion", "--images", "i", "--info", "d", "--out", "y"], "--images i"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, part):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert part in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert not list(tmp_path.iterdir()), "bad input must not leave anything behind"


def test_an_invalid_process_count_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    argv = ("train", "--config", "smoke", "--workdir", tmp_path / "run", "--distributed")
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "'two'" in err and "JAX_NUM_PROCESSES" in err and err.count("\n") == 1


def test_several_slurm_tasks_without_distributed_are_warned(capsys, monkeypatch, tmp_path):
    argv = ("evaluate", "--model", tmp_path / "absent")
    for tasks, warnings in (("1", 0), ("4", 1)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert len([line for line in err.splitlines() if "SLURM_NTASKS is 4" in line]) == warnings


def test_the_help_of_train_names_every_config(capsys):
    configs = {path.stem for path in config.folder().glob("[!_]*.py")} - {"noisy_student"}
    _, out, _ = run(capsys, "train", "--help")
    assert configs and configs <= set(re.findall(r"\w+", out.partition("--config CONFIG")[2]))


def test_a_size_that_networks_cannot_halve_is_rejected(capsys, tmp_path, phantom):
    out = tmp_path / "shards"
    code, _, err = run(
        capsys, "prepare", "dicom", phantom["dicom"], "--min-slices=1", "--size=100", "--out", out
    )
    assert code == 2
    assert "--size 100" in err
    assert not out.exists()


def test_a_stopped_verb_exits_75(capsys, monkeypatch, tmp_path):
    import os
    import signal

    from maknet_jax import prepare

    def send_sigterm(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(prepare, "prepare_dicom", send_sigterm)
    code, _, err = run(capsys, "prepare", "dicom", tmp_path, "--out", tmp_path / "out")
    assert code == 75
    assert "SIGTERM" in err


def test_python_m_runs_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "maknet_jax", "--version"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stdout.strip()


def test_parsing_the_options_imports_no_jax():  # so that a typo is reported at once
    code = "import sys, maknet_jax.cli as c\nc._parser()\nsys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_signal_lost_in_a_finaliser_is_raised_again(capsys, monkeypatch, tmp_path):
    import os
    import signal
    import time

    from maknet_jax import prepare

    class Finaliser:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def lose_sigterm(*_, **__):
        Finaliser()
        time.sleep(5)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(prepare, "prepare_dicom", lose_sigterm)
    code, _, err = run(capsys, "prepare", "dicom", tmp_path, "--out", tmp_path / "out")
    assert code == 75, err


def test_python_without_docstrings_runs_commands():
    argv = [sys.executable, "-OO", "-m", "maknet_jax", "models", "--help"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 0 and "--labels" in result.stdout, result.stderr


def test_every_option_is_explained():
    def parsers(parser):
        yield parser
        for action in parser._actions:
            if action.nargs == "A...":  # subcommands
                for child in action.choices.values():
                    yield from parsers(child)

    unexplained = [
        (parser.prog, action.dest)
        for parser in parsers(cli._parser())
        for action in parser._actions
        if not action.help and action.nargs != "A..."
    ]
    assert unexplained == []


@pytest.mark.parametrize("argv, level", [([], "3"), (["--distributed"], "2")])
def test_messages_of_xla_are_hidden_unless_they_concern_the_connection(
    argv, level, monkeypatch, tmp_path
):
    from maknet_jax import train

    seen = []
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    monkeypatch.setattr("maknet_jax.cli.options.start_jax", lambda *_: None)

    def stop(*_):
        seen.append(os.environ["TF_CPP_MIN_LOG_LEVEL"])
        raise InputError("enough")

    monkeypatch.setattr(train, "train", stop)
    assert cli.main(["train", "--config", "smoke", "--workdir", str(tmp_path / "run"), *argv]) == 2
    assert seen == [level]


def test_every_verb_is_tested_here():
    assert {verb for verb, *_ in VERBS} == set(cli._parser()._subparsers._group_actions[0].choices)


def test_jax_starts_without_a_home_folder(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_):
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        pathlib.Path.home()
    options.start_jax()  # programs are compiled each time


REUSE = """
import pathlib, resource
from maknet_jax.cli import options

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

options.keep_freed_memory()
before = resident()
block = bytearray(200_000_000)
del block
print((resident() - before) / 200_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize("setting, kept", [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(setting, kept):
    if any(next(pathlib.Path("/dev").glob(name), None) for name in options.ACCELERATORS):
        pytest.skip("memory is left alone beside an accelerator")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "GLIBC_TUNABLES" and not name.startswith("MALLOC_")
    }
    run = subprocess.run(
        [sys.executable, "-c", REUSE], env=inherited | setting, capture_output=True, text=True
    )
    assert (float(run.stdout) > 0.5) == kept, run.stderr


REMOTE = [
    ["demo", "--out", "gs://bucket/demo"],
    ["prepare", "dicom", "gs://bucket/ct", "--out", "shards"],
    ["prepare", "dicom", "ct", "--out", "s3://bucket/shards"],
    ["prepare", "segmentations", "train=hdfs://x/cases", "--out", "shards"],
    ["prepare", "openkbp", "s3://bucket", "--out", "out"],
    ["prepare", "table", "https://example.com/labels.csv", "--out", "out"],
    ["train", "--config", "teacher", "--workdir", "hdfs://name/run"],
    ["train", "--config", "gs://bucket/teacher.py", "--workdir", "run"],
    ["pseudo-label", "--model", "gs://bucket/run", "--records", "data", "--out", "out"],
    ["noisy-student", "--config", "noisy_student", "--workdir", "gs://bucket/run"],
    ["evaluate", "--model", "run", "--out", "s3://bucket/out"],
    ["predict", "s3://bucket/ct", "--model", "head-neck", "--out", "labels.csv"],
    ["predict", "ct", "--model", "head-neck", "--out", "az://bucket/labels.csv"],
    ["attribute", "ct", "--model", "run", "--out", "out", "--compare", "gs://bucket/run"],
    ["perturb", "ct", "--model", "run", "--out", "gs://bucket/out"],
    ["report", "gs://bucket/run"],
    [
        "retrieve",
        "--model",
        "gs://b/run",
        "--image",
        "a",
        "--box=0,0,1,1",
        "--data",
        "d",
        "--out",
        "o.csv",
    ],
    ["export", "run", "--out", "gs://bucket/bundle"],
    ["models", "--out", "gs://bucket/models.json"],
    ["import-weights", "vgg.safetensors", "--model", "vgg16", "--out", "gs://bucket/w"],
    ["select", "idc", "--out", "gs://bucket/selection"],
    ["verify", "hdfs://name/shards"],
    ["plan", "--config", "teacher", "--topology", "v5e:2x2", "--out", "gs://bucket/plan.json"],
]


@pytest.mark.parametrize("argv", REMOTE, ids=" ".join)
def test_urls_are_rejected_before_anything_is_written(capsys, tmp_path, monkeypatch, argv):
    """`pathlib` would turn them into local folders."""
    monkeypatch.chdir(tmp_path)
    code, out, error = run(capsys, *argv)
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert "://" in error and not list(tmp_path.iterdir())


def test_urls_are_rejected_in_configs_and_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = config.load("teacher")
    for name in ("data.path", "init.path"):
        changed = config.load("teacher", [f"{name}=gs://bucket/x"])
        with pytest.raises(InputError, match="gs://bucket/x"):
            train.train(changed, tmp_path / "run")
    with pytest.raises(InputError, match="s3://bucket/run"):
        train.train(teacher, pathlib.Path("s3://bucket/run"))
    for path in ("C:/data", "a:b", "runs/s3:/x", "lr=0.1"):
        files.check_local(path)
    assert not list(tmp_path.iterdir())


def test_every_verb_rejects_urls():
    assert {argv[0] for argv in REMOTE} == {verb for verb, *_ in VERBS}
