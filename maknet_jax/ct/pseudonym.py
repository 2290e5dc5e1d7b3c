"""Ids that tell the same volume again without telling whose it is: keyed hashes of DICOM UIDs."""

import hashlib
import hmac
import os
import pathlib
import secrets

from maknet_jax import console, files
from maknet_jax.errors import InputError


def read_salt(path: str | os.PathLike[str] | None, *, log: console.Log) -> str:
    """The secret that ids are made with; made where it does not exist, readable by its owner only.

    Args:
      path: the file; None takes `~/.config/maknet/salt`.
      log: log.say(text) tells that a salt was made.

    Raises:
      InputError: the file holds fewer than 16 characters.
    """
    default = pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "maknet" / "salt"
    salt_file = pathlib.Path(path or default).expanduser()
    if not salt_file.exists():
        with files.write_whole(salt_file, private=True) as file:
            file.write(secrets.token_hex(32) + "\n")
        log.say(f"made {salt_file}, the salt of the pseudonyms: keep it, for the same ones again")
    salt = salt_file.read_text(encoding="utf-8").strip()
    if len(salt) < 16:
        raise InputError(f"salt file {salt_file} holds {len(salt)} characters: 16 at least")
    return salt


def pseudonym(salt: str, uid: str) -> str:
    """16 hexadecimal digits of the HMAC-SHA256 of a UID."""
    return hmac.new(salt.encode(), uid.encode(), hashlib.sha256).hexdigest()[:16]
