"""The files of a training run, and opening a workdir or a bundle for the other verbs.

WORKDIR/config.json      the whole config
WORKDIR/dataset.json     labels, size, fingerprint and origin of the training data
WORKDIR/checkpoints/N    the last states; WORKDIR/best/N the state of the best validation AUC
WORKDIR/domain.safetensors  out-of-domain statistics, see `domain_file`
WORKDIR/metrics.jsonl    training and validation metrics; tensorboard/ the same
WORKDIR/log.jsonl        log messages; summary.json the final summary
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maknet_jax import console, files
from maknet_jax.data import object_store
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, did_you_mean
from maknet_jax.runs import build, bundle, domain_file, remote
from maknet_jax.runs import config as configs
from maknet_jax.runs.progress import Progress
from maknet_jax.runs.run import Run
from maknet_jax.training import agreement, checked, checkpoint, sharding, transfer
from maknet_jax.training.state import Variables

FOLDERS = {"best": "best", "last": "checkpoints"}


def open_run(
    source: str | os.PathLike[str],
    *,
    checkpoint_name: str = "best",
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Opens a trained network for scoring; all verbs use this function.

    Args:
      source: a workdir of `maknet train` or its s3:// or gs:// URL, a bundle (folder or .zip), or
        the name of a released one.
      checkpoint_name: "best" or "last"; without a best checkpoint the last one is used. A bundle
        contains one of them.
      devices: the devices to score on; None takes all devices of all processes.

    Raises:
      InputError: it is neither, has no intact checkpoint, or is damaged.
    """
    path, mesh = find(source), sharding.data_mesh(devices)
    opened = (_open_bundle if bundle.is_bundle(path) else _open)(path, checkpoint_name, mesh)
    return Run(
        opened.config,
        opened.vocabulary,
        sharding.put_state(opened.assembly.mesh, opened.variables),
        opened.thresholds,
        opened.step,
        opened.name,
        opened.assembly,
        path,
        os.fspath(source) if object_store.is_url(source) else None,
        opened.dataset,
        opened.metadata,
        bundle.is_bundle(path),
        opened.domain,
    )


def find(source: str | os.PathLike[str], also: str = "") -> pathlib.Path:
    """The path of a workdir or a bundle, or of the released model of that name.

    A workdir in an object store is copied; the path is that of the copy.

    Args:
      source: a path or a name.
      also: what else the caller accepts, for the message.

    Raises:
      InputError: no such path or released model exists.
    """
    if object_store.is_url(source):
        return remote.view(os.fspath(source))
    files.check_local(source)
    path, released = pathlib.Path(source), bundle.released()
    if path.exists():
        return path
    if str(source) in released:
        return released[str(source)]
    known = ", ".join(released) or "none in this version"
    hint = did_you_mean(str(source), released, likeness=0.6)
    raise InputError(
        f"{source} not found: {f'{hint} Or ' if hint else ''}pass {also}a workdir of `maknet "
        f"train`, a bundle (folder or .zip) or the name of a released model ({known})"
    )


class Weights(NamedTuple):
    """Initial weights for training.

    Attributes:
      params: NumPy arrays.
      batch_stats: NumPy arrays.
      metadata: path, digest of the arrays, and their origin.
      model: name and options of the network, as in a config; the name is "" where unknown.
      vocabulary: the labels of the head; None where there is no head.
    """

    params: Variables
    batch_stats: Variables
    metadata: dict[str, Any]
    model: dict[str, Any]
    vocabulary: Vocabulary | None


