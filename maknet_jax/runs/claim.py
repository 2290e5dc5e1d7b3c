"""Claims an output folder: a record in it describes the run, and only the same run may resume."""

import contextlib
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from maknet_jax import files
from maknet_jax.errors import InputError
from maknet_jax.runs import ownership
from maknet_jax.training import sharding

_PATIENCE = 10.0  # seconds in which a shared file system shows a new file to other hosts


@contextlib.contextmanager
def claim(
    folder: pathlib.Path,
    records: Mapping[str, Mapping[str, Any]],
    *,
    shared: bool = True,
    **rule: Any,
) -> Iterator[None]:
    """Claims a folder, or checks that it is claimed by a run with the same records.

    No other command can claim it within the block. Every process checks before the first one
    writes. Otherwise a slower process could see a folder that is no longer empty but not yet
    claimed.

    Args:
      folder: see `files.check_claim`.
      records: see `files.check_claim`.
      shared: whether all processes use the same folder; False for copies, see `remote`.
      **rule: see `files.check_claim`.

    Raises:
      InputError: the folder holds foreign files or another run, another command is running in it,
        or the processes do not share it.
    """
    folder, first = pathlib.Path(folder), jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        token, problem = None, ""
        try:
            files.check_claim(folder, records, **rule)  # nothing is written into foreign folders
            if first:
                owning = ownership.owned(folder, rule["command"], rule["option"])
                token = stack.enter_context(owning)
                files.check_claim(folder, records, **rule)  # the owner before may have claimed it
        except InputError as error:
            problem = str(error)
        told = sharding.exchange([problem, token])
        if problems := [problem or other for other, _ in told if other]:
            raise InputError(problems[0])
        if shared:
            _check_shared(folder, told[0][1])
        sharding.wait_for_all("checked claim")
        if first:
            for name, record in records.items():
                files.write_json(folder / name, record)
        sharding.wait_for_all("claimed")
        yield


@contextlib.contextmanager
def owned(folder: pathlib.Path, command: str, option: str = "--out") -> Iterator[None]:
    """Owns an output folder that describes no run; a collective if there are several processes.

    Args:
      folder: see `ownership.owned`.
      command: see `ownership.owned`.
      option: see `ownership.owned`.

    Raises:
      InputError: another command that runs owns it.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(ownership.owned(folder, command, option))
            except InputError as error:
                problem = str(error)
        raise_any(problem)
        yield


def raise_any(problem: str) -> None:
    """Raises the first problem of the processes on all of them; a collective.

    Args:
      problem: of this process; empty if there is none.

    Raises:
      InputError: a process has a problem.
    """
    if problems := [each for each in sharding.exchange(problem) if each]:
        raise InputError(problems[0])


def _check_shared(folder: pathlib.Path, token: str | None) -> None:
    """Checks that every process sees the file of the owner, which is process 0.

    Raises:
      InputError: one does not.
    """
    ends = time.monotonic() + _PATIENCE
    while ownership.read_token(folder) != token and time.monotonic() < ends:
        time.sleep(0.2)
    sees = ownership.read_token(folder) == token
    for number, (host, seen) in enumerate(sharding.exchange([socket.gethostname(), sees])):
        if not seen:
            raise InputError(
                f"process {number} on {host} does not see the files of process 0 in {folder}: all "
                "processes need the same, shared folder"
            )
