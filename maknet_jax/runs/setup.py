"""What a training run consists of before its first step: data, network and initial weights."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.errors import InputError
from maknet_jax.runs import build, workdir
from maknet_jax.runs import config as configs
from maknet_jax.training import sharding, step, transfer
from maknet_jax.training.state import Place, TrainState, Variables


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run before its first step.

    Attributes:
      config: the locked config.
      folder: the workdir.
      dataset: the labelled data set.
      labelled: its training split.
      pseudo: the pseudo-labelled images, or None.
      epoch_steps: steps per epoch of labelled images.
      total: steps of the whole run.
      assembly: the network and its steps.
      place: puts the weights of `init.path` in place; None with random weights and on resume.
      init: what these weights are, or None.
    """

    config: ConfigDict
    folder: pathlib.Path
    dataset: records.Dataset
    labelled: records.RecordSource
    pseudo: pseudo_labels.PseudoSource | None
    epoch_steps: float
    total: int
    assembly: build.Assembly
    place: Place | None
    init: dict[str, Any] | None

    @property
    def sources(self) -> list[records.RecordSource | pseudo_labels.PseudoSource]:
        """The labelled images, then the pseudo-labelled ones if there are any."""
        return [self.labelled] if self.pseudo is None else [self.labelled, self.pseudo]

    @property
    def batch_sizes(self) -> list[int]:
        """Images per step of each source."""
        return _batch_sizes(self.config)

    @property
    def images(self) -> int:
        """Images per step."""
        return sum(self.batch_sizes)

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return int(parameter_overview.count_parameters(self.assembly.shapes.params))


def set_up(
    config: ConfigDict,
    folder: str | os.PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Setup:
    """Opens the data and builds the network of a run; writes nothing.

    Args:
      config: a locked config.
      folder: the workdir; it need not exist.
      devices: the devices to train on; None takes all.

    Raises:
      InputError: the config, the data and the initial weights do not fit each other.
    """
    folder = pathlib.Path(folder)
    dataset, mesh = records.open_dataset(config.data.path), sharding.data_mesh(devices)
    configs.validate(config, dataset.size, mesh.size)
    split, vocabulary = dataset.split(config.data.train_split), dataset.vocabulary
    count = split["count"]
    if not count or not len(vocabulary):
        raise InputError(f"{dataset.path} has no labelled record in {config.data.train_split}")
    frequencies = [np.asarray(split["label_counts"]) / count]
    known = [dataset.known_counts(config.data.train_split) / count]
    labelled = dataset.source(config.data.train_split)
    pseudo = None
    if config.pseudo.path:
        pseudo = pseudo_labels.PseudoSource(
            config.pseudo.path,
            size=dataset.size,
            names=vocabulary.names,
            balance=config.pseudo.balance,
            seed=config.seed,
        )
        frequencies.append(pseudo.label_counts / len(pseudo))
        known.append(np.ones(len(vocabulary)))
    epoch_steps = count / config.data.batch_size
    total = max(1, round(config.epochs * epoch_steps))
    # A label's weights in the loss follow from its share in the batches, among the images in which
    # it is known. A label that is never known has no share and no loss.
    present, certain = (
        np.average(values, axis=0, weights=_batch_sizes(config)) for values in (frequencies, known)
    )
    share = present / np.where(certain > 0, certain, 1.0)
    assembly = build.assemble(
        config,
        len(vocabulary),
        mesh,
        training=build.TrainingSet(total, share * count, count, vocabulary.exclusive),
    )
    first = (labelled if pseudo is None else pseudo)[0]
    step.box_kwargs(assembly.model, pipeline.to_fields(first, 0).get("box"))  # may refuse
    place, init = _initial_weights(config, folder, dataset, assembly.shapes)
    return Setup(
        config=config,
        folder=folder,
        dataset=dataset,
        labelled=labelled,
        pseudo=pseudo,
        epoch_steps=epoch_steps,
        total=total,
        assembly=assembly,
        place=place,
        init=init,
    )


def _batch_sizes(config: ConfigDict) -> list[int]:
    return [config.data.batch_size] + [config.pseudo.batch_size] * bool(config.pseudo.path)


def _initial_weights(
    config: ConfigDict, folder: pathlib.Path, dataset: records.Dataset, shapes: TrainState
) -> tuple[Place | None, dict[str, Any] | None]:
    """`Setup.place` and `Setup.init`."""
    init, last = config.init, folder / workdir.FOLDERS["last"]
    if not init.path or any(path.name.isdigit() for path in last.glob("*")):
        return None, None
    params, batch_stats, metadata = workdir.open_weights(
        init.path, vocabulary=dataset.vocabulary if init.head else None
    )

    def place(variables: Variables) -> Variables:
        return transfer.place(variables, params, batch_stats, head=init.head)[0]

    # Placed into shapes first: weights that do not fit are refused before anything is written.
    fresh_variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    _, placed, fresh = transfer.place(fresh_variables, params, batch_stats, head=init.head)
    parts = sorted({name.split("/")[1] for name in fresh})
    return place, metadata | {"placed": len(placed), "fresh": parts}
