"""Run configurations: loaded by name or path, changed by overrides, stored as JSON.

A config is a Python file with a function `get_config()` that returns a `ConfigDict`. `teacher` and
`smoke` list every field; the other training configs load one of them and change some fields.
"""

import ast
import copy
import difflib
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import ml_collections

from maknet_jax import files
from maknet_jax.errors import InputError
from maknet_jax.runs import ranges

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | Mapping[str, Value]"

# Fields missing in configs of earlier versions -> the value that reproduces such a run.
ADDED_FIELDS: dict[str, Value] = {
    "pseudo": {"path": "", "batch_size": 64, "balance": 0},  # labelled images only
    "init.shared_labels": False,  # a new head
    "init": {"path": "", "head": False, "shared_labels": False},  # random weights
    "ema_decay": 0.0,  # no average of the weights
    "domain_components": 64,  # no result of the training depends on it
    "checkpoint_minutes": 30.0,  # no result depends on it
    "accumulate": 1,  # the whole batch at once
    "remat": False,
    "skip_nonfinite": 10,  # earlier versions stopped instead
    "augment.translation_probability": 0.0,
    "augment.translation_range": 0.1,  # not used at probability 0
}

# Those of them on which no result depends: a run that lacks them takes them from the command.
FREE_FIELDS = {"domain_components", "checkpoint_minutes", "skip_nonfinite", "remat"}

# The same for configs of `maknet noisy-student`.
_ADDED_TO_ROUNDS: dict[str, Value] = {"precision": 0.0}  # one threshold for all labels

FROM_INIT = "from_init"  # model.name: the network of init.path, see `setup.set_up`


def folder() -> pathlib.Path:
    """The folder of the configs: in the installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Loads a config.

    Args:
      name: the name of a config in `folder()`, such as `teacher`; or the path of a Python file with
        a function `get_config()`, of a `config.json`, or of a workdir.
      overrides: strings such as `optimizer.learning_rate=0.003`.

    Returns:
      A locked `ConfigDict`. Fields that were added since the config was written have the value that
      reproduces it, see `ADDED_FIELDS`.

    Raises:
      InputError: the config or a field does not exist, or a value has the wrong type.
    """
    path = _find(os.fspath(name))
    config = _read_json(path) if path.suffix == ".json" else _run_file(path)
    config.unlock()
    _add_fields(config)
    for override in overrides:
        _override(config, override)
    return config.lock()


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain dicts, lists and values, as in a workdir's `config.json`."""
    return json.loads(config.to_json())


def from_json(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The inverse of `to_json`, locked: lists become tuples, `ADDED_FIELDS` are added."""

    def restore(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: restore(child) for key, child in node.items()}
        return tuple(restore(child) for child in node) if isinstance(node, list) else node

    completed = copy.deepcopy(dict(values))
    _add_fields(completed)
    return ml_collections.ConfigDict(restore(completed)).lock()


def read_stored(folder: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """The config of a run, from the `config.json` of its workdir.

    Raises:
      FileNotFoundError: there is none.
      InputError: it is damaged, or not the config of a training run.
    """
    path = pathlib.Path(folder) / "config.json"
    values = files.read_json(path)
    try:
        config = from_json(values)
        _compare(config, load("teacher"), "")
        str(config.model.options.items()), str(config.loss.name), str(config.optimizer.name)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{path} is not the config of a training run ({reason}): restore a copy of it"
        ) from None
    return config


def _compare(config: Any, whole: ml_collections.ConfigDict, name: str) -> None:
    """Raises TypeError where a field that all runs have is missing or of another type."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise TypeError(f"{name or 'it'} is not a group of fields")
    for key, value in whole.items():
        if key not in config:
            raise TypeError(f"{name}{key} is missing")
        if key in ("options", "loss", "optimizer"):  # differ between networks, losses, optimisers
            continue
        if isinstance(value, ml_collections.ConfigDict):
            _compare(config[key], value, f"{name}{key}.")
        elif type(config[key]) is not type(value) and not (
            type(value) is float and type(config[key]) is int
        ):
            raise TypeError(f"{name}{key} is not of type {type(value).__name__}")


def as_stored(
    config: ml_collections.ConfigDict, stored: Mapping[str, Any], *, lacking: bool = True
) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """A config for resuming a run whose stored config lacks some of the `ADDED_FIELDS`.

    Args:
      config: the config of the command that resumes the run.
      stored: the content of the run's `config.json`.
      lacking: take only the fields that `stored` lacks; else all `ADDED_FIELDS`.

    Returns:
      (the config, locked, and the fields that it takes from the run instead with their values).
    """
    completed = from_json(stored)
    resumed = config.copy_and_resolve_references().unlock()
    changed: dict[str, Any] = {}
    for key, value in ADDED_FIELDS.items():
        if isinstance(value, Mapping) or key in FREE_FIELDS:  # a group has paths in it
            continue
        *groups, field = key.split(".")
        before: Any = stored
        run, command = completed, resumed
        for group in groups:
            before, run, command = before.get(group, {}), run[group], command[group]
        if not (lacking and field in before) and command[field] != run[field]:
            command[field] = run[field]
            changed[key] = run[field]
    return resumed.lock(), changed


def _find(name: str) -> pathlib.Path:
    """The Python or JSON file that `load` reads for `name`."""
    path = pathlib.Path(name)
    shipped = folder() / f"{name}.py"
    if path.suffix == ".py" and not path.is_file() and path.parent.name == "configs":
        shipped = folder() / path.name  # `configs/teacher.py` also works outside a checkout
    if path.suffix not in (".py", ".json") and not shipped.is_file() and path.is_dir():
        path = path / "config.json"
    for candidate in (shipped, path):
        if candidate.suffix in (".py", ".json") and candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in folder().glob("[!_]*.py")))
    raise InputError(
        f"config {name!r} not found: pass a .py file, a config.json, a workdir or one of {known}"
    )


