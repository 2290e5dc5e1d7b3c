"""`maknet verify`."""

import argparse

from maknet_jax.cli import options


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds `verify`."""
    verb = options.verb(verbs, "verify", _run_verify)
    verb.set_defaults(may_be_url={"path"})
    verb.add_argument(
        "path",
        help="a prepared data set, pseudo-labels, a workdir of `maknet train` or its s3:// URL, a "
        "bundle (folder or .zip) or the name of a released model",
    )


def _run_verify(chosen: argparse.Namespace) -> int:
    """Read a data set, a workdir or a bundle whole and compare it with the digests that were
    stored when it was written; exits with 2 if anything is damaged.

        maknet verify shards/deeplesion
        maknet verify runs/teacher
    """
    from maknet_jax import verify

    options.start_jax()
    checks = verify.verify(chosen.path)
    options.show(verify.table(checks))
    return options.BAD_INPUT if any(check.problem for check in checks) else options.DONE
