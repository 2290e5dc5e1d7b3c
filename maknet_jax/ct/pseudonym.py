"""Stable pseudonymous ids: keyed hashes of DICOM UIDs and other names."""

import contextlib
import dataclasses
import functools
import hashlib
import hmac
import os
import pathlib
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Sequence

from pydicom.uid import DeflatedExplicitVRLittleEndian

from maknet_jax import console, files
from maknet_jax.ct import archives, containers, png
from maknet_jax.ct.search import SeriesRef
from maknet_jax.ct.volumes import Volume
from maknet_jax.errors import InputError, Rejected

_UID = re.compile(r"(?<![\w.])\d+(?:\.\d+){4,}(?![\w.])")
_WORD = re.compile(r"[^\W\d_][\w.-]*\w|\b\d{6,}\b")
_HEADER = 1 << 17  # bytes; longer headers hold private pictures or curves at their end
_BODY_PART = re.compile(
    r"((ABD(OMEN)?|BRAIN|CHEST|EXTREMITY|HEAD|HEART|KIDNEY|LEG|LIVER|LUNG|NECK|PELV(IS)?|"
    r"([CLT]|LOW)?SPINE|THORAX|WHOLE|BODY|AND)[\W_]*)*",
    re.IGNORECASE,
)
# Names that identify nobody and that messages use as words.
_TERMS = set(
    "axial baseline chest data derived dicom files folder image images jpeg localizer lossless "
    "lossy mask masks monochrome1 monochrome2 nifti original png primary process projection "
    "secondary segmentation segmentations series slice slices".split()
)


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
    try:
        salt = salt_file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise InputError(
            f"salt file {salt_file} is not UTF-8: restore the file, or remove it to create a new "
            "salt"
        ) from None
    if len(salt) < 16:
        raise InputError(
            f"salt file {salt_file} has {len(salt)} characters, expected at least 16: restore the "
            "file, or remove it to create a new salt"
        )
    return salt


def pseudonym(salt: str, uid: str) -> str:
    """16 hexadecimal digits of the HMAC-SHA256 of a UID, or of a name as it is printed."""
    return hmac.new(salt.encode(), files.printable(uid).encode(), hashlib.sha256).hexdigest()[:16]


