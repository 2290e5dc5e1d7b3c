"""Recognises the outputs of this package, so that those inside an input folder are not inputs."""

import os
import pathlib
import re
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
_RETRIEVED = "rank,similarity,id,split,labels"  # the header of `maknet retrieve`


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


def output_files(folder: str, names: Collection[str]) -> set[str]:
    """The pictures among the files of a folder that `predict` and `retrieve` wrote.

    Args:
      folder: its path.
      names: of the files in it.
    """
    outputs = set()
    for name in names:
        if name.endswith(".summary.json") and "covers" in _read(os.path.join(folder, name)):
            stem = re.escape(name.removesuffix(".summary.json"))
            outputs |= {other for other in names if re.fullmatch(rf"{stem}\.\d{{3,}}\.png", other)}
        sheet = f"{name.removesuffix('.csv')}.png"
        if name.endswith(".csv") and sheet in names:
            with open(os.path.join(folder, name), "rb") as file:
                if file.read(len(_RETRIEVED)) == _RETRIEVED.encode():
                    outputs.add(sheet)
    return outputs


def _read(path: str) -> dict[str, Any]:
    """A JSON object; an empty one where the file is not readable as such."""
    try:
        content = files.read_json(pathlib.Path(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
