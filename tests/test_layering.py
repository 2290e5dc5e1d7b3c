"""The house as design.md draws it: what each room may import, no circles, no long files."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "maknet_jax"

# The floor: importable from everywhere, imports nothing of ours ("" is the package itself).
FLOOR = {"", "errors", "files"}
# What else of ours a room may import. Verbs, the modules at the root, may import any room.
ROOMS = {
    "data": set(),
    "models": set(),
    "training": set(),
    "attribution": set(),
    "evaluation": {"data"},
    "cli": {""},  # the shell over the verbs
}
ACCELERATOR = {"jax", "jaxlib", "flax", "optax"}
# Libraries that only one module of a room, or of the whole package, may import.
ONLY_IN = {
    ("data", "jax"): "data.augment",
    ("data", "grain"): "data.pipeline",
    ("", "orbax"): "training.checkpoint",  # its API changes with 1.0: one place to mend
}
# They import TensorFlow (facts.md), which is no dependency.
FORBIDDEN = {"tensorflow", "clu.metric_writers", "clu.periodic_actions", "clu.checkpoint"}
LONGEST = 400


def module_name(path, folder):
    """The dotted name below `folder`: data/labels.py -> data.labels, data/__init__.py -> data."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, package):
    """All names that a file imports, absolute, wherever the import stands (functions included).

    `from a import b` yields a.b, because b may be a module. `package` is the dotted package that
    relative imports start from.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join(parents + [base] * bool(base))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def read_house(repo):
    """Per module of the package (short name): (our modules, other names) that it imports."""
    folder = repo / PACKAGE
    paths = {module_name(path, folder): path for path in sorted(folder.rglob("*.py"))}
    house = {}
    for name, path in paths.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        ours, others = set(), set()
        for target in imported(path, f"{PACKAGE}.{inside}".rstrip(".")):
            if target.split(".")[0] != PACKAGE:
                others.add(target)
                continue
            # The longest prefix that is a module: the rest names a function or a class.
            short = target.removeprefix(PACKAGE).removeprefix(".")
            while short and short not in paths:
                short = short.rpartition(".")[0]
            ours.add(short)
        house[name] = (ours, others)
    return house


def room_of(name):
    """The room that a module lies in; "" for the modules at the root."""
    first = name.split(".")[0]
    return first if first in ROOMS else ""


def wrong_imports(house):
    """Yields a sentence for each import that the table above does not allow."""
    for name, (ours, others) in house.items():
        room = room_of(name)
        if not room and "." in name:
            yield f"{name} lies in a room that tests/test_layering.py does not know"
        for target in sorted(ours - {name}):
            if name in FLOOR:
                yield f"{name or PACKAGE} belongs to the floor and imports {target or PACKAGE}"
            elif room and target not in FLOOR and room_of(target) not in ROOMS[room] | {room}:
                yield f"{name} imports {target}: the room {room} may not"
        for target in sorted(others):
            top = target.split(".")[0]
            if any(f"{target}.".startswith(f"{bad}.") for bad in FORBIDDEN):
                yield f"{name} imports {target}, which brings TensorFlow"
            if room == "evaluation" and top in ACCELERATOR:
                yield f"{name} imports {target}: evaluation is numpy only"
            library = "jax" if top in ACCELERATOR else top
            for where in {room, ""}:
                only = ONLY_IN.get((where, library), name)
                if only != name:
                    yield f"{name} imports {target}: only {only} may"


def circle(house):
    """One circle of imports as a list of modules, or an empty list."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :] + [name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(house[name][0] - {name}):
            if found := visit(target):
                return found
        done.add(path.pop())
        return []

    return next((found for name in house if (found := visit(name))), [])


def faults(repo):
    """All that is wrong with the house in `repo`, one sentence each."""
    house = read_house(repo)
    found = list(wrong_imports(house))
    if ring := circle(house):
        found.append("imports run in a circle: " + " -> ".join(ring))
    for path in sorted((repo / "configs").rglob("*.py")):
        for target in sorted(imported(path, "configs")):
            if target.split(".")[0] != "ml_collections":
                found.append(f"configs/{path.name} imports {target}: only ml_collections may be")
    for folder in (PACKAGE, "configs", "tests", "benchmarks"):
        for path in sorted((repo / folder).rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > LONGEST:
                found.append(f"{path.relative_to(repo)} has {lines} lines, more than {LONGEST}")
    return found


def test_the_house_stands():
    assert len(read_house(REPO)) > 5
    assert faults(REPO) == []


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("maknet_jax/data/a.py", "from maknet_jax.models import b", "the room data may not"),
        ("maknet_jax/data/a.py", "from maknet_jax import models", "the room data may not"),
        ("maknet_jax/data/a.py", "from ..models import b", "the room data may not"),
        ("maknet_jax/models/a.py", "import maknet_jax.train", "the room models may not"),
        ("maknet_jax/training/a.py", "def f():\n  from maknet_jax.data import c", "may not"),
        (
            "maknet_jax/attribution/a.py",
            "import importlib\nimportlib.import_module('maknet_jax.data.c')",
            "the room attribution may not",
        ),
        ("maknet_jax/evaluation/a.py", "from maknet_jax.models import b", "evaluation may not"),
        ("maknet_jax/evaluation/a.py", "import jax.numpy as jnp", "numpy only"),
        ("maknet_jax/cellar/a.py", "", "does not know"),
        ("maknet_jax/errors.py", "from maknet_jax import files", "belongs to the floor"),
        ("maknet_jax/__init__.py", "from maknet_jax.data import c", "belongs to the floor"),
        ("maknet_jax/data/a.py", "import jax", "only data.augment may"),
        ("maknet_jax/data/a.py", "from flax import struct", "only data.augment may"),
        ("maknet_jax/data/a.py", "import grain.python", "only data.pipeline may"),
        ("maknet_jax/train.py", "import orbax.checkpoint", "only training.checkpoint may"),
        ("maknet_jax/train.py", "from clu import metric_writers", "brings TensorFlow"),
        ("maknet_jax/data/c.py", "from maknet_jax.data import d", "data.c -> data.d -> data.c"),
        ("configs/a.py", "import numpy", "only ml_collections"),
        ("configs/a.py", "from configs import b", "only ml_collections"),
        ("tests/a.py", "\n" * 401, "has 401 lines"),
    ],
)
def test_each_fault_is_seen(tmp_path, file, source, fault):
    sound = {
        "maknet_jax/__init__.py": "__version__ = '0'",
        "maknet_jax/errors.py": "class InputError(ValueError): ...",
        "maknet_jax/files.py": "import os",
        "maknet_jax/train.py": "from maknet_jax.data import c\nfrom maknet_jax.models import b",
        "maknet_jax/data/__init__.py": "",
        "maknet_jax/data/augment.py": "import jax",
        "maknet_jax/data/pipeline.py": "import grain",
        "maknet_jax/data/c.py": "import numpy\nfrom maknet_jax import __version__",
        "maknet_jax/data/d.py": "from maknet_jax.data.c import x\nfrom .. import files",
        "maknet_jax/models/__init__.py": "",
        "maknet_jax/models/b.py": "import flax.linen\nfrom maknet_jax.errors import InputError",
        "maknet_jax/training/checkpoint.py": "import orbax.checkpoint",
        "maknet_jax/evaluation/metrics.py": "from maknet_jax.data import c",
        "configs/b.py": "import ml_collections",
    }
    for name, text in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults(tmp_path) == []
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert any(fault in line for line in faults(tmp_path)), faults(tmp_path)
