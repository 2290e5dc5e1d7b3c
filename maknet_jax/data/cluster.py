"""The workers of an existing Dask cluster (extra `dask`) instead of local processes."""

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import logging
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import maknet_jax
from maknet_jax.ct import containers
from maknet_jax.ct.reading import one_line
from maknet_jax.data import processes, worker_pool
from maknet_jax.errors import InputError, Rejected, installing

_PATIENCE = 5  # seconds until a scheduler answers and has a worker
_NO_WORKER = 60  # seconds without any worker; a supervisor may restart them


@contextlib.contextmanager
def start(count: int, scheduler: str | None = None, *, module: str) -> Iterator[worker_pool.Pool]:
    """Starts workers, and ends their work when the block ends: they hold no state.

    Args:
      count: the number of local processes.
      module: the module of the functions that they will call.
      scheduler: the address of a Dask scheduler, whose workers are used instead.

    Raises:
      InputError: see `Cluster`.
    """
    pool = processes.Processes(count, module) if scheduler is None else Cluster(scheduler)
    try:
        yield pool
    finally:
        pool.close()


@contextlib.contextmanager
def start_local(
    count: int, scheduler: str | None, *, module: str
) -> Iterator[processes.Processes | None]:
    """Starts local workers before their work is known, so that they import its module meanwhile.

    Args:
      count: the number of processes.
      scheduler: a Dask scheduler, whose workers run already.
      module: the module of the functions that they will call.

    Yields:
      The workers; None for one process or with a scheduler.
    """
    if count <= 1 or scheduler is not None:
        yield None
        return
    with contextlib.closing(processes.Processes(count, module)) as pool:
        yield pool


def check(scheduler: str | None) -> None:
    """Checks that a scheduler has workers, before inputs are searched; None is valid."""
    if scheduler is not None:
        Cluster(scheduler).close()


class Cluster(worker_pool.Pool):
    """The workers of a Dask cluster, each thread of them a place.

    Dask repeats a unit whose worker died on another one, up to its `allowed-failures` (3).
    """

    advice = "give each worker more memory, or run the command again to resume without it"

    def __init__(self, address: str) -> None:
        """Connects to a scheduler.

        Args:
          address: such as tcp://HOST:8786.

        Raises:
          InputError: dask.distributed is not installed, the scheduler cannot be reached, or it has
            no workers.
        """
        try:
            import distributed
        except ImportError:
            raise InputError(f"--scheduler needs dask.distributed: {installing('dask')}") from None
        for name in ("distributed", "distributed.client", "distributed.core", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported here
        self._dask, self._address = distributed, address
        self._futures: dict[int, Any] = {}
        try:
            asyncio.run(self._knock())
            with warnings.catch_warnings():  # `_checked_call` compares the versions that matter
                warnings.simplefilter("ignore")
                self._client = distributed.Client(address, timeout=_PATIENCE, set_as_default=False)
        except Exception as error:  # another service may answer
            raise InputError(
                f"--scheduler {address} cannot be reached ({one_line(error)}): start it with `dask "
                "scheduler`, or correct the address"
            ) from None
        try:
            self._client.wait_for_workers(1, timeout=_PATIENCE)
            self.size = sum(self._client.nthreads().values())
        except (OSError, TimeoutError):
            self.close()
            raise InputError(
                f"--scheduler {address} has no workers: start them with `dask worker {address}`"
            ) from None

    async def _knock(self) -> None:
        """Opens a connection, because a Client that cannot connect takes long to be deleted."""
        comm = await self._dask.comm.connect(self._address, timeout=_PATIENCE)
        await comm.close()

    def send(self, place: int, function: Callable[[Any], Any], unit: Any) -> None:
        """Submits function(unit); a file that exists here must exist there."""
        visible = unit.source if _exists(unit.source) else None
        self._futures[place] = self._client.submit(
            _checked_call, function, unit, versions(), visible, pure=False
        )

    def receive(self, places: Iterable[int]) -> Iterator[tuple[int, worker_pool.Answer]]:
        """Yields (place, answer) of the units that are done.

        Raises:
          InputError: the scheduler or all workers are lost, or a worker has other versions or does
            not see the files.
        """
        waiting = {self._futures[place]: place for place in places}
        for future in self._done(list(waiting)):
            place = waiting[future]
            try:
                yield place, future.result()
            except self._dask.scheduler.KilledWorker as error:
                yield place, worker_pool.Died(f"{error.allowed_failures + 1} times")
            except InputError:  # of `_checked_call`
                raise
            except (OSError, concurrent.futures.CancelledError) as error:
                raise self._lost(error) from None
            except Exception as error:  # those of the function are part of the answer
                raise InputError(
                    f"the cluster at {self._address} cannot run the command ({one_line(error)}): "
                    "install the same versions on its scheduler and all workers"
                ) from None
            finally:
                del self._futures[place]

    def close(self) -> None:
        """Cancels the units and leaves the cluster."""
        with contextlib.suppress(Exception):  # it may be lost
            self._client.close(timeout=_PATIENCE)

    def _done(self, futures: Sequence[Any]) -> set[Any]:
        """Waits for one of some futures."""
        deadline = time.monotonic() + _NO_WORKER
        while True:
            try:
                with self._client.as_current():
                    return set(self._dask.wait(futures, 1, "FIRST_COMPLETED").done)
            except TimeoutError:
                with contextlib.suppress(OSError, TimeoutError):
                    if self._client.status == "running" and self._client.nthreads():
                        deadline = time.monotonic() + _NO_WORKER
            except (OSError, concurrent.futures.CancelledError) as error:
                raise self._lost(error) from None
            if time.monotonic() > deadline:
                raise self._lost(TimeoutError(f"no worker for {_NO_WORKER} s"))

    def _lost(self, error: BaseException) -> InputError:
        return InputError(
            f"the connection to {self._address} is lost ({one_line(error)}): run the command again "
            "to resume"
        )


def _exists(path: str) -> bool:
    try:
        return containers.is_file(path) or containers.is_folder(path)
    except (OSError, Rejected):  # a damaged archive
        return False


@functools.cache
def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {"maknet-jax": maknet_jax.__version__} | {
        name: importlib.metadata.version(name)
        for name in (
            "array-record",
            "jax",
            "nibabel",
            "numpy",
            "pillow",
            "pydicom",
            "python-gdcm",
        )
    }


def _checked_call(
    function: Callable[[Any], Any], unit: Any, expected: dict[str, str], visible: str | None
) -> tuple[Any, Exception | None]:
    """`worker_pool.call` on a worker of a cluster.

    Raises:
      InputError: it has other versions than the command, or does not see a file that the command
        sees.
    """
    host = socket.gethostname()
    for name, version in versions().items():
        if version != expected[name]:
            raise InputError(
                f"a worker on {host} has {name} {version}, this command {expected[name]}: install "
                "the same versions"
            )
    if visible is not None and not _exists(visible):
        raise InputError(
            f"a worker on {host} does not see {visible}: pass an absolute path that is the same on "
            "all workers"
        )
    return worker_pool.call(function, unit)
