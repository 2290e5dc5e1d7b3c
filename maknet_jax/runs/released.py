"""The released models: bundles that come with the package."""

from typing import NamedTuple

from maknet_jax.runs import bundle
from maknet_jax.runs.bundle_files import open_members


class Released(NamedTuple):
    """A released model: its network, number of labels, edge of the images and training data."""

    name: str
    network: str
    labels: int
    size: int
    trained_on: str


def describe() -> list[Released]:
    """All released models, from the `bundle.json` of each; weights are not read."""
    models = []
    for name, path in bundle.released().items():
        with open_members(path) as members:
            info = bundle.read_info(path, members)
        config, source = info["config"], (info["data"].get("origin") or {}).get("source")
        size, labels = config["data"]["size"], len(info["labels"])
        models.append(
            Released(name, config["model"]["name"], labels, size, source or "not recorded")
        )
    return models
