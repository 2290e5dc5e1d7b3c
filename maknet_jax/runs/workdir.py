"""The files of a training run, and how the other verbs open them.

WORKDIR/config.json      the whole configuration
WORKDIR/dataset.json     labels, size, fingerprint and origin of the data that it was trained on
WORKDIR/checkpoints/N    the last states; WORKDIR/best/N the state of the best validation AUC
WORKDIR/metrics.jsonl    training and validation metrics; tensorboard/ the same
WORKDIR/log.jsonl        log messages; summary.json the final summary
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maknet_jax import console, files
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.runs.progress import Progress
from maknet_jax.training import checkpoint, sharding, transfer
from maknet_jax.training.state import TrainState, Variables

FOLDERS = {"best": "best", "last": "checkpoints"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network, ready to score.

    Attributes:
      config: the locked config.
      vocabulary: the labels in column order.
      variables: params and batch_stats, replicated over the mesh.
      thresholds: float `[K]`, chosen on the validation split; 0.5 where the run had none.
      step: the number of updates that the weights have seen.
      name: "best" or "last".
      assembly: the model and its jitted prediction step.
      trained_on: the source of the training data, such as "OpenKBP: head, neck, upper chest"; None
        where it is not recorded.
    """

    config: ConfigDict
    vocabulary: Vocabulary
    variables: Variables
    thresholds: np.ndarray
    step: int
    name: str
    assembly: build.Assembly
    trained_on: str | None = None

    @property
    def model(self) -> nn.Module:
        """The Flax module."""
        return self.assembly.model

    @property
    def mesh(self) -> Mesh:
        """The devices that it scores on."""
        return self.assembly.mesh

    @property
    def to_input(self) -> Callable[[jax.Array], jax.Array]:
        """int16 HU `[..., S, S, 3]` -> float32 network input in [0, 1]."""
        return self.assembly.to_input

    @property
    def model_name(self) -> str:
        """The name of the network in the config."""
        return self.config.model.name

    @property
    def size(self) -> int:
        """The edge S of the images in pixels."""
        return self.config.data.size

    @property
    def window(self) -> tuple[float, float]:
        """The HU that the network sees as 0 and 1."""
        low, high = self.config.data.window
        return low, high

    @property
    def batch_size(self) -> int:
        """Images per step in training, over all devices."""
        return self.config.data.batch_size

    @property
    def train_split(self) -> str:
        """The split that it was trained on."""
        return self.config.data.train_split

    @property
    def val_split(self) -> str:
        """The split of the best checkpoint and the thresholds."""
        return self.config.data.val_split

    @property
    def threads(self) -> int:
        """Threads per process that read and decompress images."""
        return self.config.data.threads

    def score(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """Logits `[B, K]` of a batch, on the devices: nothing waits for them."""
        on_mesh = sharding.put_batch(self.mesh, batch)
        return self.assembly.predict_step(self.variables, on_mesh["image"], on_mesh.get("box"))

    def predict(
        self, variables: Variables, batch: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """See `Assembly.predict`."""
        return self.assembly.predict(variables, batch)


def open_run(
    workdir: str | os.PathLike[str],
    *,
    checkpoint_name: str = "best",
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Opens a workdir for scoring.

    Args:
      workdir: a folder of `maknet train`.
      checkpoint_name: "best" or "last"; without a best checkpoint the last one is taken.
      devices: the devices to score on; None takes all of all processes.

    Raises:
      InputError: it is not a workdir, or holds no intact checkpoint.
    """
    opened = _open(pathlib.Path(workdir), checkpoint_name, sharding.data_mesh(devices))
    thresholds = opened.progress.thresholds or [0.5] * len(opened.vocabulary)
    return Run(
        opened.config,
        opened.vocabulary,
        sharding.put_state(opened.assembly.mesh, opened.state.variables),
        np.asarray(thresholds),
        int(opened.state.step),
        opened.name,
        opened.assembly,
        opened.trained_on,
    )


def open_weights(
    path: str | os.PathLike[str], *, vocabulary: Vocabulary | None = None
) -> tuple[Variables, Variables, dict[str, Any]]:
    """Reads weights to start a training from.

    Args:
      path: a file of `maknet import-weights`, or a workdir: its best checkpoint, else its last.
      vocabulary: the labels that a workdir's head must have; None where the head is not needed.

    Returns:
      (params, batch_stats, metadata): NumPy arrays, and a dict of the path, the digest of the
      arrays and what they are.

    Raises:
      InputError: the path is neither, it is damaged, or its head is of other labels.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        opened = _open(path, "best", sharding.data_mesh())
        if vocabulary is not None and opened.vocabulary.names != vocabulary.names:
            raise InputError(
                f"{path} has other labels than the data: set init.head to False, or use data with "
                "the same labels"
            )
        variables = opened.state.variables
        params, batch_stats = variables["params"], variables["batch_stats"]
        metadata: dict[str, Any] = {"model": opened.config.model.name}
        metadata |= {"checkpoint": opened.name, "step": int(opened.state.step)}
    else:
        params, batch_stats, metadata = transfer.read(path)
    metadata |= {"path": str(path), "digest": transfer.digest(params, batch_stats)}
    return params, batch_stats, metadata


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A workdir with one of its checkpoints as NumPy arrays."""

    config: ConfigDict
    vocabulary: Vocabulary
    assembly: build.Assembly
    state: TrainState
    progress: Progress
    name: str
    trained_on: str | None


def _open(workdir: pathlib.Path, checkpoint_name: str, mesh: Mesh) -> _Opened:
    if checkpoint_name not in FOLDERS:
        raise InputError(f"checkpoint {checkpoint_name!r} is unknown: choose best or last")
    try:
        config = configs.from_json(files.read_json(workdir / "config.json"))
        dataset = files.read_json(workdir / "dataset.json")
    except FileNotFoundError:
        raise InputError(
            f"{workdir} is not a `maknet train` workdir: it has no config.json"
        ) from None
    vocabulary = Vocabulary.from_json(dataset["labels"])
    assembly = build.assemble(config, len(vocabulary), mesh)
    for name in dict.fromkeys((checkpoint_name, "last")):
        folder = workdir / FOLDERS[name]
        if not folder.is_dir():
            continue
        with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
            try:
                restored = checkpoints.restore(assembly.shapes)
            except InputError as error:
                if name == "last":
                    raise
                console.Log().say(f"{error}; taking the last checkpoint instead")
                continue
        for number, reason in restored.damaged.items():
            console.Log().say(f"{folder / str(number)} is damaged and skipped: {reason}")
        if restored.state is not None:
            progress = Progress.from_json(restored.metadata)
            source = dataset.get("origin", {}).get("source")
            return _Opened(config, vocabulary, assembly, restored.state, progress, name, source)
    raise InputError(f"{workdir} holds no checkpoint yet: wait for the first one of `maknet train`")
