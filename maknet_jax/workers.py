"""Starts the workers of a command early, so that they and the command import at the same time."""

from maknet_jax.data import processes


def start_early(count: int, scheduler: str | None, module: str) -> None:
    """Starts the server of the next workers; it ends with this process if none are started.

    Args:
      count: the number of workers; one needs no server.
      scheduler: the address of a Dask scheduler, whose workers need none either.
      module: that of the functions that they will call, below this package.
    """
    if count > 1 and scheduler is None:
        processes.start_early(f"{__package__}.{module}")
