"""The ranges of the numbers in a training config, by the name of the field."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from maknet_jax.errors import InputError

_POSITIVE = (lambda x: x > 0, "above 0")
_NOT_NEGATIVE = (lambda x: x >= 0, "0 or above")
_SHARE = (lambda x: 0 <= x <= 1, "in 0..1")
_BELOW_ONE = (lambda x: 0 <= x < 1, "0 or above and below 1")
_COUNT = (lambda x: x >= 1, "1 or above")
_SEED = (lambda x: 0 <= x < 2**62, "0 or above and below 2**62")
_INTERVAL = (lambda x: 0 < x < 1e9, "above 0 and below 1e9")
_RULES = {
    "seed": _SEED,
    **dict.fromkeys(("epochs", "evaluate_every", "checkpoint_every", "log_every"), _INTERVAL),
    **dict.fromkeys(("learning_rate", "eps", "clip", "drop"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "bias_rate", "trunk_rate", "gamma"), _NOT_NEGATIVE),
    **dict.fromkeys(("head_weights", "rhem_weight", "rhem_power"), _NOT_NEGATIVE),
    **dict.fromkeys(("triplet_weight", "triplet_margin", "threads", "balance"), _NOT_NEGATIVE),
    **dict.fromkeys(("checkpoint_minutes", "skip_nonfinite"), _NOT_NEGATIVE),
    **dict.fromkeys(("b1", "b2", "momentum", "ema_decay", "dropout_rate"), _BELOW_ONE),
    **dict.fromkeys(("rotation", "translation", "crop", "contrast", "grayscale"), _SHARE),
    **dict.fromkeys(("alpha", "decay_from"), _SHARE),
    **dict.fromkeys(("stem", "blocks", "growth_rates", "widths", "kernel_size"), _COUNT),
    "accumulate": _COUNT,
    **dict.fromkeys(("units", "embedding", "edge", "rhem_draws", "triplets"), _COUNT),
}


def check(values: Mapping[str, Any]) -> None:
    """Checks that every number of a config is finite and in the range of its field.

    Args:
      values: the config as nested dicts.

    Raises:
      InputError: names the first field that is not, its value and the range.
    """
    for name, value in _numbers(values):
        field = name.rpartition(".")[2].removesuffix("_probability")
        fits, rule = _RULES.get(field, (math.isfinite, "a finite number"))
        if not (math.isfinite(value) and fits(value)):
            raise InputError(f"config {name} {value} should be {rule}")


def _numbers(node: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of all fields; the numbers of a tuple share its name."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _numbers(child, f"{name}.{key}".strip("."))
    elif isinstance(node, (tuple, list)):
        for child in node:
            yield from _numbers(child, name)
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield name, node
