"""The out-of-domain statistics of a network, as a file: WORKDIR/domain.safetensors.

They belong to the weights of one step. A workdir without the file, or whose file is of another step
than the opened checkpoint, has none.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from maknet_jax import files
from maknet_jax.errors import InputError
from maknet_jax.training import transfer

FILE = "domain.safetensors"
FORMAT = "maknet-jax domain 1"


class Statistics(NamedTuple):
    """The arrays of `evaluation.domain.Domain`, and what they were computed from.

    Attributes:
      arrays: by name.
      about: as JSON: numbers of patients and slices; both from `evaluation.domain_fit.measure`.
    """

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


def encode(statistics: Statistics) -> bytes:
    """The bytes of the file in a bundle; `bundle.json` holds `about`."""
    return transfer.encode_arrays(statistics.arrays, {"format": FORMAT})


def write(workdir: str | os.PathLike[str], statistics: Statistics, step: int) -> None:
    """Writes the statistics of the weights after `step` updates, atomically."""
    metadata = {
        "format": FORMAT,
        "step": str(step),
        "about": json.dumps(statistics.about),
        "digest": transfer.digest(statistics.arrays, {}),
    }
    with files.write_whole(pathlib.Path(workdir) / FILE, "wb") as file:
        file.write(transfer.encode_arrays(statistics.arrays, metadata))


def read(workdir: str | os.PathLike[str], step: int) -> Statistics | None:
    """The statistics of the weights after `step` updates; None if there are none.

    Raises:
      InputError: the file is damaged.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.is_file():
        return None
    advice = "delete it and run the same `maknet train` command again to write it"
    try:
        arrays, metadata = transfer.read_safetensors(path)
        about, saved = json.loads(metadata["about"]), int(metadata["step"])
        intact = metadata["digest"] == transfer.digest(arrays, {})
    except (InputError, KeyError, ValueError):
        raise InputError(f"{path} is damaged: {advice}") from None
    if metadata.get("format") != FORMAT or not intact:
        raise InputError(f"{path} is damaged or of another version: {advice}")
    return Statistics(arrays, about) if saved == step else None


def not_judged(about: Mapping[str, Any]) -> str:
    """What statistics do not judge, by `Statistics.about`; "" if they judge everything."""
    parts = {"series": "series as a whole", "order": "the order of slices"}
    missing = " and ".join(parts[name] for name in parts if name not in about.get("judges", parts))
    # See `evaluation.domain_fit`: both thresholds come from pieces of series.
    reason = "too few series of known spacing in the training or tuning data"
    return f"{missing} ({reason})" if missing else ""
