"""Run configurations: one Python page each, found by name or path, changed on the command line."""

import ast
import difflib
import importlib.util
import json
import pathlib

import ml_collections

from maknet_jax.errors import InputError


def folder():
    """Where the configs lie: in the installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(name, overrides=()):
    """Loads a configuration.

    Args:
      name: `teacher` (a page of ours) or a path to a Python file with `get_config()`.
      overrides: strings `optimizer.learning_rate=0.003`.

    Returns:
      A locked `ConfigDict`.

    Raises:
      InputError: no such config or field, or a value of another type.
    """
    path = pathlib.Path(name)
    if path.suffix != ".py":
        path = folder() / f"{name}.py"
    elif not path.is_file() and path.parent.name == "configs":
        path = folder() / path.name  # `configs/teacher.py` also works outside a checkout
    if not path.is_file():
        known = sorted(page.stem for page in folder().glob("[!_]*.py"))
        raise InputError(f"config {name!r} is not there: give a path or one of {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(f"maknet_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        # A user's page can fail in any way; the line must say which page.
        raise InputError(f"config {path} fails: {type(error).__name__}: {error}") from None
    for override in overrides:
        _override(config, override)
    config.lock()
    return config


def _override(config, text):
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"override {text!r} should be key=value, as optimizer.learning_rate=0.003")
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = node[_known(node, part, key)]
        if not isinstance(node, ml_collections.ConfigDict):
            raise InputError(f"config field {part!r} in {key!r} is a value, not a group of fields")
    if parents and parents[-1].endswith("_options"):  # of a part that the page may not know
        node[last] = _literal(value)
        return
    _known(node, last, key)
    node[last] = _parse(value, node[last], key)


def _known(node, part, key):
    if part not in node:
        near = difflib.get_close_matches(part, node.keys(), n=1)
        mend = f"did you mean {near[0]!r}" if near else f"known are {', '.join(node.keys())}"
        raise InputError(f"config field {key!r} is unknown: {mend}")
    return part


def _parse(text, old, key):
    if isinstance(old, ml_collections.ConfigDict):
        raise InputError(f"config field {key!r} is a group: name one of {', '.join(old.keys())}")
    value = _literal(text)
    if isinstance(old, bool) and isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, (int, float)):
        value = (value,)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, str):
        value = text
    if old is not None and type(value) is not type(old):
        raise InputError(f"config field {key!r} is a {type(old).__name__}, {text!r} is not")
    return value


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def to_json(config):
    """A plain dict of the config, as `config.json` in a workdir holds it."""
    return json.loads(config.to_json())


def from_json(value):
    """The inverse of `to_json`, locked (tuples come back as tuples)."""

    def restore(node):
        if isinstance(node, dict):
            return {key: restore(child) for key, child in node.items()}
        return tuple(restore(child) for child in node) if isinstance(node, list) else node

    return ml_collections.ConfigDict(restore(value)).lock()


def validate(config: ml_collections.ConfigDict, size: int, devices: int) -> None:
    """Checks the values of a training config that its types do not.

    Args:
      config: the config of `maknet train`.
      size: the edge of the images of the data set `data.path`, in pixels.
      devices: the number of devices to train on.

    Raises:
      InputError: a value is out of range, or does not fit the data or the devices.
    """
    if size != config.data.size:
        raise InputError(
            f"config data.size {config.data.size} does not match the {size} of {config.data.path}: "
            "change one of them"
        )
    for name in ("epochs", "evaluate_every", "checkpoint_every", "log_every"):
        if not 0 < config[name] < 1e9:
            raise InputError(f"config {name} {config[name]} should be above 0 and below 1e9")
    values = {"seed": config.seed, "data.threads": config.data.threads}
    for name, value in (values | {"pseudo.balance": config.pseudo.balance}).items():
        if value < 0:
            raise InputError(f"config {name} {value} should be 0 or above")
    window = config.data.window
    if len(window) != 2 or not window[0] < window[1]:
        raise InputError(f"config data.window {tuple(window)} should be (low, high) in HU")
    if not 0 <= config.ema_decay < 1:
        raise InputError(f"config ema_decay {config.ema_decay} should be 0 or above and below 1")
    batch_sizes = {"data": config.data.batch_size}
    if config.pseudo.path:
        batch_sizes["pseudo"] = config.pseudo.batch_size
    for name, batch_size in batch_sizes.items():
        if batch_size < 1 or batch_size % devices:
            rule = f"above 0 and a multiple of the {devices} device(s)"
            raise InputError(f"config {name}.batch_size {batch_size} should be {rule}")
