"""The results of `maknet evaluate` in a workdir."""

import pathlib
from typing import Any

from maknet_jax import files
from maknet_jax.errors import InputError


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The summaries of `maknet evaluate` in a workdir.

    Raises:
      InputError: one is damaged.
    """
    summaries = []
    for path in sorted((folder / "evaluation").glob("summary_*.json")):
        summary = files.read_json(path)
        try:
            _ = summary["checkpoint"], summary["step"], list(summary["splits"].items())
            intact = all(isinstance(split, dict) for split in summary["splits"].values())
        except (KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise InputError(f"{path} is damaged: delete it, or run `maknet evaluate` again")
        summaries.append(summary)
    return summaries
