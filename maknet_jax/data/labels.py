"""Label vocabularies: LesaNet's lesion ontology (xlsx), or a plain list of names."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from maknet_jax.errors import InputError

_COLUMNS = ("class", "term", "term_exclusive", "term_parents")


@dataclasses.dataclass(frozen=True)
class Label:
    """One label.

    Attributes:
      name: unique within the vocabulary.
      label_class: bodypart, type, attribute, or "" where there is no ontology.
      parents: direct parents in the result of `read_ontology`; all ancestors in a `Vocabulary`.
      exclusive: labels that the ontology lists as excluded, before the closure.
    """

    name: str
    label_class: str = ""
    parents: tuple[str, ...] = ()
    exclusive: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The labels of a data set in column order, with the relations between them.

    Parents are transitive. Relations refer to labels of this vocabulary only.
    """

    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """The label names in column order."""
        return tuple(label.name for label in self.labels)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Label name -> column."""
        return {label.name: column for column, label in enumerate(self.labels)}

    @functools.cached_property
    def parents(self) -> tuple[tuple[int, ...], ...]:
        """The columns of all ancestors of each column."""
        index = self.index
        return tuple(tuple(index[parent] for parent in label.parents) for label in self.labels)

    def vector(self, names: Iterable[str]) -> np.ndarray:
        """uint8 `[K]`, 1 for each of `names`; names outside the vocabulary are ignored."""
        vector = np.zeros(len(self), np.uint8)
        vector[[self.index[name] for name in names if name in self.index]] = 1
        return vector

    def with_ancestors(self, names: Iterable[str]) -> tuple[str, ...]:
        """`names`, then their ancestors, without duplicates."""
        names = tuple(names)
        implied = (self.labels[self.index[name]].parents for name in names if name in self.index)
        return tuple(dict.fromkeys([*names, *itertools.chain.from_iterable(implied)]))

    def excludes(self, name: str, others: Iterable[str]) -> bool:
        """Whether the ontology lists `name` as exclusive with one of `others`, or vice versa."""
        exclusive = self.labels[self.index[name]].exclusive
        return any(
            other in exclusive or name in self.labels[self.index[other]].exclusive
            for other in others
            if other in self.index
        )

    @functools.cached_property
    def exclusive(self) -> np.ndarray:
        """Columns that exclude each other, bool `[K, K]`: LesaNet's closure, made symmetric.

        A label inherits the exclusions of its parents and excludes the children of each label that
        it excludes. This is repeated until nothing changes: LesaNet's 396 entries become 8,902
        directed pairs. The diagonal is False, although one label excludes itself in LesaNet's
        closure.
        """
        size = len(self)
        matrix, parent = np.zeros((2, size, size), bool)
        for column, label in enumerate(self.labels):
            matrix[column, [self.index[name] for name in label.exclusive if name in self.index]] = 1
            parent[column, list(self.parents[column])] = True
        pairs = -1
        while pairs != int(matrix.sum()):
            pairs = int(matrix.sum())
            matrix |= parent @ matrix  # boolean product: any parent
            matrix |= matrix @ parent.T
        matrix |= matrix.T
        np.fill_diagonal(matrix, False)
        return matrix

    def to_json(self) -> list[dict[str, Any]]:
        """A list of plain dicts, as stored in `dataset.json`."""
        return [
            {
                "name": label.name,
                "class": label.label_class,
                "parents": list(label.parents),
                "exclusive": list(label.exclusive),
            }
            for label in self.labels
        ]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> "Vocabulary":
        """The inverse of `to_json`."""
        return cls(
            tuple(
                Label(row["name"], row["class"], tuple(row["parents"]), tuple(row["exclusive"]))
                for row in rows
            )
        )

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "Vocabulary":
        """A vocabulary without relations."""
        return cls(tuple(Label(name) for name in names))


def read_ontology(path: str | os.PathLike) -> dict[str, Label]:
    """Reads LesaNet's `lesion_ontology_*.xlsx`.

    Returns:
      A dict term -> `Label` with direct parents and exclusions as written in the sheet.

    Raises:
      InputError: the file is missing, is not an xlsx file, or lacks a column.
    """
    import openpyxl  # here, because importing it takes long, and workers do not need it

    path = pathlib.Path(path)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = list(book.active.iter_rows(values_only=True))
        book.close()
    except FileNotFoundError:
        raise InputError(f"ontology {path} does not exist: see data/README.md") from None
    except Exception as error:
        raise InputError(f"ontology {path} is not a readable xlsx file: {error}") from None
    header = [str(cell or "").strip() for cell in rows[0]] if rows else []
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise InputError(
            f"ontology {path} has no column {', '.join(missing)}; LesaNet's sheet has "
            f"{', '.join(_COLUMNS)}"
        )
    position = {column: header.index(column) for column in _COLUMNS}
    terms = {}
    for row in rows[1:]:
        name = str(row[position["term"]] or "").strip()
        if name:
            terms[name] = Label(
                name,
                str(row[position["class"]] or "").strip(),
                _split(row[position["term_parents"]]),
                _split(row[position["term_exclusive"]]),
            )
    return terms


def _split(cell: Any) -> tuple[str, ...]:
    return tuple(part.strip() for part in str(cell or "").split("|") if part.strip())


def ontology_vocabulary(terms: dict[str, Label], names: Sequence[str]) -> Vocabulary:
    """The vocabulary of `names` with the ontology's relations restricted to them.

    Args:
      terms: the ontology, see `read_ontology`.
      names: label names in column order.

    Raises:
      InputError: a name is not in the ontology.
    """
    unknown = [name for name in names if name not in terms]
    if unknown:
        raise InputError(
            f"label {unknown[0]!r} is not in the ontology ({len(unknown)} labels are missing): "
            "use the ontology that belongs to these label files"
        )
    members = set(names)
    labels = []
    for name in names:
        parents = tuple(p for p in _ancestors(terms, name) if p in members)
        exclusive = tuple(e for e in terms[name].exclusive if e in members)
        labels.append(Label(name, terms[name].label_class, parents, exclusive))
    return Vocabulary(tuple(labels))


def _ancestors(terms: dict[str, Label], name: str) -> list[str]:
    # Terms outside the vocabulary are followed too: a grandparent is an ancestor even if the parent
    # is not a label.
    ancestors: list[str] = []
    queue = list(terms[name].parents)
    while queue:
        parent = queue.pop(0)
        if parent != name and parent not in ancestors:
            ancestors.append(parent)
            queue.extend(terms[parent].parents if parent in terms else ())
    return ancestors
