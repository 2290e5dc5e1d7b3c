"""Claims the workdir of a training run, and says what may change when it resumes."""

from contextlib import AbstractContextManager
from typing import Any

from maknet_jax.runs import config as configs
from maknet_jax.runs.claim import claim
from maknet_jax.runs.setup import Setup

# May change on resume, because no result depends on them. Moved data keep their fingerprint, moved
# weights their digest.
MAY_CHANGE = {"data.path", "data.threads", "pseudo.path", "init.path"}
MAY_CHANGE |= configs.FREE_FIELDS
MAY_CHANGE |= {"dataset.path", "dataset.labels", "dataset.size"}
# Runs of earlier versions lack the origin; the fingerprint shows whether the data are the same.
MAY_CHANGE |= {f"dataset.origin.{name}" for name in ("kind", "source", "citation", "licence")}


def claim_workdir(setup: Setup, *, shared: bool = True) -> AbstractContextManager[None]:
    """Writes config.json and dataset.json, or checks that they belong to the same run.

    Args:
      setup: the run.
      shared: whether all processes use the same folder, and not copies of it.
    """
    dataset = setup.dataset
    description = {
        "labels": dataset.info["labels"],
        "size": dataset.size,
        "fingerprint": dataset.fingerprint,
        "path": dataset.address,
        "origin": dataset.origin,
        "pseudo_labels": setup.pseudo.fingerprint if setup.pseudo else None,
        "initial_weights": setup.initial_weights,
    }

    def upgrade(name: str, record: dict[str, Any]) -> dict[str, Any]:
        if name == "config.json":
            return configs.to_json(configs.from_json(record))
        # Earlier versions did not record the initial weights; without a checkpoint they are placed
        # only now.
        return ({"initial_weights": setup.initial_weights} if setup.place else {}) | record

    return claim(
        setup.folder,
        {"dataset.json": description, "config.json": configs.to_json(setup.config)},
        shared=shared,
        command="maknet train",
        option="--workdir",
        may_change=MAY_CHANGE,
        upgrade=upgrade,
    )
