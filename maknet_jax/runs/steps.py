"""What a training loop learns from its steps: skipped ones, and requests to save or to stop.

Several processes must save and stop after the same step. Their requests are a column of the batch,
and their maximum is a metric of the step: no collective operation of its own is needed. It is read
when the next step is already running.
"""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maknet_jax.errors import InputError

NOTHING, SAVE, STOP = 0, 1, 2  # requests; a larger one includes the smaller ones
_NAMED = 8  # images in a message

Values = Mapping[str, jax.Array | float]


class Steps:
    """The steps of one run of the loop.

    Attributes:
      skipped: steps that were skipped since the start of the training.
      in_a_row: the last ones of them without a step that was not skipped.
    """

    def __init__(
        self,
        is_stopping: Callable[[], bool],
        say: Callable[..., None],
        *,
        save_minutes: float,
        has_failed: Callable[[], bool] = lambda: False,
        most_skipped: int,
        skipped: tuple[int, int] = (0, 0),
    ) -> None:
        """Sets up a run.

        Args:
          is_stopping: whether this process has received a signal.
          say: logs a line.
          save_minutes: minutes between requests to save; 0 makes none.
          has_failed: whether a checkpoint was not saved in the background: the next save raises it.
          most_skipped: skipped steps in a row that stop the training.
          skipped: (`skipped`, `in_a_row`) of the checkpoint from which the run resumes.
        """
        self._is_stopping, self._has_failed, self._say = is_stopping, has_failed, say
        self._save_seconds, self._most = 60 * save_minutes, most_skipped
        self.skipped, self.in_a_row = skipped
        self._shared = jax.process_count() > 1
        self._saved = time.monotonic()
        self._running: collections.deque[tuple[int, Values, Sequence[str]]] = collections.deque()
        self._request = NOTHING

    def saved(self) -> None:
        """A checkpoint was written: the time to the next one starts."""
        self._saved = time.monotonic()

    def _wanted(self) -> int:
        if self._is_stopping():
            return STOP
        overdue = time.monotonic() - self._saved > self._save_seconds > 0
        overdue |= self._has_failed()
        return SAVE if overdue and jax.process_index() == 0 else NOTHING

    def mark(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with the request of this process, if there are several processes."""
        if not self._shared:
            return batch
        return batch | {"request": np.full(len(batch["weight"]), self._wanted(), np.int32)}

    def add(self, number: int, values: Values, ids: Sequence[str]) -> None:
        """A step was started; waits until the one before it is done.

        Args:
          number: of the step.
          values: its metrics.
          ids: of the images of this process in its batch.

        Raises:
          InputError: too many steps in a row were skipped.
        """
        while self._running:
            self._finish(*self._running.popleft())
        self._running.append((number, values, ids))

    def settle(self) -> None:
        """Waits until the last step that was started is done; for errors see `add`."""
        while self._running:
            self._finish(*self._running.popleft())

    def request(self) -> int:
        """The request after this step; the same on all processes."""
        if not self._shared:
            return self._wanted()
        request, self._request = self._request, NOTHING
        return request

    def _finish(self, number: int, values: Values, ids: Sequence[str]) -> None:
        jax.block_until_ready(values)
        self._request = max(self._request, int(values.get("request", NOTHING)))
        if not values.get("skipped", False):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        images = ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
        text = f"the gradient of step {number} is not finite (images {images})"
        if self.in_a_row >= self._most:
            raise InputError(
                f"{text}, the last of {self.in_a_row} such steps in a row: lower "
                "optimizer.learning_rate and choose another --workdir, or resume from the last "
                "checkpoint by the same command"
            )
        self._say(f"{text}: the step is skipped", step=number, skipped=list(ids))


def metrics(values: Values) -> dict[str, Any]:
    """The metrics of a step without the fields of this module."""
    return {name: value for name, value in values.items() if name not in ("request", "skipped")}


def is_skipped(values: Values) -> bool:
    """Whether a finished step was skipped."""
    return bool(values.get("skipped", False))
