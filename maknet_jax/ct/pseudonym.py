"""Stable pseudonymous ids: keyed hashes of DICOM UIDs."""

import hashlib
import hmac
import os
import pathlib
import secrets

from maknet_jax import console, files
from maknet_jax.errors import InputError


def read_salt(path: str | os.PathLike[str] | None, *, log: console.Log) -> str:
    """Reads the secret key of the ids; creates it if absent, readable only by its owner.

    Args:
      path: the file; None means `~/.config/maknet/salt`.
      log: gets a message if a salt is created.

    Raises:
      InputError: the salt has fewer than 16 characters, or there is no place for it.
    """
    default = pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "maknet" / "salt"
    try:
        salt_file = pathlib.Path(path or default).expanduser()
    except RuntimeError:  # HOME is not set, and the user has no other home folder
        raise InputError(
            f"{path or default}, the salt of the pseudonymous ids, is in an unknown home folder: "
            "pass --salt-file"
        ) from None
    if not salt_file.exists():
        try:
            with files.write_whole(salt_file, private=True) as file:
                file.write(secrets.token_hex(32) + "\n")
        except OSError as error:
            raise InputError(
                f"{salt_file}, the salt of the pseudonymous ids, cannot be written "
                f"({error.strerror}): pass --salt-file"
            ) from None
        log.say(
            f"created {salt_file}, the salt of the pseudonymous ids: keep it to get the same ids"
        )
    salt = salt_file.read_text(encoding="utf-8").strip()
    if len(salt) < 16:
        raise InputError(
            f"salt file {salt_file} has {len(salt)} characters, expected at least 16: restore the "
            "file, or remove it to create a new salt"
        )
    return salt


def pseudonym(salt: str, uid: str) -> str:
    """16 hexadecimal digits of the HMAC-SHA256 of a UID."""
    return hmac.new(salt.encode(), uid.encode(), hashlib.sha256).hexdigest()[:16]
