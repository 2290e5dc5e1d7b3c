"""The training step and the prediction step: pure functions, which `runs.build` jits."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.training import checked, losses
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
    accumulate: int = 1,
    devices: int = 1,
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
      accumulate: the batch is processed in this many equal parts, one after the other, and their
        gradients are added: the gradient of the whole batch with the activations of one part. Each
        part has its own BatchNorm statistics, and the running ones move by the mean of their
        changes.
      devices: number of devices over which the batch is split in equal contiguous parts.

    Returns:
      The step. `key` is the run's key, into which the step number is folded. Augmentation also
      folds in the record's number `batch["index"]`; dropout depends on the row in the global batch,
      with `accumulate` on the row in its part. Neither depends on the mesh or the workers. The
      metric `request` is the largest value of `batch["request"]`, if there is one, see
      `runs.steps`.
    """

    def gradient(
        params: Variables,
        stats: Variables,
        batch: Batch,
        key: jax.Array,
        dropout_key: jax.Array,
    ) -> tuple[Variables, tuple[jax.Array, Metrics], Variables]:
        """(gradient, (loss, metrics), BatchNorm statistics) of a batch or of one part of it."""
        if augment is None:
            images = to_input(batch["image"])
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            images = augment(batch["image"], keys)

        def loss(params: Variables) -> tuple[jax.Array, tuple[Metrics, Variables]]:
            outputs, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
                **box_kwargs(model, batch.get("box")),
            )
            value, metrics = loss_fn(outputs, batch | {"key": jax.random.fold_in(dropout_key, 1)})
            return value, (metrics, updated.get("batch_stats", {}))

        (value, (metrics, after)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, (value, metrics), after

    def accumulated(
        params: Variables,
        stats: Variables,
        batch: Batch,
        key: jax.Array,
        dropout_key: jax.Array,
    ) -> tuple[Variables, tuple[jax.Array, Metrics], Variables]:
        """`gradient` of a batch, computed in parts."""
        # Each part is divided by the whole batch's sum of weights, so that their sum is its mean.
        total = losses.known_elements(batch["label_mask"], batch["weight"])

        def add(
            sums: tuple[Variables, Variables], part: tuple[jax.Array, Batch]
        ) -> tuple[tuple[Variables, Variables], tuple[jax.Array, Metrics]]:
            number, rows = part
            rows = rows | {"known_elements": total}
            part_key = jax.random.fold_in(dropout_key, number)
            gradients, values, after = gradient(params, stats, rows, key, part_key)
            # Changes instead of values: statistics that do not change keep every bit.
            change = jax.tree.map(jnp.subtract, after, stats)
            return jax.tree.map(jnp.add, sums, (gradients, change)), values

        zeros = jax.tree.map(jnp.zeros_like, (params, stats))
        rows = {name: _parts(values, accumulate, devices) for name, values in batch.items()}
        (gradients, change), values = jax.lax.scan(add, zeros, (jnp.arange(accumulate), rows))
        stats = jax.tree.map(lambda old, sums: old + sums / accumulate, stats, change)
        return gradients, jax.tree.map(lambda parts: parts.sum(axis=0), values), stats

    def update(state: TrainState, gradients: Variables, stats: Variables) -> TrainState:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = jax.tree.map(
            lambda old, new: ema_decay * old + (1 - ema_decay) * new,
            state.ema,
            {"params": params, "batch_stats": stats} if state.ema else (),
        )
        return TrainState(state.step + 1, params, stats, opt_state, average)

    def skip(state: TrainState, gradients: Variables, stats: Variables) -> TrainState:
        del gradients, stats
        return state._replace(step=state.step + 1)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = dict(batch)
        request = batch.pop("request", None)
        compute = gradient if accumulate == 1 else accumulated
        gradients, (value, metrics), stats = compute(
            state.params, state.batch_stats, batch, key, dropout_key
        )
        norm = optax.tree.norm(gradients)
        metrics = metrics | {"gradient_norm": norm}
        if request is not None:
            metrics["request"] = request.max()
        if not skip_nonfinite:
            return update(state, gradients, stats), metrics
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        metrics["skipped"] = ~finite
        # A choice per leaf by `jnp.where` instead would copy the old state at every step on CPU.
        after = jax.lax.cond(finite, update, skip, state, gradients, stats)
        return after, metrics

    return train_step


def _parts(rows: jax.Array, count: int, devices: int) -> jax.Array:
    """Divides the rows of each device: `[B, ...]` -> `[count, B / count, ...]`.

    Parts are contiguous on each device, so that labelled and pseudo-labelled images, which
    alternate, have the same shares in each. No row moves to another device.

    Raises:
      ValueError: `count` does not divide the rows of a device.
    """
    share, remainder = divmod(len(rows), devices * count)
    if remainder:
        raise ValueError(
            f"{len(rows)} rows cannot be split over {devices} devices and {count} parts"
        )
    split = rows.reshape(devices, count, share, *rows.shape[1:])
    return jnp.swapaxes(split, 0, 1).reshape(count, devices * share, *rows.shape[1:])


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
