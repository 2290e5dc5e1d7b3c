"""Import rules between rooms, no import cycles, and at most 400 lines per file."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "maknet_jax"

# Any module may import these; they import nothing of the package ("" is the package itself).
OPEN = {"", "errors", "files", "console"}
# The other rooms that a room may import. Verbs (modules at the root) may import any room.
ROOMS = {
    "ct": set(),
    "models": set(),
    "attribution": set(),
    "figures": set(),
    "data": {"ct"},
    "training": {"ct", "data"},
    "evaluation": {"ct", "data"},
    "phantom": {"ct", "data"},
    "runs": {"ct", "data", "models", "training"},
    "planning": {"ct", "data", "models", "training", "runs"},
    "explain": {"ct", "data", "models", "training", "runs", "attribution", "figures"},
    "cli": {"", "runs", "explain", "planning"},  # the verbs, configs, defaults of options, chips
}
ACCELERATOR = {"jax", "jaxlib", "flax", "optax"}
WITHOUT_ACCELERATOR = {"ct", "data", "evaluation", "figures", "phantom"}  # NumPy only
# Libraries that only one module of the package may import.
ONLY_IN = {
    "grain": "data.pipeline",
    "orbax": "training.checkpoint",  # its API changes with 1.0: one place to change
}
# They import TensorFlow, which is not a dependency.
FORBIDDEN = {"tensorflow", "clu.metric_writers", "clu.periodic_actions", "clu.checkpoint"}
LOADER = {"maknet_jax.runs.config.load"}  # a config may load another config
MAX_LINES = 400


def module_name(path, folder):
    """The dotted name below `folder`: data/labels.py -> data.labels, data/__init__.py -> data."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, package):
    """All names that a file imports, absolute, including imports inside functions.

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


def read_modules(repo):
    """Short module name -> (internal modules, external names) that it imports."""
    folder = repo / PACKAGE
    paths = {module_name(path, folder): path for path in sorted(folder.rglob("*.py"))}
    modules = {}
    for name, path in paths.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        internal, external = set(), set()
        for target in imported(path, f"{PACKAGE}.{inside}".rstrip(".")):
            if target.split(".")[0] != PACKAGE:
                external.add(target)
                continue
            # The longest prefix that is a module: the rest names a function or a class.
            short = target.removeprefix(PACKAGE).removeprefix(".")
            while short and short not in paths:
                short = short.rpartition(".")[0]
            internal.add(short)
        modules[name] = (internal, external)
    return modules


def room_of(name):
    """The room of a module; "" for modules at the root."""
    first = name.split(".")[0]
    return first if first in ROOMS else ""


def forbidden_imports(modules):
    """Yields one sentence for each import that violates the rules above."""
    for name, (internal, external) in modules.items():
        room = room_of(name)
        if not room and "." in name:
            yield f"{name} is in a room that tests/test_layering.py does not list"
        for target in sorted(internal - {name} - OPEN):
            if name in OPEN:
                yield f"{name or PACKAGE} is open to all rooms but imports {target}"
            elif room and room_of(target) not in ROOMS[room] | {room}:
                yield f"{name} imports {target}: the room {room} may not"
        for target in sorted(external):
            top = target.split(".")[0]
            if any(f"{target}.".startswith(f"{module}.") for module in FORBIDDEN):
                yield f"{name} imports {target}, which brings TensorFlow"
            if room in WITHOUT_ACCELERATOR and top in ACCELERATOR:
                yield f"{name} imports {target}: {room} is NumPy only"
            if ONLY_IN.get(top, name) != name:
                yield f"{name} imports {target}: only {ONLY_IN[top]} may"


def import_cycle(modules):
    """One import cycle as a list of modules, or an empty list."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :] + [name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(modules[name][0] - {name}):
            if cycle := visit(target):
                return cycle
        done.add(path.pop())
        return []

    return next((cycle for name in modules if (cycle := visit(name))), [])


