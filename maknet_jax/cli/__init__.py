"""The command line: `maknet VERB`. Each verb is a Python function; these files only read options.

Exit codes: 0 done; 2 bad arguments or input (one line says which); 3 done, but some inputs were
rejected (`failures.csv`); 75 stopped by a signal, the same command goes on.
"""

import os

import maknet_jax
from maknet_jax.cli import (
    data,
    exit_codes,
    explain,
    inference,
    lesions,
    options,
    students,
    training,
)


def main(argv=None):
    """Runs one command; returns the exit code."""
    parser = _parser()
    chosen, rest = parser.parse_known_args(argv)
    if rest and not chosen.takes_config:
        parser.error(f"unknown argument {rest[0]!r}")
    chosen.overrides = options.config_changes(parser, rest)
    # XLA and grain log through absl and C++: a user's lines should not drown in theirs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    return exit_codes.exit_code("maknet", lambda: chosen.run(chosen))


def _parser():
    parser = options.Parser(
        prog="maknet",
        description="Train networks that label body parts on CT. Research software, not a medical "
        "device.",
        epilog="example: maknet demo --out /tmp/maknet-demo",
    )
    parser.add_argument("--version", action="version", version=maknet_jax.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for stage in (data, training, students, inference, explain, lesions):
        stage.add_verbs(verbs)
    return parser
