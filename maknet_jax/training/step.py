"""The training step and the prediction step: pure functions, which `runs.build` jits."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.training import checked
from maknet_jax.training.augment import Augment, ToInput
from maknet_jax.training.losses import LossFn, Metrics
from maknet_jax.training.state import TrainState, Variables

Batch: TypeAlias = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    to_input: ToInput,
    augment: Augment | None = None,
    ema_decay: float = 0.0,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch, key) -> (state, metrics)`.

    Args:
      model: `model.apply(variables, images, train)` returns `Outputs`; a network that `takes_box`
        also takes the boxes.
      loss_fn: loss_fn(outputs, batch) -> (scalar, metrics); `batch["key"]` is a random key.
      optimizer: an optax transformation.
      to_input: batch["image"] (int16 HU `[B, S, S, 3]`) -> float32 images in [0, 1].
      augment: augment(batch["image"], keys `[B]`) -> images, replaces `to_input`; or None.
      ema_decay: decay of the moving average of weights and statistics, if the state has one.
      skip_nonfinite: a step whose loss or gradient norm is not finite changes nothing but the step
        number; the metric `skipped` is then True.

    Returns:
      The step. `key` is the run's key, into which the step number is folded. Augmentation also
      folds in the record's number `batch["index"]`; dropout depends on the row in the global batch.
      Neither depends on the mesh or the workers. The metric `request` is the largest value of
      `batch["request"]`, if there is one, see `runs.steps`.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        if augment is None:
            images = to_input(batch["image"])
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            images = augment(batch["image"], keys)

        def loss(params: Variables) -> tuple[jax.Array, tuple[Metrics, Variables]]:
            outputs, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
                **box_kwargs(model, batch.get("box")),
            )
            value, metrics = loss_fn(outputs, batch | {"key": jax.random.fold_in(dropout_key, 1)})
            return value, (metrics, updated.get("batch_stats", {}))

        (value, (metrics, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        metrics = metrics | {"gradient_norm": norm}
        if "request" in batch:
            metrics["request"] = batch["request"].max()
        average = jax.tree.map(
            lambda old, new: ema_decay * old + (1 - ema_decay) * new,
            state.ema,
            {"params": params, "batch_stats": stats} if state.ema else (),
        )
        after = TrainState(state.step + 1, params, stats, opt_state, average)
        if skip_nonfinite:
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            metrics["skipped"] = ~finite
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
            after = kept._replace(step=state.step + 1)
        return after, metrics

    return train_step


def make_predict_step(
    model: nn.Module, *, to_input: ToInput
) -> Callable[[Variables, jax.Array, jax.Array | None], jax.Array]:
    """Builds `predict_step(variables, images, box=None) -> logits`, float32 `[B, K]`.

    `images` are int16 HU `[B, S, S, 3]`; `box` is `[B, 4]`, used only if the network `takes_box`.
    """

    def predict_step(
        variables: Variables, images: jax.Array, box: jax.Array | None = None
    ) -> jax.Array:
        boxes = box_kwargs(model, box)
        outputs = checked.apply(model, variables, to_input(images), **boxes)
        return outputs.logits.astype(jnp.float32)

    return predict_step


def make_features_step(
    model: nn.Module, *, to_input: ToInput
) -> Callable[[Variables, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]:
    """Builds `features_step(variables, images, box=None) -> (logits [B, K], features [B, F])`.

    Both are float32 and come from one forward pass; for the arguments see `make_predict_step`.
    """

    def features_step(
        variables: Variables, images: jax.Array, box: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        boxes = box_kwargs(model, box)
        outputs = checked.apply(model, variables, to_input(images), **boxes)
        return outputs.logits.astype(jnp.float32), outputs.features.astype(jnp.float32)

    return features_step


def box_kwargs(model: nn.Module, box: Any) -> dict[str, Any]:
    """Additional keyword arguments of a network: LesaNet takes the lesions' boxes.

    Args:
      model: the network.
      box: `[B, 4]` in pixels of the image, or None.

    Raises:
      InputError: the network takes boxes and there are none.
    """
    if not model.takes_box:
        return {}
    if box is None:
        raise InputError(
            "the network needs a lesion's box and these images have none: use data of `maknet "
            "prepare deeplesion --lesions`"
        )
    return {"box": box}