def violations(repo):
    """All violations of the rules in `repo`, one sentence each."""
    modules = read_modules(repo)
    sentences = list(forbidden_imports(modules))
    if cycle := import_cycle(modules):
        sentences.append("import cycle: " + " -> ".join(cycle))
    for path in sorted((repo / "configs").rglob("*.py")):
        for target in sorted(imported(path, "configs")):
            if target.split(".")[0] != "ml_collections" and target not in LOADER:
                sentences.append(
                    f"configs/{path.name} imports {target}: only ml_collections may be"
                )
    for folder in (PACKAGE, "configs", "tests", "benchmarks"):
        for path in sorted((repo / folder).rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                sentences.append(
                    f"{path.relative_to(repo)} has {lines} lines, more than {MAX_LINES}"
                )
    return sentences


def test_import_rules_hold():
    assert len(read_modules(REPO)) > 5
    assert violations(REPO) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("maknet_jax/data/a.py", "from maknet_jax.models import b", "the room data may not"),
        ("maknet_jax/data/a.py", "from maknet_jax import models", "the room data may not"),
        ("maknet_jax/data/a.py", "from ..models import b", "the room data may not"),
        ("maknet_jax/models/a.py", "import maknet_jax.train", "the room models may not"),
        ("maknet_jax/training/a.py", "def f():\n  from maknet_jax.models import b", "may not"),
        (
            "maknet_jax/attribution/a.py",
            "import importlib\nimportlib.import_module('maknet_jax.data.c')",
            "the room attribution may not",
        ),
        ("maknet_jax/evaluation/a.py", "from maknet_jax.models import b", "evaluation may not"),
        ("maknet_jax/evaluation/a.py", "import jax.numpy as jnp", "NumPy only"),
        ("maknet_jax/ct/a.py", "from maknet_jax.data import c", "the room ct may not"),
        ("maknet_jax/runs/a.py", "from maknet_jax.evaluation import metrics", "runs may not"),
        ("maknet_jax/cellar/a.py", "", "does not list"),
        ("maknet_jax/errors.py", "from maknet_jax.data import c", "open to all rooms"),
        ("maknet_jax/__init__.py", "from maknet_jax.data import c", "open to all rooms"),
        ("maknet_jax/data/a.py", "import jax", "NumPy only"),
        ("maknet_jax/data/a.py", "from flax import struct", "NumPy only"),
        ("maknet_jax/data/a.py", "import grain.python", "only data.pipeline may"),
        ("maknet_jax/train.py", "import orbax.checkpoint", "only training.checkpoint may"),
        ("maknet_jax/train.py", "from clu import metric_writers", "brings TensorFlow"),
        ("maknet_jax/data/c.py", "from maknet_jax.data import d", "data.c -> data.d -> data.c"),
        ("configs/a.py", "import numpy", "only ml_collections"),
        ("configs/a.py", "from configs import b", "only ml_collections"),
        ("configs/a.py", "from maknet_jax.runs import workdir", "only ml_collections"),
        ("tests/a.py", "\n" * 401, "has 401 lines"),
    ],
)
def test_each_violation_is_reported(tmp_path, file, source, expected):
    sound = {
        "maknet_jax/__init__.py": "__version__ = '0'",
        "maknet_jax/errors.py": "class InputError(ValueError): ...",
        "maknet_jax/files.py": "import os",
        "maknet_jax/train.py": "from maknet_jax.data import c\nfrom maknet_jax.models import b",
        "maknet_jax/data/__init__.py": "",
        "maknet_jax/data/pipeline.py": "import grain",
        "maknet_jax/data/c.py": "import numpy\nfrom maknet_jax import __version__",
        "maknet_jax/data/d.py": "from maknet_jax.data.c import x\nfrom .. import files",
        "maknet_jax/models/__init__.py": "",
        "maknet_jax/models/b.py": "import flax.linen\nfrom maknet_jax.errors import InputError",
        "maknet_jax/training/checkpoint.py": "import orbax.checkpoint",
        "maknet_jax/evaluation/metrics.py": "from maknet_jax.data import c",
        "configs/b.py": "import ml_collections\nfrom maknet_jax.runs.config import load",
    }
    for name, text in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert any(expected in line for line in violations(tmp_path)), violations(tmp_path)
