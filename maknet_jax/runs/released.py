"""The released models: bundles that come with the package."""

import pathlib
from typing import NamedTuple

from maknet_jax.runs import bundle
from maknet_jax.runs.bundle_files import open_members


class Released(NamedTuple):
    """A released model: its network, edge of the images, training data and label names."""

    name: str
    network: str
    size: int
    trained_on: str
    labels: tuple[str, ...]


def shown_name(path: pathlib.Path) -> str:
    """The name of a released model, the path of anything else."""
    names = {folder: name for name, folder in bundle.released().items()}
    return names.get(path.resolve(), str(path))


def describe() -> list[Released]:
    """All released models, from the `bundle.json` of each; weights are not read."""
    models = []
    for name, path in bundle.released().items():
        with open_members(path) as members:
            info = bundle.read_info(path, members)
        config, source = info["config"], (info["data"].get("origin") or {}).get("source")
        labels = tuple(label["name"] for label in info["labels"])
        models.append(
            Released(
                name,
                config["model"]["name"],
                config["data"]["size"],
                source or "not recorded",
                labels,
            )
        )
    return models
