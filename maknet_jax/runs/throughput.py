"""The rate of a training loop, and the share of its time in which it waited for data."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

_LAST_STEP = 5.0  # seconds to wait for the step that runs when the loop fails


class Throughput:
    """Counts the images of the steps since `read` was last called, and the seconds they took.

    The loop waits for data while the next batch is not ready and no step is running: reading that
    is hidden behind a running step costs nothing and does not count. A step runs until its metrics
    are ready, which a thread observes.
    """

    def __init__(self, images: int, *, step: int) -> None:
        """Starts the clock.

        Args:
          images: per step, over all processes.
          step: the number of completed steps.
        """
        self._images, self._first = images, step
        self._began = self._window = time.perf_counter()
        self._read_at = step
        self._waited = self._waited_in_window = 0.0
        self._started = 0
        self._done = 0, self._began  # steps that are done, and when the last one was
        self._running: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._watching = threading.Thread(target=self._watch, name="throughput", daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        for number, values in enumerate(iter(self._running.get, None), start=1):
            with contextlib.suppress(Exception):  # the loop raises it
                jax.block_until_ready(values)
            self._done = number, time.perf_counter()

    def take(self, batches: Iterator[Any]) -> Any:
        """The next batch."""
        began = time.perf_counter()
        batch = next(batches)
        number, done = self._done
        if number == self._started:
            waited = max(0.0, time.perf_counter() - max(began, done))
            self._waited += waited
            self._waited_in_window += waited
        return batch

    def started(self, values: Any) -> None:
        """A step was started; its metrics are `values`."""
        self._started += 1
        self._running.put(values)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count for `read`: validation."""
        began = time.perf_counter()
        yield
        self._window += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """Metrics of the steps since the last call, for `metrics.jsonl`.

        Args:
          step: the number of completed steps.

        Returns:
          `images_per_second`, and `data_wait`: the share of the time in which the loop of this
          process waited for data, from 0 to 1.
        """
        now = time.perf_counter()
        seconds, self._window = now - self._window, now
        images, self._read_at = (step - self._read_at) * self._images, step
        waited, self._waited_in_window = self._waited_in_window, 0.0
        return {"images_per_second": images / seconds, "data_wait": waited / seconds}

    def total(self, step: int) -> dict[str, float | None]:
        """The same of all steps of this process including validation; None without steps."""
        seconds, steps = time.perf_counter() - self._began, step - self._first
        if not steps:
            return {"images_per_second": None, "data_wait": None}
        return {
            "images_per_second": steps * self._images / seconds,
            "data_wait": self._waited / seconds,
        }

    def close(self) -> None:
        """Ends the thread when the last step is done."""
        self._running.put(None)
        # A thread that returns from C++ while Python ends would abort the process. The step never
        # ends if another process is lost.
        self._watching.join(_LAST_STEP)
