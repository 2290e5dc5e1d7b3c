"""Installation: pins within the bounds, a complete wheel, the right .venv."""

import csv
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import organ_cases
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def environment(python):
    """What markers such as python_version < "3.12" are judged by: the tested platform."""
    return {"python_version": python, "sys_platform": "linux", "platform_system": "Linux"}


def pins(python):
    """Name to the list of versions that constraints.txt pins it to on a Python version."""
    versions = {}
    for line in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{line}: constraints.txt pins with == only"
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            versions.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    return versions


def direct_requirements():
    """What pyproject.toml asks for at run time, for the tests and for the build."""
    texts = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    return [Requirement(t) for t in texts + PROJECT["project"]["optional-dependencies"]["test"]]


@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_has_one_pin_within_its_bounds(python):
    pinned = pins(python)
    assert {name: versions for name, versions in pinned.items() if len(versions) > 1} == {}
    for requirement in direct_requirements():
        (version,) = pinned.get(canonicalize_name(requirement.name), [None])
        assert version and requirement.specifier.contains(version), f"{requirement}: {version}"


def test_dependencies_of_dependencies_are_pinned():
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    queue = [(r.name, tuple(r.extras)) for r in direct_requirements()]
    seen = set()
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert canonicalize_name(name) in pinned, f"constraints.txt lacks {name}"
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            marker = child.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                queue.append((child.name, tuple(child.extras)))
    assert set(pinned) == {canonicalize_name(name) for name, _ in seen}, "pins that nobody needs"


def test_dependencies_have_lower_bounds_only():
    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        operators = {s.operator for s in requirement.specifier}
        assert ">=" in operators, f"{text}: give the lower bound"
        # orbax 1.0 brings another API: the one upper bound, explained in pyproject.toml.
        assert operators == {">="} or requirement.name == "orbax-checkpoint", text


def test_no_file_names_a_package_registry():
    if not (REPO / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: no list of tracked files")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPO, check=True, capture_output=True, text=True).stdout
    # Written so that this file does not match itself.
    registry = re.compile(rb"pypi[.](org|python)|pythonhosted[.]|-index[-]url|--find[-]links")
    for name in filter(None, names.split("\0")):
        path = REPO / name
        if path.is_file():
            assert not registry.search(path.read_bytes()), f"{name} names a package registry"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    built = subprocess.run([*command, str(REPO)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.iterdir()
    return path


def test_the_wheel_contains_only_the_package_and_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}

    def files(folder):
        paths = (p for p in (REPO / folder).rglob("*") if p.is_file())
        return {str(p.relative_to(REPO)) for p in paths if "__pycache__" not in p.parts}

    package = files("maknet_jax")
    configs = {f"maknet_jax/{name}" for name in files("configs")}
    assert configs, "no config in configs/"
    assert inside == package | configs
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_works_in_a_bare_environment_from_any_folder(wheel, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", bare], check=True)
    install = [bare / "bin/python", "-m", "pip", "install", "-qq", "-c", REPO / "constraints.txt"]
    subprocess.run([*install, wheel], check=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for command in ([bare / "bin/maknet", "--help"], [bare / "bin/maknet", "train", "--help"]):
        shown = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert shown.returncode == 0 and "maknet" in shown.stdout, shown.stdout + shown.stderr
    subprocess.run([bare / "bin/python", "-m", "pip", "check"], check=True)
    organ_cases.write_nifti(tmp_path / "ct.nii.gz", organ_cases.ct())
    predict = [
        bare / "bin/maknet",
        "predict",
        "ct.nii.gz",
        "--model",
        "head-neck",
        "--out",
        "l.csv",
    ]
    subprocess.run(predict, cwd=tmp_path, env=clean, check=True)
    with (tmp_path / "l.csv").open(newline="") as file:
        assert {row["slice"] for row in csv.DictReader(file)} == set(map(str, range(12)))


# Prints its path when probed, and creates a .venv whose pip exits with {pip}.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch created ;;
*"-m pip"*) exit {pip} ;;
*) echo "$0" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with .ci/venv, and a folder `bin` for fake Pythons beside the tools it needs."""
    folder = tmp_path / "a checkout"
    (folder / ".ci").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name in (".ci/venv", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, folder / name)
    for name in ("cat", "cksum", "cp", "mkdir", "rm", "sh", "touch"):
        (folder / "bin" / name).symlink_to(shutil.which(name))
    return folder


def add_python(checkout, version, pip=0):
    path = checkout / "bin" / f"python{version}"
    path.write_text(FAKE_PYTHON.format(pip=pip))
    path.chmod(0o755)
    return str(path)


def make_venv(checkout, **env):
    """Runs .ci/venv; returns (exit code, output, whether it created a .venv)."""
    (checkout / "created").unlink(missing_ok=True)
    ran = subprocess.run(
        [checkout / "bin/sh", checkout / ".ci/venv"],
        env={"PATH": str(checkout / "bin"), **env},
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout + ran.stderr, (checkout / "created").exists()


def test_make_takes_the_newest_python_that_runs(checkout):
    broken = checkout / "bin/python3.13"
    broken.write_text("#!/bin/sh\nexit 127\n")  # as a pyenv shim does for a disabled version
    broken.chmod(0o755)
    older, newer = add_python(checkout, "3.11"), add_python(checkout, "3.12")
    code, output, created = make_venv(checkout)
    assert (code, created) == (0, True) and newer in output
    assert make_venv(checkout) == (0, "", False)  # up to date
    assert make_venv(checkout, PYTHON=older)[2]  # PYTHON= chooses
    assert not make_venv(checkout)[2]  # and the choice is remembered
    with open(checkout / "constraints.txt", "a") as file:
        file.write("# newer\n")
    assert make_venv(checkout)[2]


def test_make_finds_pythons_that_pyenv_keeps_off_the_path(checkout):
    add_python(checkout, "3.12")
    survivor = checkout / "pyenv/versions/3.13.0/bin/python"
    survivor.parent.mkdir(parents=True)
    pathlib.Path(add_python(checkout, "3.13")).rename(survivor)
    code, output, created = make_venv(checkout, PYENV_ROOT=str(checkout / "pyenv"))
    assert (code, created) == (0, True) and str(survivor) in output


def test_an_interrupted_install_is_repeated(checkout):
    add_python(checkout, "3.12", pip=1)
    assert make_venv(checkout)[0] != 0
    add_python(checkout, "3.12")
    assert make_venv(checkout)[::2] == (0, True)


@pytest.mark.parametrize("env", [{}, {"PYTHON": "/nowhere/python"}])
def test_without_a_python_make_fails_in_one_line(checkout, env):
    code, output, created = make_venv(checkout, **env)
    assert (code, created, output.count("\n")) == (2, False, 1)
    assert env.get("PYTHON", "python3.13") in output
