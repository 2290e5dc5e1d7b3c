"""Builds everything that a config describes: model, optimiser, loss and the jitted steps.

`assemble` is the one place where these are put together. Training, scoring, the benchmarks and the
tests call it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.training import (
    augment,
    lesion_losses,
    losses,
    ranger,
    sgd,
    sharding,
    state,
    step,
)

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "ranger": ranger.ranger,
    "sgd": sgd.sgd,
}
LOSSES: dict[str, Callable[..., losses.LossFn]] = {
    "weighted_focal": losses.focal_loss_fn,
    "lesion": lesion_losses.lesion_loss_fn,
}


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Properties of the training data that the loss and the learning rate depend on.

    Attributes:
      steps: updates of the whole run.
      label_counts: `[K]`, examples of each label.
      examples: examples in total.
      exclusive: bool `[K, K]`, `Vocabulary.exclusive`; only LesaNet's loss needs it.
    """

    steps: int
    label_counts: np.ndarray
    examples: int
    exclusive: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A network with its steps, jitted over a mesh.

    Attributes:
      model: the Flax module.
      optimizer: the optax transformation.
      size: the edge S of the images in pixels.
      ema: whether the state holds a moving average of the weights.
      mesh: the devices.
      to_input: int16 HU `[..., S, S, 3]` -> float32 images in [0, 1], on the device.
      predict_step: predict_step(variables, images, box) -> logits `[B, K]`; box is None where the
        images have none.
      train_step: train_step(state, batch, key) -> (state, metrics), which donates the state; None
        in an assembly for scoring.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    size: int
    ema: bool
    mesh: Mesh
    to_input: Callable[[jax.Array], jax.Array]
    predict_step: jax.stages.Wrapped
    train_step: jax.stages.Wrapped | None

    @functools.cached_property
    def shapes(self) -> state.TrainState:
        """A state with shapes and types for arrays. Scoring does not need it: it is traced."""
        return state.shapes(self.model, self.optimizer, size=self.size, ema=self.ema)

    def check(self, variables: state.Variables, batch_size: int = 16) -> None:
        """Checks that the variables are the network's, by tracing its prediction.

        Args:
          variables: params and batch_stats.
          batch_size: of a prediction that can use the trace, rounded up to the devices.

        Raises:
          checked.OtherWeightsError: they are those of another network.
        """
        # The kernels of another network may not fit each other: then the trace says what differs.
        with contextlib.suppress(KeyError, ValueError, AttributeError):
            variables = self.prepare(variables)
        rows, whole = sharding.split(self.mesh), sharding.replicated(self.mesh)
        count = sharding.round_up_to_devices(batch_size, self.mesh.size)
        image = jax.ShapeDtypeStruct((count, self.size, self.size, 3), jnp.int16, sharding=rows)
        box = jax.ShapeDtypeStruct((count, 4), jnp.float32, sharding=rows)
        arrays = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), variables
        )
        self.predict_step.trace(arrays, image, box if self.model.takes_box else None)

    def prepare(self, variables: state.Variables) -> state.Variables:
        """Variables for the prediction steps, see `Network.for_prediction`."""
        return {**variables, "params": self.model.for_prediction(variables["params"])}

    @functools.cached_property
    def features_step(self) -> jax.stages.Wrapped:
        """features_step(variables, images, box) -> (logits `[B, K]`, features `[B, F]`)."""
        whole, rows = sharding.replicated(self.mesh), sharding.split(self.mesh)
        return jax.jit(
            step.make_features_step(self.model, to_input=self.to_input),
            in_shardings=(whole, rows, rows),
            out_shardings=rows,
            compiler_options=compiler_options(self.mesh),
        )

    def create(self, seed: int, place: state.Place | None = None) -> state.TrainState:
        """The state before the first step, see `state.create`."""
        return state.create(
            self.model, self.optimizer, size=self.size, seed=seed, place=place, ema=self.ema
        )

    def predict(
        self, variables: state.Variables, batch: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Scores one batch, as `evaluation.Evaluator` calls it.

        Args:
          variables: params and batch_stats, replicated over the mesh.
          batch: this process's rows.

        Returns:
          The batch without its images and with its `logits` `[B, K]`: the rows of all processes.
        """
        on_mesh = sharding.put_batch(self.mesh, batch)
        images, box = on_mesh.pop("image"), on_mesh.pop("box", None)  # not copied back to the host
        return sharding.gather(on_mesh | {"logits": self.predict_step(variables, images, box)})

    def predict_features(
        self, variables: state.Variables, batch: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Like `predict`, with `features` `[B, F]` in addition."""
        on_mesh = sharding.put_batch(self.mesh, batch)
        images, box = on_mesh.pop("image"), on_mesh.pop("box", None)
        logits, features = self.features_step(variables, images, box)
        return sharding.gather(on_mesh | {"logits": logits, "features": features})


def assemble(
    config: ConfigDict,
    labels: int,
    mesh: Mesh,
    *,
    training: TrainingSet | None = None,
    rotation: str = "auto",
) -> Assembly:
    """Builds the network of a config and its jitted steps.

    Args:
      config: a locked config.
      labels: the number of labels K.
      mesh: the devices, see `sharding.data_mesh`; they need not exist on this machine.
      training: the training data; None builds an assembly for scoring, without loss and training
        step.
      rotation: form of the augmentation, see `augment.make_augment`.

    Raises:
      InputError: a value of the config is out of range or contradicts another.
    """
    model = build_model(config, labels)
    optimizer = build_optimizer(config, training.steps if training else 1)
    to_input = build_to_input(config)
    options = compiler_options(mesh)
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)
    train_step = None
    if training:
        loss = build_loss(config, training.label_counts, training.examples, training.exclusive)
        train_step = jax.jit(
            step.make_train_step(
                model,
                loss,
                optimizer,
                to_input=to_input,
                augment=build_augment(config, mesh.size, form=rotation),
                ema_decay=config.ema_decay,
                skip_nonfinite=config.skip_nonfinite > 0,
                accumulate=config.accumulate,
                devices=mesh.size,
            ),
            in_shardings=(whole, rows, whole),
            out_shardings=(whole, whole),
            donate_argnums=0,
            compiler_options=options,
        )
    predict_step = jax.jit(
        step.make_predict_step(model, to_input=to_input),
        in_shardings=(whole, rows, rows),
        out_shardings=rows,
        compiler_options=options,
    )
    size, ema = config.data.size, config.ema_decay > 0
    return Assembly(model, optimizer, size, ema, mesh, to_input, predict_step, train_step)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Options of XLA for the steps on the devices of a mesh.

    On GPUs for which XLA computes element-wise bfloat16 operations in float32 (A100), it would drop
    a conversion to bfloat16 that is followed by one to float32, and store float32: 92 instead of 75
    MB per image in MAKNet's training step.
    """
    on_gpu = mesh.devices.flat[0].platform in ("cuda", "gpu")
    return {"xla_allow_excess_precision": False} if on_gpu else {}


def build_model(config: ConfigDict, labels: int) -> nn.Module:
    """The network of a config; activations are bfloat16 on accelerators with precision auto.

    An optimiser whose `trunk_rate` is 0 freezes the trunk, including its running statistics.
    """
    kinds: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    kinds["auto"] = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if config.precision not in kinds:
        raise InputError(
            f"config precision {config.precision!r} is unknown: choose one of {', '.join(kinds)}"
        )
    options = config.model.options.to_dict()
    if "trunk_rate" in config.optimizer and config.optimizer.trunk_rate == 0:
        options["frozen"] = True
    if config.remat:
        options["remat"] = True
    model = models.build(config.model.name, labels, dtype=kinds[config.precision], **options)
    moving = [f"{kind}_probability" for kind in ("rotation", "translation", "crop")]
    positive = [f"augment.{name}" for name in moving if config.augment[name] > 0]
    if positive and model.takes_box:
        raise InputError(
            f"model {config.model.name} takes boxes, which the augmentation does not transform: "
            f"set {' and '.join(positive)} to 0"
        )
    return model


def build_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimiser of a config for a run of `steps` updates.

    The learning rate is constant until the share `decay_from` of all steps (1: to the end). Then it
    decays to 0 along a half cosine; with SGD it is multiplied by `drop` instead.
    """
    options = config.optimizer.to_dict()
    rate, decay_from = options.pop("learning_rate"), options.pop("decay_from")
    if not 0 <= decay_from <= 1:
        raise InputError(f"config optimizer.decay_from {decay_from} should be in 0..1")
    flat = round(decay_from * steps)
    if "drop" in options:
        rate = optax.piecewise_constant_schedule(rate, {flat: options.pop("drop")})
    elif flat < steps:
        decay = optax.cosine_decay_schedule(rate, steps - flat)
        rate = optax.join_schedules([optax.constant_schedule(rate), decay], [flat])
    else:
        rate = optax.constant_schedule(rate)  # gives the same state as a schedule that decays
    return _build("optimizer", OPTIMIZERS, learning_rate=rate, **options)


