"""Several processes resume from the same checkpoint, or none does."""

import hashlib
import json
import socket
from typing import Any

import jax

from maknet_jax.errors import InputError
from maknet_jax.training import sharding
from maknet_jax.training.checkpoint import Checkpoints, Restored, digests
from maknet_jax.training.state import TrainState


def restore(checkpoints: Checkpoints, like: TrainState | None = None) -> Restored:
    """Reads the newest checkpoint that is intact for process 0, on all processes.

    A damaged checkpoint may be damaged for one process only. So process 0 decides, all others read
    the same step, and the digests of what they have read are compared. A collective.

    Args:
      checkpoints: of a folder that all processes share.
      like: see `Checkpoints.restore`.

    Raises:
      InputError: see `Checkpoints.restore`; or a process cannot read what process 0 has read.
      OSError: see `Checkpoints.restore`, with one process.
    """
    if jax.process_count() == 1:
        return checkpoints.restore(like)
    restored, told = Restored(None, {}, {}), _describe()
    if jax.process_index() == 0:
        try:
            restored = checkpoints.restore(like)
            told = _describe(restored)
        except (InputError, OSError) as error:
            told = _describe(error=error)
    decided = sharding.exchange(told)[0]
    if decided["error"]:
        raise InputError(decided["error"])
    if jax.process_index() > 0 and decided["step"] is not None:
        # Each error is one of the storage of this process: Orbax raises many types.
        try:
            state, metadata = checkpoints.read(like, decided["step"])
            damaged = {int(step): reason for step, reason in decided["damaged"].items()}
            restored = Restored(state, metadata, damaged)
            told = _describe(restored)
        except Exception as error:
            told = _describe(error=error)
    for number, other in enumerate(sharding.exchange(told)):
        problem = other["error"] or (
            "its content differs" if other["sum"] != decided["sum"] else ""
        )
        if problem:
            raise InputError(
                f"process {number} on {other['host']} cannot read checkpoint {decided['step']} in "
                f"{checkpoints.folder} as process 0 can ({problem}): all processes need the same, "
                "shared folder"
            )
    return restored


def _describe(restored: Restored | None = None, error: Exception | None = None) -> dict[str, Any]:
    """The result of a process for the others, as JSON."""
    told: dict[str, Any] = {
        "host": socket.gethostname(),
        "error": "",
        "step": None,
        "sum": "",
        "damaged": {},
    }
    if error is not None:
        named = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return told | {"error": " ".join(f"{named}{error}".split())[:400]}
    if restored is not None and restored.state is not None:
        values = [digests(restored.state), restored.metadata]
        content = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        told |= {"step": int(restored.state.step), "sum": content, "damaged": restored.damaged}
    return told
