"""The command line: `maknet VERB`. Each verb is a Python function; these files only parse options.

Exit codes: 0 done; 2 bad arguments or input, with one line that says which; 3 done, but some inputs
were rejected (`failures.csv`); 75 stopped by a signal, and the same command resumes.
"""

import io
import os
import sys
from collections.abc import Sequence

import maknet_jax
from maknet_jax import files
from maknet_jax.cli import (
    checks,
    data,
    exit_codes,
    explain,
    inference,
    lesions,
    options,
    select,
    students,
    training,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    Args:
      argv: the arguments after `maknet`; None takes those of the process.
    """
    parser = _parser()
    chosen, unparsed = parser.parse_known_args(argv)
    if unparsed and not chosen.takes_config:
        parser.error(f"unknown argument {unparsed[0]!r}")
    chosen.overrides = options.config_changes(parser, unparsed)
    # XLA and grain log through absl and C++, which would bury our own lines. Level 3 also hides
    # "Very slow compile?", which XLA logs as an error; with several processes, errors of the
    # connection matter more.
    level = "2" if getattr(chosen, "distributed", False) else "3"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", level)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    files.raise_handle_limit()

    def work() -> int | None:
        options.check_paths(chosen)
        return chosen.run(chosen)

    return exit_codes.exit_code(
        "maknet",
        work,
        seconds=getattr(chosen, "stop_after", None),
        final=argv is None,
    )


def _parser() -> options.Parser:
    parser = options.Parser(
        prog="maknet",
        description="Train networks that label body parts in CT. Research software, not a medical "
        "device.",
        epilog="example: maknet demo --out /tmp/maknet-demo",
    )
    parser.add_argument("--version", action="version", version=maknet_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for stage in (select, data, training, students, inference, explain, lesions, checks):
        stage.add_verbs(verbs)
    return parser
