"""The networks by name."""

from flax.core import freeze

from maknet_jax.errors import InputError
from maknet_jax.models.layers import Outputs
from maknet_jax.models.lesanet import LesaNet
from maknet_jax.models.linear import Linear
from maknet_jax.models.maknet import MAKNet
from maknet_jax.models.resnet import ResNet18
from maknet_jax.models.vgg import VGG16

__all__ = ["MODELS", "LesaNet", "Linear", "MAKNet", "Outputs", "ResNet18", "VGG16", "build"]

MODELS = {
    "maknet": MAKNet,
    "vgg16": VGG16,
    "resnet18": ResNet18,
    "lesanet": LesaNet,
    "linear": Linear,
}


def build(name, num_classes, **options):
    """The network `name` for `num_classes` labels; `options` are the module's attributes.

    Raises:
      InputError: there is no such network or attribute.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown: choose one of {', '.join(MODELS)}")
    rate = options.get("dropout_rate", 0.0)
    if not 0 <= rate < 1:
        raise InputError(f"model {name}: dropout_rate {rate} should be 0 or above and below 1")
    options = {key: _hashable(value) for key, value in options.items()}
    try:
        return MODELS[name](num_classes=num_classes, **options)
    except TypeError as error:
        raise InputError(f"model {name}: {error}") from None


def _hashable(value):
    """A network can be hashed when its attributes can, and what is made of it be kept."""
    if isinstance(value, dict):
        return freeze(value)
    return tuple(value) if isinstance(value, list) else value
