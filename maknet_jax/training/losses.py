"""The weighted focal loss of MAKNet, element by element and over a batch."""

import jax
import jax.numpy as jnp
import numpy as np

from maknet_jax.errors import InputError


def class_weights(positives, total, *, clamp=300.0):
    """Weights that let the positives and the negatives of every label count the same (LesaNet).

    The positive weight is min(clamp, N/2n), the negative weight N/2(N-n), which LesaNet does not
    clamp. Where a class is absent the formula is infinite and the weight is `clamp` instead: with
    hard labels it is never used, soft labels may touch it.

    Args:
      positives: [K] n, training examples with the label.
      total: N, training examples; a number, or [K] where labels are known for some examples only.
      clamp: largest positive weight.

    Returns:
      (pos_weight [K], neg_weight [K]), numpy float32.

    Raises:
      InputError: a count that cannot be (n above N or below 0, N below 1).
    """
    if not clamp > 0:
        raise InputError(f"clamp {clamp} should be above 0: it is the largest weight")
    positives = np.asarray(positives, np.float64)
    total = np.broadcast_to(np.asarray(total, np.float64), positives.shape)
    wrong = np.flatnonzero((positives < 0) | (positives > total) | (total < 1))
    if wrong.size:
        k = wrong[0]
        raise InputError(
            f"label {k}: {positives[k]:g} positives of {total[k]:g} examples; counts need "
            "0 <= positives <= examples and at least one example: check the training records"
        )
    negatives = total - positives
    pos_weight = np.minimum(clamp, total / (2.0 * np.where(positives > 0, positives, np.nan)))
    neg_weight = total / (2.0 * np.where(negatives > 0, negatives, np.nan))
    pos_weight = np.where(positives > 0, pos_weight, clamp)
    neg_weight = np.where(negatives > 0, neg_weight, clamp)
    return pos_weight.astype(np.float32), neg_weight.astype(np.float32)


def weighted_focal_loss(logits, labels, *, pos_weight, neg_weight, gamma=2.0):
    """Focal loss with two weights per label (Lin et al. 2017, arXiv 1708.02002, section 3.2).

    -(pos_weight y (1-p)^gamma log p + neg_weight (1-y) p^gamma log(1-p)) with p = sigmoid(logits),
    from logits throughout, so that value and gradient stay finite at any finite logit. At gamma 0
    and unit weights it is binary cross-entropy.

    Args:
      logits: [B, K], any float type; computed in float32 (bfloat16 would be 2.5 % off).
      labels: [B, K] in [0, 1]; soft labels mix the two terms.
      pos_weight: [K] or a number.
      neg_weight: [K] or a number.
      gamma: 0 or more; how much easy elements are played down.

    Returns:
      [B, K] float32.
    """
    logits = jnp.asarray(logits, jnp.float32)
    labels = jnp.asarray(labels, jnp.float32)
    log_p = jax.nn.log_sigmoid(logits)
    log_not_p = jax.nn.log_sigmoid(-logits)
    # Powers as exp(gamma log): a power of p itself has a nan gradient where p rounds to 0.
    positive = pos_weight * labels * jnp.exp(gamma * log_not_p) * log_p
    negative = neg_weight * (1.0 - labels) * jnp.exp(gamma * log_p) * log_not_p
    return -(positive + negative)


def masked_mean(values, label_mask, weight):
    """Mean of `values` [B, K] over the known elements of real examples, a scalar.

    Args:
      values: [B, K].
      label_mask: [B, K], 0 where the label is unknown.
      weight: [B], 0 for padding rows.

    Returns:
      sum(values mask weight) / max(sum(mask weight), 1): 0 for a batch of padding.
    """
    element_weight = label_mask.astype(jnp.float32) * weight.astype(jnp.float32)[:, None]
    # An element that does not count must not count as 0 * inf either.
    counted = jnp.where(element_weight > 0, values, 0.0) * element_weight
    return jnp.sum(counted) / jnp.maximum(jnp.sum(element_weight), 1.0)


def focal_loss_fn(*, pos_weight, neg_weight, gamma=2.0, head_weights=(1.0, 1.0)):
    """Returns loss_fn(outputs, batch) -> (scalar, metrics), the weighted focal loss on both heads.

    Args:
      pos_weight: [K], see `class_weights`.
      neg_weight: [K].
      gamma: see `weighted_focal_loss`.
      head_weights: (before the score propagation layer, after it), as LesaNet's two losses.

    Returns:
      A pure function. `outputs` has `logits` (after the layer) and `scores_before_spl`, both
      [B, K]; the second is None for a network without the layer, whose loss is then the one head's,
      times head_weights[1]. `batch` has labels [B, K], label_mask [B, K] and weight [B]. metrics
      holds the scalars loss, loss_after_spl and, where there are two heads, loss_before_spl.

    Raises:
      InputError: gamma is negative.
    """
    if gamma < 0:
        raise InputError(f"gamma {gamma} should be 0 or above: below 0 easy examples count most")
    before_weight, after_weight = head_weights

    def head_loss(logits, batch):
        values = weighted_focal_loss(
            logits, batch["labels"], pos_weight=pos_weight, neg_weight=neg_weight, gamma=gamma
        )
        return masked_mean(values, batch["label_mask"], batch["weight"])

    def loss_fn(outputs, batch):
        after = head_loss(outputs.logits, batch)
        loss = after_weight * after
        metrics = {"loss_after_spl": after}
        if outputs.scores_before_spl is not None:
            before = head_loss(outputs.scores_before_spl, batch)
            loss = loss + before_weight * before
            metrics["loss_before_spl"] = before
        return loss, {"loss": loss, **metrics}

    return loss_fn
