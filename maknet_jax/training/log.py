"""Metrics of a run: JSON lines for programs, TensorBoard for eyes."""

import json
import math
import pathlib

import numpy as np
from clu import metrics as clu_metrics
from tensorboardX import SummaryWriter

from maknet_jax import files


class MetricLog:
    """Writes `metrics.jsonl` and TensorBoard events into a workdir."""

    def __init__(self, workdir, *, step=0):
        """Opens the log of a run that stands at `step`; lines of later steps are taken back.

        A run that was killed has logged steps that its checkpoint does not hold: they come again.

        Args:
          workdir: the folder; None writes nothing (of several processes one writes).
          step: where the run stands.
        """
        self._file = self._board = None
        if workdir is None:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            with files.write_whole(path) as file:
                file.writelines(line + "\n" for line in kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=step + 1, flush_secs=30
        )

    def write(self, step, values):
        """Writes one line of scalars; values that are not finite become null in JSON."""
        if self._file is None:
            return
        clean = {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)

    def close(self):
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was cut off by a kill


def averages(steps):
    """Means of the metrics of several steps: a list of dicts of scalars -> a dict of floats."""
    names = steps[0] if steps else {}
    means = {
        name: clu_metrics.Average.from_model_output(
            np.asarray([float(values[name]) for values in steps], np.float32)
        )
        for name in names
    }
    return {name: float(mean.compute()) for name, mean in means.items()}
