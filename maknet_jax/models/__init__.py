"""The networks by name."""

import warnings
from typing import Any

from flax.core import freeze

from maknet_jax.errors import InputError
from maknet_jax.models.lesanet import LesaNet
from maknet_jax.models.linear import Linear
from maknet_jax.models.maknet import MAKNet
from maknet_jax.models.network import Network, Outputs
from maknet_jax.models.resnet import ResNet18
from maknet_jax.models.vgg import VGG16

__all__ = [
    "MODELS",
    "LesaNet",
    "Linear",
    "MAKNet",
    "Network",
    "Outputs",
    "ResNet18",
    "VGG16",
    "build",
]

MODELS: dict[str, type[Network]] = {
    "maknet": MAKNet,
    "vgg16": VGG16,
    "resnet18": ResNet18,
    "lesanet": LesaNet,
    "linear": Linear,
}
# Removed forms of MAKConv -> the form with the same values and parameters.
REMOVED_FORMS = {"wide": "split", "wide_fused": "fused"}


def build(name: str, num_classes: int, **options: Any) -> Network:
    """Builds a network.

    Args:
      name: a key of `MODELS`.
      num_classes: labels K.
      **options: attributes of the module. Lists become tuples, so that networks with equal options
        are equal and have equal hashes.

    Raises:
      InputError: an unknown network or attribute, or a dropout_rate outside [0, 1).
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown: choose one of {', '.join(MODELS)}")
    rate = options.get("dropout_rate", 0.0)
    if not 0 <= rate < 1:
        raise InputError(f"model {name}: dropout_rate {rate} should be in [0, 1)")
    options = {key: _normalize(key, value) for key, value in options.items()}
    try:
        return MODELS[name](num_classes=num_classes, **options)
    except TypeError as error:
        raise InputError(f"model {name}: {error}") from None


def _normalize(key: str, value: Any) -> Any:
    """An option in hashable form; a removed form of MAKConv is replaced, with a warning."""
    if isinstance(value, dict):
        return freeze({inner: _normalize(inner, child) for inner, child in value.items()})
    if key == "form" and value in REMOVED_FORMS:
        form = REMOVED_FORMS[value]
        warnings.warn(f"form {value!r} was removed: using {form!r}, equal to 1e-5", stacklevel=3)
        return form
    return tuple(value) if isinstance(value, list) else value
