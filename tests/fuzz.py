"""Reads random mutations of a file as a user would: a child process of test_fuzz.

    python tests/fuzz.py FILE FOLDER COUNT SEED

prints {"read": files that were read, "rejected": ..., "slowest": seconds, "memory": MiB}. An
exception that is not an error of the package ends it with the mutation in FOLDER.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import pathlib
import random
import resource
import struct
import sys
import time
import warnings
import zlib

from maknet_jax.ct import dicom_seg, nifti, reading, search, volumes
from maknet_jax.errors import InputError, Rejected

FORMATS = {".gz": (gzip.decompress, gzip.compress), ".bz2": (bz2.decompress, bz2.compress)}
FORMATS |= {".xz": (lzma.decompress, lzma.compress)}
LOSSY = reading.Overrides(allow_lossy=True)
ODD = (0, 1, 0x7F, 0x80, 0xFF, *b"-9E.\\")  # of lengths, markers and numbers as text


def mutate(content, rng):
    """Replaces some bytes, mostly in the header, and sometimes drops, repeats or cuts some."""
    content = bytearray(content)
    ends = (400, 4000, len(content), len(content))
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(min(rng.choice(ends), len(content)))
        content[place] = rng.choice([rng.randrange(256), rng.choice(ODD), content[place] ^ 1])
    start = rng.randrange(len(content))
    stop = start + rng.choice([1, 2, 4, 16, 256, 4096])
    kind = rng.randrange(12)
    if kind == 0:
        del content[start:stop]
    elif kind == 1:
        content[start:start] = content[start:stop]
    elif kind == 2:
        del content[start:]
    return bytes(content)


def with_checksums(content):
    """A PNG whose chunks have the right checksums."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, place)
        body = content[place + 4 : place + 8 + size]
        parts += [content[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + size
    return b"".join(parts)


def mutations(path, rng):
    """Yields mutations; half of those of packed files are mutated before they are packed."""
    packed = path.read_bytes()
    unpack, pack = FORMATS.get(path.suffix, (None, None))
    inner = unpack(packed) if unpack else packed
    while True:
        if unpack and rng.random() < 0.5:
            yield pack(mutate(inner, rng))
        elif path.suffix == ".png" and rng.random() < 0.7:
            yield with_checksums(mutate(packed, rng))
        else:
            yield mutate(packed, rng)


def read(path):
    """Reads all that a file holds; whether something was read."""
    series, _ = search.find_series(path, overrides=LOSSY)
    for ref in series:
        volumes.load_series(ref, overrides=LOSSY)
    if ".nii" in path.suffixes:
        nifti.read_label_names(path)
        with contextlib.suppress(Rejected):  # CT is not a label map
            nifti.load_label_map(path)
    elif path.suffix in (".dcm", ".png") and len(series) == 1:
        volumes.load_series_of(path, overrides=LOSSY)
    elif path.suffix == ".seg" and dicom_seg.is_segmentation(path):
        dicom_seg.read_header(path)
    return bool(series)


def main(source, folder, count, seed):
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)
    rng, counts, slowest = random.Random(seed), {"read": 0, "rejected": 0}, 0.0
    target = folder / source.name
    for _, content in zip(range(count), mutations(source, rng), strict=False):
        target.write_bytes(content)
        started = time.monotonic()
        try:
            counts["read" if read(target) else "rejected"] += 1
        except (InputError, Rejected):
            counts["rejected"] += 1
        slowest = max(slowest, time.monotonic() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps(counts | {"slowest": slowest, "memory": memory}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