def build_loss(
    config: ConfigDict,
    label_counts: np.ndarray | Sequence[float],
    examples: int,
    exclusive: np.ndarray | None = None,
) -> losses.LossFn:
    """The loss of a config; the class weights are computed from the counts of a `TrainingSet`."""
    options = config.loss.to_dict()
    if config.accumulate > 1 and config.loss.name == "lesion":
        raise InputError(
            f"config accumulate {config.accumulate} is not supported for loss lesion, which draws "
            "its triplets and hard examples from the whole batch: set it to 1"
        )
    pos_weight, neg_weight = losses.class_weights(
        np.asarray(label_counts), examples, clamp=options.pop("clamp")
    )
    if config.loss.name == "lesion":
        options["exclusive"] = exclusive
    return _build("loss", LOSSES, pos_weight=pos_weight, neg_weight=neg_weight, **options)


def _build(part: str, known: Mapping[str, Callable[..., Any]], *, name: str, **options: Any) -> Any:
    if name not in known:
        raise InputError(f"{part} {name!r} is unknown: choose one of {', '.join(known)}")
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{part} {name}: {error}") from None


def build_to_input(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """int16 HU `[..., S, S, 3]` -> float32 network input in [0, 1], on the device."""
    return functools.partial(augment.to_unit, window=tuple(config.data.window))


def build_augment(
    config: ConfigDict, devices: int, *, form: str = "auto"
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The augmentation of a config, which replaces `to_input`; None where the config has none.

    Args:
      config: a config.
      devices: number of devices over which the images are split.
      form: of the rotation, see `augment.make_augment`.
    """
    options = config.augment.to_dict() | {"to_input": build_to_input(config)}
    return augment.make_augment(**options, devices=devices, form=form)
