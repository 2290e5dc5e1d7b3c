"""The setup of a training run before its first step: data, network and initial weights."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from maknet_jax import console, files
from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.data.labels import Vocabulary
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
      place: replaces the random weights by those of `init.path`; None with random weights and on
        resume.
      init: a description of these weights, or None.
      initial_weights: digest of the weights of `init.path`, or None.
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
    initial_weights: str | None

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
      InputError: the config, the data and the initial weights do not match.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").is_file():
        configs.read_stored(folder)  # raises InputError if it is damaged
        config, fields = configs.as_stored(config, files.read_json(folder / "config.json"))
        for name, value in fields.items():
            console.Log().say(
                f"the run in {folder} predates config {name}: it resumes with {value}"
            )
    weights = None
    if config.init.path and not _is_resuming(folder):
        weights = workdir.open_weights(config.init.path)
    config = _with_model(config, folder, weights)
    dataset, mesh = records.open_dataset(config.data.path), sharding.data_mesh(devices)
    configs.validate(config, dataset.size, mesh.size)
    split, vocabulary = dataset.split(config.data.train_split), dataset.vocabulary
    count = split["count"]
    if not count or not len(vocabulary):
        raise InputError(
            f"{dataset.path} has no labelled record in split {config.data.train_split!r}: set "
            "data.train_split or prepare labelled data"
        )
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
    # A label's class weights depend on its share of positives among the images in which it is
    # known, averaged over the sources of a batch. A label that is never known has no loss.
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
    # Raises InputError if the network takes boxes and the data have none.
    step.box_kwargs(assembly.model, pipeline.to_fields(first, 0).get("box"))
    place, init = _place(config, weights, dataset.vocabulary, assembly.shapes)
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
        initial_weights=_initial_weights(config, folder, weights),
    )


def _batch_sizes(config: ConfigDict) -> list[int]:
    return [config.data.batch_size] + [config.pseudo.batch_size] * bool(config.pseudo.path)


def _is_resuming(folder: pathlib.Path) -> bool:
    """Whether the workdir holds a checkpoint from which the run resumes."""
    steps = (folder / workdir.FOLDERS["last"]).glob("*")
    return (folder / "config.json").is_file() and any(path.name.isdigit() for path in steps)


def _with_model(
    config: ConfigDict, folder: pathlib.Path, weights: workdir.Weights | None
) -> ConfigDict:
    """The config with the network of `init.path` if its model is `configs.FROM_INIT`.

    Options in the config override those of the network of the weights. A run that resumes takes
    the network from its stored config.

    Raises:
      InputError: there are no weights, or they do not name their network.
    """
    if config.model.name != configs.FROM_INIT:
        return config
    if not config.init.path:
        raise InputError(
            f"config model.name {configs.FROM_INIT} takes the network of init.path, which is "
            'empty: set init.path, or model.name to "maknet" for random weights'
        )
    if weights is None:
        model = files.read_json(folder / "config.json")["model"]
    else:
        model = weights.model
    if not model["name"]:
        raise InputError(f"{config.init.path} does not name its network: set config model.name")
    values = configs.to_json(config)
    options = dict(model["options"]) | values["model"]["options"]
    return configs.from_json(values | {"model": {"name": model["name"], "options": options}})


def _initial_weights(
    config: ConfigDict, folder: pathlib.Path, weights: workdir.Weights | None
) -> str | None:
    """`Setup.initial_weights`; moved weights keep their digest."""
    if not config.init.path:
        return None
    if weights is None:  # on resume, the weights are not needed and may no longer exist
        stored = configs.read_stored(folder)
        if stored.init.path == config.init.path:
            return files.read_json(folder / "dataset.json").get("initial_weights")
        weights = workdir.open_weights(config.init.path)
    return weights.metadata["digest"]


def _place(
    config: ConfigDict,
    weights: workdir.Weights | None,
    vocabulary: Vocabulary,
    shapes: TrainState,
) -> tuple[Place | None, dict[str, Any] | None]:
    """`Setup.place` and `Setup.init`."""
    init = config.init
    if init.head and init.shared_labels:
        raise InputError(
            "config init.head and init.shared_labels are both True: set only head if the labels "
            "are the same, only shared_labels if some are shared"
        )
    if weights is None:
        return None, None
    source = weights.vocabulary
    if init.head and source is not None and source.names != vocabulary.names:
        raise InputError(
            f"{init.path} has other labels than the data: set init.head to False, use data with "
            "the same labels, or keep the shared ones with init.shared_labels"
        )
    columns: list[tuple[int, int]] = []
    if init.shared_labels:
        index = source.index if source is not None else {}
        columns = [(k, index[name]) for k, name in enumerate(vocabulary.names) if name in index]
        if not columns:
            raise InputError(
                f"{init.path} and the data share no label: set init.shared_labels to False"
            )

    def place_all(variables: Variables) -> tuple[Variables, list[str], list[str]]:
        params = weights.params
        if columns:
            params = transfer.share_head(variables, params, columns, len(vocabulary))
        head = init.head or bool(columns)
        return transfer.place(variables, params, weights.batch_stats, head=head)

    # Placed into shapes first, so that weights of another network are rejected before any write.
    _, placed, fresh = place_all({"params": shapes.params, "batch_stats": shapes.batch_stats})
    metadata = weights.metadata | {
        "placed": len(placed),
        "fresh": sorted({name.split("/")[1] for name in fresh}),
    }
    if columns:
        metadata["shared_labels"] = [vocabulary.names[here] for here, _ in columns]
    return lambda variables: place_all(variables)[0], metadata
