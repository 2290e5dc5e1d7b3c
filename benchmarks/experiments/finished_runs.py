"""Finished runs in the folder of an experiment: they are read, not trained again."""

import pathlib

from maknet_jax import files
from maknet_jax.errors import InputError


def is_finished(folder: pathlib.Path) -> bool:
    """Whether the training in `folder` is finished."""
    return (folder / "summary.json").is_file()


def check_options(folder: pathlib.Path, *, size: int, rate: float, steps: int) -> None:
    """Checks that the training in `folder`, if it is finished, is the one that was asked for.

    Args:
      folder: the workdir.
      size: edge of the images in pixels.
      rate: learning rate.
      steps: updates.

    Raises:
      InputError: it was trained with other options.
    """
    if not is_finished(folder):
        return
    config, summary = (files.read_json(folder / name) for name in ("config.json", "summary.json"))
    for name, actual, expected in (
        ("size", config["data"]["size"], size),
        ("learning rate", config["optimizer"]["learning_rate"], rate),
        ("number of steps", summary["steps"], steps),
    ):
        if actual != expected:
            raise InputError(
                f"{folder} was trained with the {name} {actual}, not {expected}: pass the same "
                "options, or another --folder"
            )