def open_weights(source: str | os.PathLike[str]) -> Weights:
    """Reads initial weights for training.

    Args:
      source: a file of `maknet import-weights`; a workdir, of which the best checkpoint or else the
        last is read; a bundle; or the name of a released one.

    Raises:
      InputError: it is none of these, or damaged.
    """
    path = find(source, "a .safetensors file, ")
    if bundle.is_bundle(path):
        content = bundle.read(path)
        variables, config = content.variables(), content.config
        vocabulary, saved = content.vocabulary, content.info["checkpoint"]
        name, step = saved["name"], saved["step"]
    elif path.is_dir():
        opened = _open(path, "best", sharding.data_mesh())
        variables, config = opened.variables, opened.config
        vocabulary, name, step = opened.vocabulary, opened.name, opened.step
    else:
        params, batch_stats, metadata = transfer.read(path)
        model = {"name": metadata.get("model", ""), "options": {}}
        metadata = dict(metadata) | {
            "path": str(source),
            "digest": transfer.digest(params, batch_stats),
        }
        return Weights(params, batch_stats, metadata, model, None)
    params, batch_stats = variables["params"], variables["batch_stats"]
    metadata = {
        "model": config.model.name,
        "checkpoint": name,
        "step": step,
        "path": str(source),
        "digest": transfer.digest(params, batch_stats),
    }
    return Weights(params, batch_stats, metadata, configs.to_json(config)["model"], vocabulary)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A workdir with one of its checkpoints, or a bundle; the variables are NumPy arrays."""

    config: ConfigDict
    vocabulary: Vocabulary
    variables: Variables
    thresholds: np.ndarray
    step: int
    name: str
    assembly: build.Assembly
    dataset: dict[str, Any]
    metadata: dict[str, Any]
    domain: domain_file.Statistics | None


def _open_bundle(path: pathlib.Path, checkpoint_name: str, mesh: Mesh) -> _Opened:
    content = bundle.read(path)
    saved = content.info["checkpoint"]
    _check_checkpoint_name(checkpoint_name)
    if checkpoint_name == "last" and saved["name"] != "last":
        raise InputError(f"{path} is a bundle of the {saved['name']} checkpoint: omit --checkpoint")
    try:
        assembly = build.assemble(content.config, len(content.vocabulary), mesh)
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"bundle {path}: its config describes no network ({error})") from None
    variables = content.variables()
    try:
        assembly.check(variables)
    except checked.OtherWeightsError:
        # Names the array as it is called in the bundle.
        shapes = {"params": assembly.shapes.params, "batch_stats": assembly.shapes.batch_stats}
        content.variables(shapes)
        raise
    return _Opened(
        content.config,
        content.vocabulary,
        variables,
        content.thresholds,
        saved["step"],
        saved["name"],
        assembly,
        content.info["data"],
        content.info,
        content.domain,
    )


def _check_checkpoint_name(name: str) -> None:
    if name not in FOLDERS:
        raise InputError(f"checkpoint {name!r} is unknown: choose best or last")


def _open(workdir: pathlib.Path, checkpoint_name: str, mesh: Mesh) -> _Opened:
    _check_checkpoint_name(checkpoint_name)
    try:
        config = configs.read_stored(workdir)
        dataset = files.read_json(workdir / "dataset.json")
        vocabulary = Vocabulary.from_json(dataset["labels"])
        _ = vocabulary.parents, dataset["path"] + "", dict(dataset.get("origin") or {})
    except (FileNotFoundError, NotADirectoryError):
        problem = "is not a `maknet train` workdir: it has no config.json"
        raise InputError(f"{workdir} {problem}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        problem = f"is not that of a training run ({type(error).__name__}: {error})"
        raise InputError(f"{workdir / 'dataset.json'} {problem}: restore a copy of it") from None
    assembly = build.assemble(config, len(vocabulary), mesh)
    for name in dict.fromkeys((checkpoint_name, "last")):
        folder = workdir / FOLDERS[name]
        if not sharding.exchange(folder.is_dir())[0]:  # as process 0 sees it
            continue
        with contextlib.closing(checkpoint.Checkpoints(folder, writable=False)) as checkpoints:
            try:
                restored = agreement.restore(checkpoints)
            except InputError as error:
                if name == "last":
                    raise
                console.Log().say(f"{error}; using the last checkpoint instead")
                continue
        for number, reason in restored.damaged.items():
            console.Log().say(f"skipping damaged checkpoint {folder / str(number)}: {reason}")
        if restored.state is not None:
            thresholds = Progress.from_json(restored.metadata).thresholds
            step = int(restored.state.step)
            return _Opened(
                config,
                vocabulary,
                restored.state.variables,
                np.asarray(thresholds or [0.5] * len(vocabulary)),
                step,
                name,
                assembly,
                dataset,
                restored.metadata,
                domain_file.read(workdir, step),
            )
    raise InputError(f"{workdir} has no checkpoint yet: wait for the first one of `maknet train`")
