"""Joins the processes of `--distributed`, so that the loss of the first does not abort the others.

JAX's client aborts its process (SIGABRT, with a C++ stack) as soon as the connection to process 0
breaks, and offers no way to handle that. The other processes therefore connect through a local
relay. It keeps their side of the connection open, and reports that process 0 is gone.
"""

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # has no public equivalent for the client and its factory

from maknet_jax.errors import InputError

# JAX's own limits, in seconds: they end in an abort, so `peers` ends the processes long before.
_START, _HEARTBEAT = 10**6, 600


def join(end_timeout: float, lost: Callable[[], None]) -> tuple[Any, int, int]:
    """Starts `jax.distributed`.

    Args:
      end_timeout: seconds to wait for all processes to leave.
      lost: called in a thread when the connection to process 0 breaks.

    Returns:
      (client of JAX's key-value store, number of this process, number of all processes).

    Raises:
      InputError: the environment does not say which process this is.
    """
    # JAX would take SIGTERM from the handlers of this package.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _relayed(lost):
            jax.distributed.initialize(
                num_processes=_integer_variable("JAX_NUM_PROCESSES"),
                process_id=_integer_variable("JAX_PROCESS_ID"),
                initialization_timeout=_START,
                heartbeat_timeout_seconds=_HEARTBEAT,
                shutdown_timeout_seconds=round(end_timeout),
            )
    except ValueError as error:
        raise InputError(
            f"--distributed: {error}: set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID"
        ) from None
    joined = distributed.global_state
    return joined.client, joined.process_id, joined.num_processes


def _integer_variable(name: str) -> int | None:
    """An environment variable as an integer; None where it is not set."""
    return int(os.environ[name]) if name in os.environ else None


@contextlib.contextmanager
def _relayed(lost: Callable[[], None]) -> Iterator[None]:
    """Within the block new clients of other processes than the first connect through a relay."""
    library = distributed._jax
    original = library.get_distributed_runtime_client

    @functools.wraps(original)
    def connect(address: str, node_id: int, *args: Any, **options: Any) -> Any:
        secured = any(value for name, value in options.items() if name.startswith("mtls_"))
        if node_id and not secured:  # a certificate names the host of the address
            address = f"127.0.0.1:{_start_relay(address, lost)}"
        return original(address, node_id, *args, **options)

    library.get_distributed_runtime_client = connect
    try:
        yield
    finally:
        library.get_distributed_runtime_client = original


def _start_relay(address: str, lost: Callable[[], None]) -> int:
    """Relays connections to `address` from a local port, which is returned."""
    host, _, port = address.rpartition(":")
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
            except OSError:  # process 0 has not started yet: the client tries again
                near.close()
                continue
            far.settimeout(None)
            for side in (near, far):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_copy, args=(near, far), daemon=True).start()
            threading.Thread(target=_copy, args=(far, near, lost), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


def _copy(
    source: socket.socket, target: socket.socket, broken: Callable[[], None] | None = None
) -> None:
    """Copies bytes to the end; if that is reported to `broken`, the target stays open."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    if broken is not None:
        broken()
    else:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
