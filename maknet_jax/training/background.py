"""A thread that writes checkpoints while the training continues."""

import concurrent.futures
from collections.abc import Callable


class Background:
    """Runs tasks one after the other in a thread; after a failure the later ones are dropped."""

    def __init__(self) -> None:
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a task has failed and its error was not taken yet."""
        return self._error is not None

    def start(self, task: Callable[[], None]) -> concurrent.futures.Future[None]:
        """Starts a task when those before it are done; its future never has an exception."""
        return self._executor.submit(self._run, task)

    def _run(self, task: Callable[[], None]) -> None:
        if self._error is None:
            try:
                task()
            except Exception as error:
                self._error = error

    def take_error(self) -> Exception | None:
        """The error of a failed task, once; later tasks run again."""
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Waits until all tasks are done."""
        self._executor.shutdown()
