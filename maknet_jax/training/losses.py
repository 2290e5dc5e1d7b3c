"""The weighted focal loss of MAKNet, per element and over a batch."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from maknet_jax.errors import InputError


class Heads(Protocol):
    """The outputs of a network that the losses read, see `models.Outputs`."""

    @property
    def logits(self) -> jax.Array:
        """`[B, K]`, after the score propagation layer."""

    @property
    def scores_before_spl(self) -> jax.Array | None:
        """`[B, K]`, or None for a network without that layer."""

    @property
    def features(self) -> jax.Array:
        """`[B, F]`."""


Batch: TypeAlias = Mapping[str, jax.Array]
Metrics: TypeAlias = dict[str, jax.Array]
# loss_fn(outputs, batch) -> (scalar, metrics)
LossFn: TypeAlias = Callable[[Heads, Batch], tuple[jax.Array, Metrics]]


def class_weights(
    positives: npt.ArrayLike, total: npt.ArrayLike, *, clamp: float = 300.0
) -> tuple[np.ndarray, np.ndarray]:
    """Weights that balance the positives and the negatives of every label, as in LesaNet.

    The positive weight is min(clamp, N/2n). The negative weight is N/2(N-n), which LesaNet does not
    clamp. If a label has no positives or no negatives, the formula is infinite and the weight is
    `clamp`, which only soft labels can use.

    Args:
      positives: `[K]`, n: training examples with the label.
      total: N: training examples, a number, or `[K]` if labels are known for some examples only.
      clamp: largest positive weight.

    Returns:
      (pos_weight `[K]`, neg_weight `[K]`), float32.

    Raises:
      InputError: a count is impossible (n above N or below 0, N below 1) or clamp is not positive.
    """
    if not clamp > 0:
        raise InputError(f"loss clamp {clamp}, the largest weight, should be above 0")
    positives = np.asarray(positives, np.float64)
    total = np.broadcast_to(np.asarray(total, np.float64), positives.shape)
    wrong = np.flatnonzero((positives < 0) | (positives > total) | (total < 1))
    if wrong.size:
        k = wrong[0]
        raise InputError(
            f"label {k} has {positives[k]:g} positives of {total[k]:g} examples; expected "
            "0 <= positives <= examples and at least one example: check the training records"
        )
    negatives = total - positives
    pos_weight = np.minimum(clamp, total / (2.0 * np.where(positives > 0, positives, np.nan)))
    neg_weight = total / (2.0 * np.where(negatives > 0, negatives, np.nan))
    pos_weight = np.where(positives > 0, pos_weight, clamp)
    neg_weight = np.where(negatives > 0, neg_weight, clamp)
    return pos_weight.astype(np.float32), neg_weight.astype(np.float32)


def weighted_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    pos_weight: ArrayLike,
    neg_weight: ArrayLike,
    gamma: float = 2.0,
) -> jax.Array:
    """Focal loss with two weights per label (Lin et al. 2017, arXiv 1708.02002, section 3.2).

    -(pos_weight y (1-p)^gamma log p + neg_weight (1-y) p^gamma log(1-p)) with p = sigmoid(logits).
    It is computed from logits throughout, so that value and gradient are finite at any finite
    logit. With gamma 0 and unit weights it is binary cross entropy.

    Args:
      logits: `[B, K]`, any float type; computed in float32 (bfloat16 would be 2.5 % off).
      labels: `[B, K]` in [0, 1]; soft labels mix the two terms.
      pos_weight: `[K]` or a number.
      neg_weight: `[K]` or a number.
      gamma: 0 or more; how strongly easy elements are down-weighted.

    Returns:
      float32 `[B, K]`.
    """
    logits = jnp.asarray(logits, jnp.float32)
    labels = jnp.asarray(labels, jnp.float32)
    log_p = jax.nn.log_sigmoid(logits)
    log_not_p = jax.nn.log_sigmoid(-logits)
    # Powers as exp(gamma log): the gradient of p ** gamma is nan where p rounds to 0.
    positive = labels * pos_weight * jnp.exp(gamma * log_not_p) * log_p
    negative = (1.0 - labels) * neg_weight * jnp.exp(gamma * log_p) * log_not_p
    return -(positive + negative)


def known_elements(label_mask: jax.Array, weight: jax.Array) -> jax.Array:
    """The divisor of `masked_mean`: max(sum(mask weight), 1), a scalar.

    Args:
      label_mask: `[B, K]`, 0 where the label is unknown.
      weight: `[B]`, 0 for padding rows.
    """
    return jnp.maximum(jnp.sum(_element_weight(label_mask, weight)), 1.0)


def _element_weight(label_mask: jax.Array, weight: jax.Array) -> jax.Array:
    return label_mask.astype(jnp.float32) * weight.astype(jnp.float32)[:, None]


def masked_mean(
    values: jax.Array,
    label_mask: jax.Array,
    weight: jax.Array,
    *,
    total: jax.Array | None = None,
) -> jax.Array:
    """Mean over the known elements of the real examples.

    Args:
      values: `[B, K]`.
      label_mask: `[B, K]`, 0 where the label is unknown.
      weight: `[B]`, 0 for padding rows.
      total: the divisor; None takes `known_elements` of these rows. With that of a whole batch, the
        results of its parts add up to its mean.

    Returns:
      A scalar, sum(values mask weight) / total: 0 for a batch of padding.
    """
    element_weight = _element_weight(label_mask, weight)
    # Masked before the product, because 0 * inf is nan.
    counted = jnp.where(element_weight > 0, values, 0.0) * element_weight
    return jnp.sum(counted) / (known_elements(label_mask, weight) if total is None else total)


def focal_loss_fn(
    *,
    pos_weight: ArrayLike,
    neg_weight: ArrayLike,
    gamma: float = 2.0,
    head_weights: tuple[float, float] = (1.0, 1.0),
) -> LossFn:
    """Builds loss_fn(outputs, batch) -> (scalar, metrics), the weighted focal loss on both heads.

    Args:
      pos_weight: `[K]`, see `class_weights`.
      neg_weight: `[K]`.
      gamma: see `weighted_focal_loss`.
      head_weights: of the losses before and after the score propagation layer, as in LesaNet.

    Returns:
      A pure function. `batch` has labels `[B, K]`, label_mask `[B, K]` and weight `[B]`; if it is a
      part of a larger batch, known_elements is the `total` of that, see `masked_mean`. metrics
      holds the scalars loss, loss_after_spl and, if there are two heads, loss_before_spl. A network
      with one head has only the second term, times head_weights[1].

    Raises:
      InputError: gamma is negative.
    """
    if gamma < 0:
        raise InputError(f"loss gamma {gamma} should be 0 or above")
    before_weight, after_weight = head_weights

    def head_loss(logits: jax.Array, batch: Batch) -> jax.Array:
        values = weighted_focal_loss(
            logits, batch["labels"], pos_weight=pos_weight, neg_weight=neg_weight, gamma=gamma
        )
        total = batch.get("known_elements")
        return masked_mean(values, batch["label_mask"], batch["weight"], total=total)

    def loss_fn(outputs: Heads, batch: Batch) -> tuple[jax.Array, Metrics]:
        after = head_loss(outputs.logits, batch)
        loss = after_weight * after
        metrics = {"loss_after_spl": after}
        if outputs.scores_before_spl is not None:
            before = head_loss(outputs.scores_before_spl, batch)
            loss = loss + before_weight * before
            metrics["loss_before_spl"] = before
        return loss, {"loss": loss, **metrics}

    return loss_fn