def _read_json(path: pathlib.Path) -> ml_collections.ConfigDict:
    try:
        return from_json(files.read_json(path))
    except (ValueError, TypeError) as error:
        raise InputError(f"config {path} is not a config: {error}") from None


def _run_file(path: pathlib.Path) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"maknet_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it has a loader: its suffix is .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config()
    except InputError as error:
        raise InputError(f"config {path}: {error}") from None
    except Exception as error:
        # A user's file can raise any exception; the message must name the file.
        raise InputError(f"config {path} fails: {type(error).__name__}: {error}") from None


def _add_fields(config: Any) -> None:
    """Adds the missing `ADDED_FIELDS` to a dict or a `ConfigDict` in place."""
    if "model" in config:
        fields = ADDED_FIELDS
    else:
        fields = _ADDED_TO_ROUNDS if "rounds" in config else {}
    for key, value in fields.items():
        *groups, field = key.split(".")
        node = config
        for group in groups:
            node = node.get(group, {})  # a missing group stays missing
        if field not in node:
            node[field] = copy.deepcopy(value)


def _override(config: ml_collections.ConfigDict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(
            f"override {text!r} should be key=value, such as optimizer.learning_rate=0.003"
        )
    *parents, field = key.split(".")
    group = _group(config, parents, key)
    if parents and parents[-1].endswith("_options"):  # of a module whose options are not listed
        group[field] = _literal(value)
        return
    old = group[_known(group, field, key)]
    group[field] = _convert(value if isinstance(old, str) else _literal(value), old, key)


def _group(
    config: ml_collections.ConfigDict, names: Sequence[str], key: str
) -> ml_collections.ConfigDict:
    """The group of fields at `names`, the first parts of `key`."""
    node = config
    for name in names:
        node = node[_known(node, name, key)]
        if not isinstance(node, ml_collections.ConfigDict):
            raise InputError(f"config field {name!r} in {key!r} is a value, not a group of fields")
    return node


def _known(node: ml_collections.ConfigDict, name: str, key: str) -> str:
    if name not in node:
        near = difflib.get_close_matches(name, node.keys(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(node.keys())}"
        raise InputError(f"config field {key!r} is unknown: {hint}")
    return name


def _convert(value: Any, old: Any, key: str) -> Any:
    """`value` converted to the type of `old`, the field's current value."""
    if isinstance(old, ml_collections.ConfigDict):
        raise InputError(f"config field {key!r} is a group: name one of {', '.join(old.keys())}")
    converted = value
    if isinstance(old, bool) and isinstance(value, str) and value.lower() in ("true", "false"):
        converted = value.lower() == "true"
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        converted = float(value)
    if isinstance(old, tuple) and isinstance(value, (int, float)):
        converted = (value,)
    if isinstance(old, tuple) and isinstance(value, list):
        converted = tuple(value)
    if old is not None and type(converted) is not type(old):
        expected = type(old).__name__
        raise InputError(f"config field {key!r} should be of type {expected}, not {value!r}")
    return converted


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def validate(config: ml_collections.ConfigDict, size: int, devices: int) -> None:
    """Checks the values of a training config beyond their types.

    Args:
      config: the config of `maknet train`.
      size: the edge of the images of the data set `data.path`, in pixels.
      devices: the number of devices to train on.

    Raises:
      InputError: a value is out of range, or does not match the data or the devices.
    """
    if size != config.data.size:
        raise InputError(
            f"config data.size {config.data.size} does not match the {size} of {config.data.path}: "
            "change one of them"
        )
    ranges.check(config.to_dict())
    if not 0 <= config.domain_components <= 64:
        raise InputError(f"config domain_components {config.domain_components} should be in 0..64")
    window = config.data.window
    if len(window) != 2 or not window[0] < window[1]:
        raise InputError(f"config data.window {tuple(window)} should be (low, high) in HU")
    batch_sizes = {"data": config.data.batch_size}
    if config.pseudo.path:
        batch_sizes["pseudo"] = config.pseudo.batch_size
    for name, batch_size in batch_sizes.items():
        if batch_size < 1 or batch_size % (devices * config.accumulate):
            rule = f"above 0 and a multiple of the {devices} device(s)"
            if config.accumulate > 1:
                rule += f" times accumulate {config.accumulate}"
            raise InputError(f"config {name}.batch_size {batch_size} should be {rule}")
