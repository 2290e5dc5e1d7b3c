"""Objects that wait in a file, because they would fill the memory."""

import pathlib
import pickle
from collections.abc import Collection, Iterable, Iterator
from typing import IO, TypeVar

T = TypeVar("T")


class Spool(Collection[T]):
    """The records of a long unit, in an unnamed file until all of its pieces are checked."""

    def __init__(self, file: IO[bytes], folder: pathlib.Path) -> None:
        self._file, self._folder, self._count = file, folder, 0

    def extend(self, examples: Iterable[T]) -> None:
        """Appends records.

        Raises:
          OSError: the disk is full; with the folder.
        """
        try:
            for example in examples:
                pickle.dump(example, self._file)
                self._count += 1
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        self._file.seek(0)
        return (pickle.load(self._file) for _ in range(self._count))

    def __contains__(self, example: object) -> bool:
        return any(example is other for other in self)