class Pseudonyms:
    """Replaces the names of series, files and patients in results and in messages.

    A series has the same pseudonym as in the records of `maknet prepare dicom`, and so has a slice,
    because its pseudonym is that of its SOPInstanceUID.
    """

    def __init__(self, salt: str) -> None:
        """Args: salt: the secret key, see `read_salt`."""
        self._salt = salt

    def name(self, text: str) -> str:
        """The pseudonym of a name."""
        return pseudonym(self._salt, text)

    def series(self, ref: SeriesRef) -> SeriesRef:
        """The series with a pseudonymous key; its paths stay, because they are read."""
        return dataclasses.replace(ref, key=self.name(ref.key))

    def volume(self, volume: Volume) -> Volume:
        """The volume with pseudonyms of its series and slices.

        Stored indices stay, and so does BodyPartExamined if it consists of names of body parts.
        """
        uids = tuple(map(self.name, volume.uids))
        return dataclasses.replace(
            volume,
            series=self.name(volume.series),
            slices=volume.slices if volume.file else uids,
            uids=uids,
            file=self.name(volume.file) if volume.file else "",
            body_part=volume.body_part if _BODY_PART.fullmatch(volume.body_part) else "",
        )

    def failures(self, failures: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(input, reason) pairs without names; `line N: PATH` becomes `line N`."""
        pairs = []
        for text, reason in failures:
            line, path = _split_line(text)
            pairs.append((line or self.name(path), self._message(path, reason)))
        return pairs

    def _message(self, path: str, message: str) -> str:
        """A message about a file, without file names, UIDs, and words in the file's header."""
        message = _UID.sub(lambda match: self.name(match[0]), message)
        private = _mentioned(message, _names_near(path)) | set(_paths_in(message))
        folder = pathlib.Path(path).parent
        named = [path, *(str(folder / name) for name in private)]
        headers = b"".join(map(_header, filter(containers.is_file, named)))
        words = {word for word in _WORD.findall(message) if len(word) > 3 or not word.islower()}
        private |= {word for word in words if word.encode() in headers}
        for name in sorted(filter(message.__contains__, private), key=len, reverse=True):
            if name in message and len(name) > 2 and name.lower() not in _TERMS:
                message = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", self.name(name), message)
        return message


class Redaction(Pseudonyms):
    """Replaces every name by an ellipsis."""

    def __init__(self) -> None:
        super().__init__("")

    def name(self, text: str) -> str:
        """An ellipsis."""
        return "…"


def read_pseudonyms(
    wanted: bool, path: str | os.PathLike[str] | None, log: console.Log | None = None
) -> Pseudonyms | None:
    """The pseudonyms of a salt file, see `read_salt`; None unless they are wanted."""
    return Pseudonyms(read_salt(path, log=log or console.Log())) if wanted else None


def _split_line(text: str) -> tuple[str, str]:
    """("line 3", PATH) of a row of a table, ("", PATH) of a path."""
    row = re.fullmatch(r"(line \d+): (.*?)(?: slice .*)?", text)
    return (row[1], row[2]) if row else ("", text)


def _mentioned(message: str, names: Sequence[frozenset[str]]) -> set[str]:
    """The names that occur in a message as whole words; a folder can have more names than words."""
    starts = [match.start() for match in re.finditer(r"(?<!\w)", message)]
    ends = [match.start() for match in re.finditer(r"(?!\w)", message)]
    parts = {message[start:end] for start in starts for end in ends if start < end}
    return {part for group in names for part in parts & group}


def _names_near(path: str) -> list[frozenset[str]]:
    """The parts of a path and of its link, and the names and stems of files beside it or in it."""
    place = pathlib.Path(path)
    names = [_with_stems([path, *place.parts])]
    if os.path.islink(path):
        target = os.readlink(path)
        names.append(_with_stems([target, *pathlib.Path(target).parts]))
    exists = os.path.lexists(path) or containers.is_file(path) or containers.is_folder(path)
    for folder in map(str, (place, place.parent)) if exists else ():
        if containers.is_folder(folder):
            names.append(_names_in(folder, containers.modified(folder)))
    return names


@functools.lru_cache(maxsize=2)
def _names_in(folder: str, _mtime_ns: int) -> frozenset[str]:
    """The names in a folder and their stems, cached: many failures are of one folder."""
    try:
        ordinary = os.path.isdir(folder)
        return _with_stems(os.listdir(folder) if ordinary else containers.list_folder(folder))
    except (OSError, Rejected):  # it cannot be read
        return frozenset()


def _with_stems(names: Sequence[str]) -> frozenset[str]:
    stems = (stem for name in names for stem in (name.partition(".")[0], png.split_name(name)[0]))
    raw = [*names, *stems]
    return frozenset([*raw, *map(files.printable, raw)])


def _paths_in(message: str) -> Iterator[str]:
    """Yields the existing paths that a message names; they may contain spaces."""
    ends = [match.start() for match in re.finditer(r"(?=[\s:;,)'\"])|$", message)]
    for token in re.finditer(r"(?<![^\s('\"])[^\s('\"]+", message):
        # A word without a separator is a path only as a whole.
        last = message if os.sep in token[0] else token[0]
        for end in reversed(ends):
            path = message[token.start() : end]
            if token.start() < end <= token.start() + len(last) and os.path.lexists(path):
                yield path
                break


def _header(path: str) -> bytes:
    """The start of a file with its header, decompressed if it is deflated DICOM or gzip."""
    start = b""
    with contextlib.suppress(OSError, *archives.DAMAGED), containers.open_file(path) as file:
        start = file.read(_HEADER)
    try:
        if start.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, _HEADER)
        if DeflatedExplicitVRLittleEndian.encode() in start[:4096]:
            # The preamble, "DICM", the group length element, and a group of that length.
            first = 144 + int.from_bytes(start[140:144], "little")
            return start + zlib.decompressobj(-zlib.MAX_WBITS).decompress(start[first:], _HEADER)
    except zlib.error:
        pass  # damaged
    return start
