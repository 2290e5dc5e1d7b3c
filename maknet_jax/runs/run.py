"""A trained network, ready to score; `workdir.open_run` opens it."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maknet_jax import files
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError
from maknet_jax.runs import build, domain_file
from maknet_jax.training import sharding
from maknet_jax.training.state import Variables


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network, ready to score.

    Attributes:
      config: the locked config.
      vocabulary: the labels in column order.
      variables: params and batch_stats, replicated over the mesh.
      thresholds: float `[K]`, chosen on the validation split; 0.5 if the run had none.
      step: the number of updates.
      name: "best" or "last".
      assembly: the model and its jitted prediction step.
      source: the workdir or the bundle, or the local copy of a workdir in an object store.
      url: of a workdir in an object store; None for paths.
      dataset: the workdir's `dataset.json`, or the entry `data` of a bundle.
      metadata: the metadata of the checkpoint, or `bundle.json`.
      is_bundle: whether it was opened from a bundle.
      domain: out-of-domain statistics of these weights; None without them.
    """

    config: ConfigDict
    vocabulary: Vocabulary
    variables: Variables
    thresholds: np.ndarray
    step: int
    name: str
    assembly: build.Assembly
    source: pathlib.Path
    url: str | None
    dataset: Mapping[str, Any]
    metadata: Mapping[str, Any]
    is_bundle: bool
    domain: domain_file.Statistics | None

    @property
    def trained_on(self) -> str | None:
        """The source of the training data, such as "OpenKBP: head, neck"; None if not recorded."""
        source = (self.dataset.get("origin") or {}).get("source")
        return files.printable(source) if isinstance(source, str) else None

    @property
    def data_kind(self) -> str | None:
        """The kind of the training data: deeplesion, phantom, table, ...; None if not recorded."""
        return (self.dataset.get("origin") or {}).get("kind")

    @property
    def address(self) -> str:
        """The URL or the absolute path."""
        return self.url or str(self.source.absolute())

    @property
    def is_read_only(self) -> bool:
        """Whether results must be written elsewhere."""
        return self.is_bundle or self.url is not None

    @property
    def data_path(self) -> str:
        """The training data set.

        Raises:
          InputError: the run is a bundle, which has no path to its data.
        """
        if self.is_bundle:
            raise InputError(f"{self.source} is a bundle, which contains no data: add --data")
        return self.dataset["path"]

    def output_folder(self, name: str) -> pathlib.Path:
        """The folder in the workdir where a verb writes by default.

        Raises:
          InputError: the run is a bundle or in an object store: it is read-only.
        """
        if self.is_read_only:
            place = "a bundle" if self.is_bundle else "in an object store"
            raise InputError(f"{self.url or self.source} is {place}, which is read-only: add --out")
        return self.source / name

    @property
    def model(self) -> nn.Module:
        """The Flax module."""
        return self.assembly.model

    @property
    def mesh(self) -> Mesh:
        """The devices used for scoring."""
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
        """The HU that are mapped to 0 and 1."""
        low, high = self.config.data.window
        return low, high

    @property
    def batch_size(self) -> int:
        """Images per step in training, over all devices."""
        return self.config.data.batch_size

    @property
    def train_split(self) -> str:
        """The training split."""
        return self.config.data.train_split

    @property
    def val_split(self) -> str:
        """The split that chose the best checkpoint and the thresholds."""
        return self.config.data.val_split

    @property
    def threads(self) -> int:
        """Threads per process for reading and decompressing images."""
        return self.config.data.threads

    @functools.cached_property
    def prepared(self) -> Variables:
        """`variables` for the prediction steps; on CPU MAKNet is 1.2 times as fast with them."""
        return sharding.put_state(self.mesh, self.assembly.prepare(self.variables))

    def score(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """Logits `[B, K]` of a batch, on the devices; does not block."""
        on_mesh = sharding.put_batch(self.mesh, batch)
        return self.assembly.predict_step(self.prepared, on_mesh["image"], on_mesh.get("box"))

    def score_with_features(self, batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Logits `[B, K]` and pooled features `[B, F]` of a batch, on the devices."""
        on_mesh = sharding.put_batch(self.mesh, batch)
        return self.assembly.features_step(self.prepared, on_mesh["image"], on_mesh.get("box"))

    def predict(
        self, variables: Variables, batch: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """See `Assembly.predict`."""
        return self.assembly.predict(variables, batch)
