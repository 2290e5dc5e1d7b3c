"""Recognises the outputs of this package, so that those inside an input folder are not inputs."""

import os
import pathlib
from collections.abc import Collection
from typing import Any

from maknet_jax import files

# A file at the top of an output folder -> a key that its JSON has in this package's output only.
_MARKERS = {
    "dataset.json": "fingerprint",  # prepared data, and workdirs
    "settings.json": "networks",  # attribute and perturb
    "bundle.json": "stablehlo",
    "pseudo.json": "records",
}


def is_output_folder(folder: str, names: Collection[str]) -> bool:
    """Whether a folder was written by this package, finished or not.

    Args:
      folder: its path.
      names: of the files in it.
    """
    if os.path.isfile(os.path.join(folder, ".parts", "plan.json")):  # unfinished prepared data
        return True
    return any(
        key in _read(os.path.join(folder, name)) for name, key in _MARKERS.items() if name in names
    )


def _read(path: str) -> dict[str, Any]:
    """A JSON object; an empty one where the file is not readable as such."""
    try:
        content = files.read_json(pathlib.Path(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
