"""The command `maknet`, and `python -m maknet_jax`: notes signals, then imports everything else."""

import os
import signal
import sys
from types import FrameType

from maknet_jax.errors import STOP_SIGNALS


def main() -> int:
    """Runs one command and returns the exit code, see `cli.main`.

    Until that takes over the signals, each of `STOP_SIGNALS` ends the process with its code.
    """
    for number in STOP_SIGNALS:
        # `nohup` ignores SIGHUP, and the command must survive the end of its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)

    from maknet_jax import cli  # slow to import

    code = cli.main()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == _stop:  # nothing is left to resume
            signal.signal(number, signal.SIG_DFL)
    return code


def _stop(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(2, f"maknet: stopped: {name}; run the same command to resume\n".encode())
    os._exit(75)


if __name__ == "__main__":
    sys.exit(main())
