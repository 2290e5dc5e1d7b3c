"""The one training step and the one prediction step, pure functions to be jitted by the verb."""

import jax
import jax.numpy as jnp
import optax

from maknet_jax.errors import InputError
from maknet_jax.training.state import TrainState


def make_train_step(model, loss_fn, optimizer, *, to_input, augment=None, ema_decay=0.0):
    """Builds `train_step(state, batch, key) -> (state, metrics)`.

    Args:
      model: `model.apply(variables, images, train)` returns `Outputs`; one that `takes_box` gets
        the boxes too.
      loss_fn: loss_fn(outputs, batch) -> (scalar, metrics); the batch holds a `key` to draw with.
      optimizer: an optax transformation.
      to_input: batch["image"] (int16 HU) -> float32 images in [0, 1].
      augment: augment(batch["image"], keys [B]) -> images, in the place of `to_input`, or None.
      ema_decay: of the moving average of weights and statistics, where the state keeps one.

    Returns:
      The step. `key` is the run's key, folded with the step. Augmentation folds the record's number
      `batch["index"]` in, dropout draws by the place in the global batch: neither depends on the
      mesh or the workers.
    """

    def train_step(state, batch, key):
        key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        if augment is None:
            images = to_input(batch["image"])
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            images = augment(batch["image"], keys)

        def loss(params):
            outputs, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
                **box_of(model, batch.get("box")),
            )
            value, metrics = loss_fn(outputs, batch | {"key": jax.random.fold_in(dropout_key, 1)})
            return value, (metrics, updated.get("batch_stats", {}))

        (_, (metrics, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"gradient_norm": optax.tree.norm(gradients)}
        average = jax.tree.map(
            lambda old, new: ema_decay * old + (1 - ema_decay) * new,
            state.ema,
            {"params": params, "batch_stats": stats} if state.ema else (),
        )
        return TrainState(state.step + 1, params, stats, opt_state, average), metrics

    return train_step


def make_predict_step(model, *, to_input):
    """Builds `predict_step(variables, images, box=None) -> logits`, float32 `[B, K]` from int16 HU.

    `box` is `[B, 4]`, needed and used only where the network `takes_box`.
    """

    def predict_step(variables, images, box=None):
        boxes = box_of(model, box)
        return model.apply(variables, to_input(images), train=False, **boxes).logits.astype(
            jnp.float32
        )

    return predict_step


def box_of(model, box):
    """The keyword arguments that a network takes beside images: LesaNet the lesions' boxes.

    Raises:
      InputError: it needs boxes and there are none.
    """
    if not getattr(model, "takes_box", False):
        return {}
    if box is None:
        raise InputError(
            "the network looks at lesions and these images have no box: take data of `maknet "
            "prepare deeplesion --lesions`"
        )
    return {"box": box}
