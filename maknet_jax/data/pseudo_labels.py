"""Pseudo-labels of a teacher: how they are chosen, and their shards beside the image records.

    OUT/pseudo.json                    the teacher, the images, the rule and the counts
    OUT/part-00000-of-00009.npy        one structured row an image that kept a label

The images stay where they are: a row names its record by number. What a teacher gives is decided
image by image, so that shards can be made in any order and on any host (paper, section 4.2).
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from maknet_jax import files
from maknet_jax.data import records
from maknet_jax.errors import InputError

FORMAT = 1
# Confidences on two layouts of devices differ by less: nearer to a threshold or a tie is close.
CLOSE = {"float32": 1e-5, "bfloat16": 1e-2}  # by the teacher's precision; the second is a guess


def row_dtype(top: int) -> np.dtype:
    """A row: the record's number, its labels' columns (-1: none) and their confidences."""
    return np.dtype([("index", "<i8"), ("labels", "<i2", (top,)), ("confidences", "<f4", (top,))])


def select(
    confidences: np.ndarray,
    exclusive: np.ndarray,
    *,
    top: int = 15,
    threshold: float = 0.5,
    close: float = CLOSE["float32"],
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the pseudo-labels of images (paper, section 4.2).

    The `top` most confident labels, of these those above `threshold`, and from the most confident
    down those that no kept one excludes. Of equal confidences the lower column comes first.

    Args:
      confidences: float32 `[N, K]`, the teacher's sigmoids.
      exclusive: bool `[K, K]`, symmetric, see `Vocabulary.exclusive`.
      top: labels an image at most.
      threshold: what a confidence must exceed.
      close: a difference of confidences.

    Returns:
      (columns, close): int16 `[N, min(top, K)]`, kept columns from the most confident down, then
      -1; bool `[N]`, whether a difference of `close` could change which they are.
    """
    count = min(top, confidences.shape[1])
    order = np.argsort(-confidences, axis=1, kind="stable")[:, : count + 1]
    ranked = np.take_along_axis(confidences, order, axis=1)
    unsure = (np.abs(ranked - threshold) < close)[:, :count].any(axis=1)
    # A near tie matters where it decides the cut at `top`, or which of two that exclude each other.
    near = ranked[:, :, None] - ranked[:, None] < close
    near &= ranked[:, None] > threshold - close
    rivals = exclusive[order[:, :, None], order[:, None]]
    rivals[:, :count, count:] = True
    unsure |= np.triu(near & rivals, 1).any(axis=(1, 2))
    selected = np.full((len(confidences), count), -1, np.int16)
    excluded = np.zeros(confidences.shape, bool)
    rows, places = np.arange(len(confidences)), np.zeros(len(confidences), int)
    for columns, values in zip(order.T[:count], ranked.T, strict=False):
        chosen = (values > threshold) & ~excluded[rows, columns]
        selected[chosen, places[chosen]] = columns[chosen]
        excluded[chosen] |= exclusive[columns[chosen]]
        places += chosen
    return selected, unsure


def rows_of(
    numbers: np.ndarray, columns: np.ndarray, confidences: np.ndarray, *, top: int
) -> np.ndarray:
    """The rows of the images that kept a label, in the order of `numbers`."""
    labelled = np.flatnonzero((columns >= 0).any(axis=1))
    columns = columns[labelled]
    rows = np.zeros(len(labelled), row_dtype(top))
    rows["index"] = np.asarray(numbers)[labelled]
    rows["labels"] = -1
    rows["labels"][:, : columns.shape[1]] = columns
    values = np.take_along_axis(confidences[labelled], np.maximum(columns, 0), axis=1)
    rows["confidences"][:, : columns.shape[1]] = np.where(columns >= 0, values, 0)
    return rows


