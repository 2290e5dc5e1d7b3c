"""The known truth of a label of an image, and whether a prediction of it is correct (figure 3).

In figure 3, green is a true positive, red a false positive, and black a label without annotation. A
label that a report does not mention is not necessarily absent: it is absent only if the report
names a label that excludes it, or if the labels of the data set are complete.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from maknet_jax.data.labels import Vocabulary

# Stored in the settings of results, so that results of different rules are not mixed. In rule 1
# every label without an annotation was absent.
RULE = 2
# Kinds in dataset.json of data sets with complete labels. A table lists all labels of a slice, and
# segmentations mask labels that were not segmented. DeepLesion's labels (kinds deeplesion and
# lesions, and the phantom's) are mined from reports, which are incomplete.
COMPLETE_KINDS = ("table", "segmentations")
# Splits whose labels are complete in every data set: LesaNet's hand-labelled lesions.
COMPLETE_SPLITS = ("hand",)
UNLABELLED = "unlabelled"


def labels_are_complete(info: Mapping[str, Any], split: str) -> bool:
    """Whether a label that is not annotated is absent.

    Args:
      info: the content of dataset.json.
      split: the split.
    """
    if split == UNLABELLED:
        return False
    return split in COMPLETE_SPLITS or info.get("kind") in COMPLETE_KINDS


@dataclasses.dataclass(frozen=True)
class Truth:
    """The truth of one label of an image.

    Attributes:
      value: "true" (present), "false" (absent) or "unknown".
      reason: why, in a few words.
    """

    value: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The annotation of an image.

    Attributes:
      labels: uint8 `[K]`, 1 where a label is annotated.
      label_mask: uint8 `[K]`, 0 where the label is unknown.
      complete: whether labels that are not annotated are absent.
      vocabulary: the K labels, with their exclusive relations.
    """

    labels: np.ndarray
    label_mask: np.ndarray
    complete: bool
    vocabulary: Vocabulary

    def truth(self, column: int) -> Truth:
        """What is known about the label of a column."""
        if not self.label_mask[column]:
            return Truth("unknown", "annotation uncertain or missing")
        if self.labels[column]:
            return Truth("true", "annotated")
        if self.complete:
            return Truth("false", "not among the complete labels")
        present = (self.labels > 0) & (self.label_mask > 0)
        excluding = np.flatnonzero(self.vocabulary.exclusive[column] & present)
        if len(excluding):
            return Truth("false", f"excluded by {self.vocabulary.names[excluding[0]]}")
        return Truth("unknown", "not mentioned")


def outcome(truth: str, predicted: bool) -> str:
    """Whether a prediction is correct: "true_positive", "false_negative" etc., or "unknown".

    Args:
      truth: the `value` of a `Truth`.
      predicted: whether the confidence reaches the threshold of the label.
    """
    if truth == "unknown":
        return "unknown"
    right = "true" if (truth == "true") == predicted else "false"
    return f"{right}_{'positive' if predicted else 'negative'}"
