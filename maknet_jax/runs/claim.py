"""Claiming an output folder: its record says what it holds, and only the same run resumes in it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from maknet_jax import files
from maknet_jax.training import sharding


def claim(folder: pathlib.Path, records: Mapping[str, Mapping[str, Any]], **rule: Any) -> None:
    """Claims a folder, or checks that it is claimed by a run with the same records.

    Every process checks before the first one writes: a slower process would otherwise find a
    folder that is not empty and not yet claimed. For the arguments see `files.check_claim`.

    Raises:
      InputError: the folder holds something else.
    """
    files.check_claim(folder, records, **rule)
    sharding.wait_for_all("looked")
    if jax.process_index() == 0:
        for name, record in records.items():
            files.write_json(pathlib.Path(folder) / name, record)
    sharding.wait_for_all("claimed")