def write_rows(path: pathlib.Path, rows: np.ndarray) -> str:
    """Writes one label shard whole or not at all; returns its SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    with files.write_whole(path, "wb") as file:
        file.write(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_rows(path: pathlib.Path, digest: str) -> np.ndarray:
    """Reads a label shard that has the SHA-256 `digest`.

    Raises:
      InputError: it is damaged or missing.
    """
    payload = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(payload).hexdigest() == digest:
        return np.load(io.BytesIO(payload), allow_pickle=False)
    raise InputError(f"label shard {path} is missing or damaged: run `maknet pseudo-label` again")


class PseudoSource:
    """Random access to the unlabelled images that a teacher gave labels (picklable, for grain)."""

    def __init__(
        self,
        path: pathlib.Path | str,
        *,
        size: int,
        names: Sequence[str],
        balance: int = 0,
        seed: int = 0,
    ):
        """Opens what `maknet pseudo-label` wrote.

        Args:
          path: its folder.
          size: the edge of the images that is wanted.
          names: the labels that are wanted, in column order.
          balance: 0 takes every image once an epoch; else so many of each label, the most confident
            ones, repeated where a label has fewer (noisy student, arXiv:1911.04252, section 3).
          seed: of the order of the balanced images.

        Raises:
          InputError: it is unfinished or damaged, of other labels, or of other images than there
            are now.
        """
        path = pathlib.Path(path)
        try:
            self.info = files.read_json(path / "pseudo.json")
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{path} holds no finished pseudo-labels (no pseudo.json): run `maknet "
                "pseudo-label`"
            ) from None
        dataset = records.open_dataset(self.info["records"])
        if dataset.fingerprint != self.info["fingerprint"]:
            raise InputError(
                f"{dataset.path} is not what {path} was made for: label the images again"
            )
        if tuple(self.info["labels"]) != tuple(names):
            raise InputError(f"{path} has other labels than the training data: use their teacher")
        records.check_size(dataset, size, "the student")
        self.size = len(names)
        self._images = dataset.source(self.info["split"])
        rows = [read_rows(path / shard["file"], shard["sha256"]) for shard in self.info["shards"]]
        self._rows = np.concatenate(rows)
        if not len(self._rows):
            raise InputError(f"{path} kept no label of any image: lower --threshold")
        self._order = balanced(self._rows, self.size, balance, seed) if balance else None

    def __len__(self) -> int:
        return len(self._rows if self._order is None else self._order)

    def __getitem__(self, index: int) -> records.Example:
        row = self._rows[index if self._order is None else self._order[index]]
        selected = row["labels"] >= 0
        labels = np.zeros(self.size, np.float32)
        labels[row["labels"][selected]] = row["confidences"][selected] if self.info["soft"] else 1
        image = self._images[int(row["index"])]
        mask = np.ones(self.size, np.uint8)
        return records.Example(image.id, image.image, labels, mask, image.meta)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the images, the labels and how they are meant."""
        shards = [shard["sha256"] for shard in self.info["shards"]]
        content = json.dumps([self.info["fingerprint"], self.info["soft"], shards])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def label_counts(self) -> np.ndarray:
        """How many images of an epoch have each label, `[K]`; soft ones count what they are."""
        rows = self._rows if self._order is None else self._rows[self._order]
        selected = rows["labels"] >= 0
        weights = rows["confidences"][selected] if self.info["soft"] else None
        return np.bincount(rows["labels"][selected], weights, minlength=self.size)


def balanced(rows: np.ndarray, size: int, count: int, seed: int) -> np.ndarray:
    """Row numbers with `count` images of each label that has any, in a shuffled order.

    The most confident images of a label come first; a label with fewer repeats them.
    """
    chosen = []
    for column in range(size):
        where, place = np.nonzero(rows["labels"] == column)
        best = where[np.argsort(-rows["confidences"][where, place], kind="stable")]
        if len(best):
            chosen.append(np.resize(best, count))
    return np.random.default_rng(seed).permutation(np.concatenate(chosen))
