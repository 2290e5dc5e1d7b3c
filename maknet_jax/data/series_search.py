"""The series of `prepare dicom`: searched for by all workers, and selected by length."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from maknet_jax import console
from maknet_jax.ct import reading, search
from maknet_jax.data import processes, worker_pool
from maknet_jax.errors import NothingUsable

_START = 1.0  # seconds until workers have imported what they need
_NATIVE, _ENCODED = 0.004, 0.02  # seconds to read a slice and to resample it
_CHUNK = 32  # files, about 40 ms


@dataclasses.dataclass(frozen=True)
class _Chunk:
    paths: tuple[str, ...]
    overrides: reading.Overrides


def find_series(
    path: search.Paths,
    pool: processes.Processes | None,
    *,
    workers: int,
    overrides: reading.Overrides,
) -> tuple[list[search.SeriesRef], list[tuple[str, str]]]:
    """`search.find_series` with workers; until they have started, this process reads.

    Args:
      path: files and folders.
      pool: the workers; None uses threads.
      workers: the number of threads.
      overrides: what is read although it would be rejected.

    Raises:
      InputError: a path does not exist, or a worker died.
    """
    read = None if pool is None else functools.partial(_read, pool)
    return search.find_series(path, workers=workers, overrides=overrides, read_headers=read)


def choose(
    path: search.Paths,
    series: Sequence[search.SeriesRef],
    failures: list[tuple[str, str]],
    min_slices: int,
) -> tuple[list[search.SeriesRef], dict[str, Any]]:
    """Selects the series that are long enough.

    Args:
      path: where they were searched for.
      series: the result of the search.
      failures: that of the search; the short series are appended.
      min_slices: the least number of slices.

    Returns:
      (the series, counts for `dataset.json`).

    Raises:
      NothingUsable: no series is long enough.
    """
    small = [ref for ref in series if ref.count < min_slices]
    usable = [ref for ref in series if ref.count >= min_slices]
    counts = {
        "series": len(usable),
        "min_slices": min_slices,
        "series_too_small": len(small),
        "series_unreadable": len(failures),
        "copies_of_slices": sum(ref.copies for ref in series),
    }
    few = f"slices, fewer than --min-slices {min_slices}"
    failures += [(ref.paths[0], f"{ref.count} {few}") for ref in small]
    if not usable:
        unreadable = counts["series_unreadable"]
        parts = (
            f"{len(small)} series of fewer than {min_slices} slices (--min-slices)" * bool(small),
            f"{console.plural(unreadable, 'rejected file')} or series" * bool(unreadable),
        )
        why = (
            ", ".join(filter(None, parts))
            or f"it holds {search.contents(path)}; expected DICOM, NIfTI or PNG"
        )
        raise NothingUsable(f"no usable series in {path}: {why}", failures)
    return usable, counts


def is_small(series: Iterable[search.SeriesRef]) -> bool:
    """Whether this process can read the series before the workers would have started."""
    seconds = sum(ref.count * (_ENCODED if ref.encoded else _NATIVE) for ref in series)
    return seconds < _START


def _read(
    pool: processes.Processes, paths: Sequence[str], overrides: reading.Overrides
) -> Iterator[search.Headers]:
    """`search.headers_of` of each path."""
    starts = range(0, len(paths), _CHUNK)
    chunks = [_Chunk(tuple(paths[start : start + _CHUNK]), overrides) for start in starts]
    here = 0
    while here < len(chunks) and not pool.is_ready():
        yield from _headers_of(chunks[here])
        here += 1

    def died(chunk: _Chunk, how: str) -> list[search.Headers]:
        more = f" or one of the next {len(chunk.paths) - 1} files"
        raise worker_pool.death(pool, chunk.paths[0] + more * (len(chunk.paths) > 1), how)

    read = pool.map(_headers_of, chunks[here:], alone=lambda _: False, died=died)
    yield from itertools.chain.from_iterable(read)


def _headers_of(chunk: _Chunk) -> list[search.Headers]:
    return [search.headers_of(path, chunk.overrides) for path in chunk.paths]
