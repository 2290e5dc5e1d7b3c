"""Claims an output folder: a record in it describes the run, and only the same run may resume."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from maknet_jax import files
from maknet_jax.training import sharding


def claim(folder: pathlib.Path, records: Mapping[str, Mapping[str, Any]], **rule: Any) -> None:
    """Claims a folder, or checks that it is claimed by a run with the same records.

    Every process checks before the first one writes. Otherwise a slower process could see a folder
    that is no longer empty but not yet claimed. For the arguments see `files.check_claim`.

    Raises:
      InputError: the folder holds foreign files or another run.
    """
    files.check_claim(folder, records, **rule)
    sharding.wait_for_all("checked claim")
    if jax.process_index() == 0:
        for name, record in records.items():
            files.write_json(pathlib.Path(folder) / name, record)
    sharding.wait_for_all("claimed")
