"""Pseudo-labels of a teacher (paper, section 4.2): selection rule, label shards, and source.

    OUT/pseudo.json                    the teacher, the images, the rule and the counts
    OUT/part-00000-of-00009.npy        one structured row per image with pseudo-labels

Images without any pseudo-label have no row and are dropped (our choice; the paper does not say).
Images are not copied: a row refers to its record by number. The labels of an image depend on that
image alone, so shards can be labelled in any order and on any host.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from maknet_jax import files
from maknet_jax.data import records
from maknet_jax.errors import InputError

FORMAT = 1
# Precision of the teacher -> bound on the difference of confidences between devices. 1e-5 was
# measured; 1e-2 is an estimate.
CLOSE = {"float32": 1e-5, "bfloat16": 1e-2}


def row_dtype(top: int) -> np.dtype:
    """A row: the record number, the columns of its labels (-1: none) and their confidences."""
    return np.dtype([("index", "<i8"), ("labels", "<i2", (top,)), ("confidences", "<f4", (top,))])


def select(
    confidences: np.ndarray,
    exclusive: np.ndarray,
    *,
    top: int = 15,
    threshold: float | np.ndarray = 0.5,
    close: float = CLOSE["float32"],
) -> tuple[np.ndarray, np.ndarray]:
    """Selects the pseudo-labels of images (paper, section 4.2).

    Of the `top` most confident labels, those above `threshold` are considered in order of
    decreasing confidence, and selected unless a selected label excludes them. Ties go to the lower
    column.

    Args:
      confidences: float32 `[N, K]`, the teacher's sigmoids.
      exclusive: bool `[K, K]`, symmetric, see `Vocabulary.exclusive`.
      top: maximum number of labels per image.
      threshold: a label's confidence must exceed it; one for all labels, or `[K]`.
      close: a difference of confidences.

    Returns:
      (columns, close): int16 `[N, min(top, K)]`, the selected columns by decreasing confidence,
      then -1; bool `[N]`, whether changing confidences by `close` could change the selection.
    """
    count = min(top, confidences.shape[1])
    order = np.argsort(-confidences, axis=1, kind="stable")[:, : count + 1]
    ranked = np.take_along_axis(confidences, order, axis=1)
    limits = np.broadcast_to(np.asarray(threshold, np.float32), confidences.shape[1:])[order]
    unsure = ((np.abs(ranked - limits) < close) & (limits < 1))[:, :count].any(axis=1)
    # A near tie matters at the cut after `top`, and between two labels that exclude each other.
    near = ranked[:, :, None] - ranked[:, None] < close
    likely = ranked > limits - close
    near &= likely[:, :, None] | likely[:, None]
    rivals = exclusive[order[:, :, None], order[:, None]]
    rivals[:, :count, count:] = True
    unsure |= np.triu(near & rivals, 1).any(axis=(1, 2))
    selected = np.full((len(confidences), count), -1, np.int16)
    excluded = np.zeros(confidences.shape, bool)
    rows, places = np.arange(len(confidences)), np.zeros(len(confidences), int)
    for columns, above in zip(order.T[:count], (ranked > limits).T, strict=False):
        chosen = above & ~excluded[rows, columns]
        selected[chosen, places[chosen]] = columns[chosen]
        excluded[chosen] |= exclusive[columns[chosen]]
        places += chosen
    return selected, unsure


def thresholds_for_precision(
    confidences: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray,
    *,
    precision: float,
    default: float,
) -> np.ndarray:
    """The lowest threshold per label at which the estimated precision reaches a value.

    One threshold for all labels is strict for some and lenient for others: a weighted focal loss
    makes frequent labels underconfident and rare ones overconfident. Thresholds per class are the
    idea of CAP (Xie et al., NeurIPS 2023), which derives them from the frequencies of the labels;
    here they come from labelled images, so that the labels of an image depend on it alone.

    Args:
      confidences: float32 `[N, K]`, of labelled images.
      labels: `[N, K]`, 0 or 1.
      known: bool `[N, K]`, False where a label is unknown.
      precision: above 0, at most 1.
      default: the threshold of labels that all images or none have: their precision says nothing.

    Returns:
      float32 `[K]`, for `select`, halfway between two confidences; 1 for labels whose precision is
      too low at every threshold, which are not given.
    """
    thresholds = np.full(confidences.shape[1], default, np.float32)
    for column in range(len(thresholds)):
        judged = known[:, column] > 0
        values, truth = confidences[judged, column], labels[judged, column] > 0
        if not truth.any() or truth.all():
            continue
        order = np.argsort(-values, kind="stable")
        values = np.append(values[order], np.float32(0))
        share = truth[order].cumsum() / np.arange(1, len(order) + 1)
        # A threshold cannot separate equal confidences.
        reached = np.flatnonzero((share >= precision) & (values[:-1] > values[1:]))
        if not len(reached):
            thresholds[column] = 1
            continue
        lowest, below = values[reached[-1]], values[reached[-1] + 1]
        middle = (lowest + below) / 2
        thresholds[column] = middle if middle < lowest else below
    return thresholds


def rows_of(
    numbers: np.ndarray, columns: np.ndarray, confidences: np.ndarray, *, top: int
) -> np.ndarray:
    """The rows of the images with pseudo-labels.

    Args:
      numbers: `[N]`, the record numbers.
      columns: int16 `[N, C]`, from `select`.
      confidences: float32 `[N, K]`.
      top: number of labels per row.

    Returns:
      `row_dtype(top)` `[M]`, in the order of `numbers`.
    """
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
    """Writes one label shard atomically; returns its SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    with files.write_whole(path, "wb") as file:
        file.write(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_rows(path: pathlib.Path, digest: str) -> np.ndarray:
    """Reads a label shard and verifies its SHA-256.

    Raises:
      InputError: the file is missing or damaged.
    """
    payload = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(payload).hexdigest() == digest:
        return np.load(io.BytesIO(payload), allow_pickle=False)
    raise InputError(f"label shard {path} is missing or damaged: run `maknet pseudo-label` again")


class PseudoSource:
    """Random access to images with their pseudo-labels (picklable, for grain)."""

    def __init__(
        self,
        path: pathlib.Path | str,
        *,
        size: int,
        names: Sequence[str],
        balance: int = 0,
        seed: int = 0,
    ):
        """Opens the output of `maknet pseudo-label`.

        Args:
          path: the output folder.
          size: the edge of the student's images, in pixels.
          names: the student's labels, in column order.
          balance: 0 uses every image once per epoch; otherwise the number of images per label: the
            most confident ones, repeated if a label has fewer (noisy student, arXiv:1911.04252,
            section 3).
          seed: of the order of the balanced images.

        Raises:
          InputError: the pseudo-labels are unfinished or damaged, have other labels or another
            image size, or the images have changed since then.
        """
        path = pathlib.Path(path)
        try:
            self.info = files.read_json(path / "pseudo.json")
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{path} has no finished pseudo-labels (pseudo.json is missing): run `maknet "
                "pseudo-label`"
            ) from None
        try:
            shards = [(path / shard["file"], shard["sha256"]) for shard in self.info["shards"]]
            images, labels = os.fspath(self.info["records"]), tuple(self.info["labels"])
            fingerprint, split, _ = (self.info[key] for key in ("fingerprint", "split", "soft"))
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}/pseudo.json is damaged ({type(error).__name__}: {error}): run `maknet "
                "pseudo-label` again"
            ) from None
        dataset = records.open_dataset(images)
        if dataset.fingerprint != fingerprint:
            raise InputError(
                f"{dataset.path} has changed since {path} was written: label the images again"
            )
        if labels != tuple(names):
            raise InputError(
                f"{path} has other labels than the training data: use a teacher with these labels"
            )
        records.check_size(dataset, size, "the student")
        self.size = len(names)
        self._images = dataset.source(split)
        self._rows = np.concatenate([read_rows(*shard) for shard in shards])
        if not len(self._rows):
            raise InputError(
                f"no image in {path} has a pseudo-label: lower --threshold or --precision"
            )
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
        """SHA-256 over the images, their labels, and whether the labels are soft."""
        shards = [shard["sha256"] for shard in self.info["shards"]]
        content = json.dumps([self.info["fingerprint"], self.info["soft"], shards])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def label_counts(self) -> np.ndarray:
        """Images per label in an epoch, `[K]`; soft labels count by their confidence."""
        rows = self._rows if self._order is None else self._rows[self._order]
        selected = rows["labels"] >= 0
        weights = rows["confidences"][selected] if self.info["soft"] else None
        return np.bincount(rows["labels"][selected], weights, minlength=self.size)


def balanced(rows: np.ndarray, size: int, count: int, seed: int) -> np.ndarray:
    """Draws the same number of images for each label.

    Args:
      rows: the rows of the label shards.
      size: the number of labels K.
      count: images per label, the most confident ones; repeated if a label has fewer.
      seed: of the order.

    Returns:
      Row numbers, `count` for each label that has any image, shuffled.
    """
    chosen = []
    for column in range(size):
        where, place = np.nonzero(rows["labels"] == column)
        best = where[np.argsort(-rows["confidences"][where, place], kind="stable")]
        if len(best):
            chosen.append(np.resize(best, count))
    return np.random.default_rng(seed).permutation(np.concatenate(chosen))
