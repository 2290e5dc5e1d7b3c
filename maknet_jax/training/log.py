"""Metrics of a run: JSON lines for programs, TensorBoard for people."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TextIO

import jax
import numpy as np
from clu import metrics as clu_metrics
from tensorboardX import SummaryWriter

from maknet_jax import files

Scalar = float | np.floating | jax.Array


class MetricLog:
    """Writes `metrics.jsonl` and TensorBoard events into a workdir."""

    def __init__(self, workdir: str | os.PathLike[str] | None, *, step: int = 0) -> None:
        """Opens the log of a run that resumes after `step`; lines of later steps are removed.

        A killed run may have logged steps after its last checkpoint: they are repeated.

        Args:
          workdir: the folder; None writes nothing (only the first process writes).
          step: the number of completed updates.
        """
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if workdir is None:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        if path.exists():
            valid = [line for line in path.read_text().splitlines() if _step(line) <= step]
            with files.write_whole(path) as file:
                file.writelines(line + "\n" for line in valid)
        self._file = path.open("a", encoding="utf-8")
        board = str(pathlib.Path(workdir) / "tensorboard")
        with files.naming(board):
            self._board = SummaryWriter(board, purge_step=step + 1, flush_secs=30)

    def write(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Writes one line of scalars; values that are not finite become null in JSON."""
        if self._file is None or self._board is None:
            return
        clean = {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        with files.naming(self._file.name):
            self._file.write(json.dumps({"step": step, **clean}) + "\n")
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            with files.naming(self._file.name):
                self._file.close()
            with files.naming(self._board.logdir):
                self._board.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a partial line of a killed process


def averages(steps: Sequence[Mapping[str, Scalar]]) -> dict[str, float]:
    """Means of the metrics of several steps, each name -> scalar."""
    names = steps[0] if steps else {}
    means = {
        name: clu_metrics.Average.from_model_output(
            np.asarray([float(values[name]) for values in steps], np.float32)
        )
        for name in names
    }
    return {name: float(mean.compute()) for name, mean in means.items()}
