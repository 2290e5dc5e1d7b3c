"""Which slices show labels best: the highest confidences, of different series first."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def group_of(image_id: str, meta: Mapping[str, Any]) -> str:
    """The patient of a record or slice, else its series, else its id."""
    if patient := re.search(r"(\d{6})_\d\d_\d\d", image_id):  # DeepLesion's file names
        return patient[1]
    name = meta.get("patient") or meta.get("series")
    return name or image_id.rpartition(":")[0] or image_id


def label_scores(
    confidences: np.ndarray, thresholds: np.ndarray, columns: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `best_slices` for some labels, or for any label.

    >>> scores, reached = label_scores(np.array([[0.6, 0.5], [0.1, 0.2]]), np.array([0.7, 0.3]), [])
    >>> scores.tolist(), reached.tolist()  # 0.6 is below its threshold
    ([[0.5], [0.2]], [[True], [False]])

    Args:
      confidences: `[N, K]`.
      thresholds: `[K]`.
      columns: T labels; without any, each slice counts with its most confident label, if possible
        one that reaches its threshold.

    Returns:
      (confidences, whether they reach their thresholds), `[N, T]` each; T is 1 without columns.
    """
    reached = (confidences >= thresholds) & (thresholds < 1)  # 1: never predicted
    if len(columns):
        return confidences[:, columns], reached[:, columns]
    some = reached.any(axis=1, keepdims=True)
    scores = np.where(reached | ~some, confidences, 0).max(axis=1, keepdims=True)
    return scores, some


def best_slices(
    confidences: np.ndarray, reached: np.ndarray, groups: Sequence[str], limit: int | None
) -> list[int]:
    """The slices that show labels best, in ascending order.

    The labels take turns. Each takes first the slices whose confidence reaches its threshold: the
    best of each group, then the second of each, and so on; then the others in the same way.

    >>> scores, reached = np.c_[[0.9, 0.8, 0.1, 0.7]], np.c_[[1, 1, 0, 1]]
    >>> [best_slices(scores, reached, ["a", "a", "b", "c"], limit) for limit in (2, 3)]
    [[0, 3], [0, 1, 3]]

    Args:
      confidences: `[N, T]`, of the labels.
      reached: bool `[N, T]`: the confidence reaches the threshold.
      groups: N names, the patient or the series of each slice.
      limit: maximum number of slices; None takes the best slice of each label.
    """
    columns = []
    for scores, above in zip(confidences.T, reached.T, strict=True):
        taken: dict[str, int] = {}
        order: list[tuple[bool, int, int, int]] = []
        for number in np.argsort(-scores, kind="stable").tolist():
            turn = taken[groups[number]] = taken.get(groups[number], -1) + 1
            order.append((not above[number], turn, len(order), number))
        columns.append([number for *_, number in sorted(order)])
    chosen: dict[int, None] = {}
    for row in zip(*columns, strict=True):
        for number in row:
            if limit is None or len(chosen) < limit:
                chosen.setdefault(number)
        if limit is None:
            break
    return sorted(chosen)
