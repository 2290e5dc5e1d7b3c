"""The columns of labels that are named on the command line or in Python."""

from collections.abc import Collection, Sequence

from maknet_jax.errors import InputError, did_you_mean
from maknet_jax.runs import workdir


def label_columns(run: workdir.Run, labels: Sequence[str] | None) -> list[int]:
    """The columns of label names.

    Raises:
      InputError: a name is unknown.
    """
    index = run.vocabulary.index
    labels = [labels] if isinstance(labels, str) else list(labels or ())
    for name in (labels := join_labels(labels, index)):
        if name not in index:
            raise InputError(
                f"label {name!r} is unknown: {did_you_mean(name, index)} The network has "
                f"{len(index)} labels"
            )
    return [index[name] for name in labels]


def join_labels(words: Sequence[str], known: Collection[str]) -> list[str]:
    """Joins words that a comma inside a label has separated.

    >>> join_labels(["liver", "fat", "left side"], ["liver", "fat, left side"])
    ['liver', 'fat, left side']

    Args:
      words: the comma-separated parts of a list of labels.
      known: the labels; words that are labels themselves stay as they are.
    """
    parts = {tuple(part.strip() for part in name.split(",")): name for name in known}
    joined: list[str] = []
    position = 0
    while position < len(words):
        ends = range(len(words), position + 1, -1)  # the longest label first
        if words[position] in known:
            ends = range(0)
        for end in ends:
            if name := parts.get(tuple(words[position:end])):
                break
        else:
            name, end = words[position], position + 1
        joined.append(name)
        position = end
    return joined
