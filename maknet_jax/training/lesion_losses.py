"""LesaNet's losses: weighted cross entropy on both heads, hard examples, and triplets.

Yan et al. 2019, arXiv:1904.04661, sections 3.3 to 3.5; constants and sampling rules are those of
its published code. Everything is drawn on the device, from `batch["key"]`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from maknet_jax.errors import InputError
from maknet_jax.training import losses

# The published code clamps probabilities to 1e-7 .. 1 - 1e-7; beyond, the gradient is 0.
_LARGEST_LOGIT = math.log((1 - 1e-7) / 1e-7)


def lesion_loss_fn(
    *,
    pos_weight: ArrayLike,
    neg_weight: ArrayLike,
    exclusive: ArrayLike,
    head_weights: tuple[float, float] = (1.0, 1.0),
    rhem_weight: float = 1.0,
    rhem_power: float = 2.0,
    rhem_draws: int = 10_000,
    triplet_weight: float = 5.0,
    triplet_margin: float = 0.1,
    triplets: int = 5_000,
) -> losses.LossFn:
    """Builds loss_fn(outputs, batch) -> (scalar, metrics) for LesaNet.

    Args:
      pos_weight: `[K]`, see `losses.class_weights`.
      neg_weight: `[K]`.
      exclusive: bool `[K, K]`, labels that exclude each other (`Vocabulary.exclusive`).
      head_weights: of the cross entropy before and after score propagation.
      rhem_weight: of `hard_examples`.
      rhem_power: see `hard_examples`.
      rhem_draws: see `hard_examples`.
      triplet_weight: of `triplet_loss`.
      triplet_margin: see `triplet_loss`.
      triplets: see `triplet_loss`.

    Returns:
      A pure function. `outputs` has logits and scores_before_spl `[B, K]`, and the embedding as
      features; `batch` has labels and label_mask `[B, K]`, weight `[B]` and a key. metrics holds
      the scalars loss, loss_before_spl, loss_after_spl, loss_rhem and loss_triplet.

    Raises:
      InputError: a number of draws is below 1.
    """
    if rhem_draws < 1 or triplets < 1:
        raise InputError(
            f"loss rhem_draws {rhem_draws} and triplets {triplets} should be 1 or above: to turn "
            "one off, set its weight to 0"
        )
    excludes = jnp.asarray(exclusive, jnp.float32)

    def cross_entropy(scores: jax.Array, batch: losses.Batch) -> jax.Array:
        values = losses.weighted_focal_loss(
            _clamp(scores), batch["labels"], pos_weight=pos_weight, neg_weight=neg_weight, gamma=0.0
        )
        return losses.masked_mean(values, batch["label_mask"], batch["weight"])

    def loss_fn(outputs: losses.Heads, batch: losses.Batch) -> tuple[jax.Array, losses.Metrics]:
        rhem_key, triplet_key = jax.random.split(batch["key"])
        labels, weight = batch["labels"] * batch["label_mask"], batch["weight"]
        before, after = outputs.scores_before_spl, outputs.logits
        assert before is not None  # LesaNet has both heads
        # Reports are incomplete: a label is certainly absent only if a positive label excludes it.
        sure = (labels > 0) | (labels @ excludes > 0)
        sure = sure * batch["label_mask"] * weight[:, None]
        parts = {
            "loss_before_spl": (head_weights[0], cross_entropy(before, batch)),
            "loss_after_spl": (head_weights[1], cross_entropy(after, batch)),
            "loss_rhem": (
                rhem_weight,
                hard_examples(rhem_key, before, labels, sure, power=rhem_power, draws=rhem_draws),
            ),
            "loss_triplet": (
                triplet_weight,
                triplet_loss(
                    triplet_key,
                    outputs.features,
                    labels,
                    weight,
                    margin=triplet_margin,
                    count=triplets,
                ),
            ),
        }
        loss = jnp.asarray(sum(share * value for share, value in parts.values()))
        return loss, {"loss": loss} | {name: value for name, (_, value) in parts.items()}

    return loss_fn


def _clamp(logits: jax.Array) -> jax.Array:
    return jnp.clip(logits.astype(jnp.float32), -_LARGEST_LOGIT, _LARGEST_LOGIT)


def hard_examples(
    key: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    sure: jax.Array,
    *,
    power: float = 2.0,
    draws: int = 10_000,
) -> jax.Array:
    """Random hard example mining (RHEM): mean cross entropy of sampled elements (section 3.4).

    An element is drawn, with replacement, in proportion to (|p - y| sure)^power.

    Args:
      key: of the draws.
      logits: `[B, K]`.
      labels: `[B, K]`.
      sure: `[B, K]`, 0 for elements that are never drawn.
      power: see above.
      draws: number of elements drawn.

    Returns:
      A scalar, 0 if no element can be drawn.
    """
    logits = _clamp(logits)
    error = jnp.abs(jax.nn.sigmoid(logits) - labels) * sure
    chance = jax.lax.stop_gradient(error**power).ravel()
    drawn = jax.random.choice(
        key, chance.size, (draws,), p=chance / jnp.maximum(chance.sum(), 1e-30)
    )
    # Counts instead of a gather, whose gradient would be a scatter.
    times = jnp.zeros(chance.size).at[drawn].add(jnp.where(chance.sum() > 0, 1.0, 0.0))
    values = losses.weighted_focal_loss(logits, labels, pos_weight=1.0, neg_weight=1.0, gamma=0.0)
    return jnp.sum(jnp.where(times > 0, times * values.ravel(), 0.0)) / draws


def similarity(labels: jax.Array) -> jax.Array:
    """Similarity of the examples' label sets: number of common labels times Jaccard index.

    Args:
      labels: `[B, K]`, 0 or 1; unknown labels count as absent.

    Returns:
      `[B, B]`; 0 for two empty sets.
    """
    common = labels @ labels.T
    size = labels.sum(axis=1)
    return common**2 / jnp.maximum(size[:, None] + size - common, 1.0)


def choose_triplets(
    key: jax.Array, labels: jax.Array, weight: jax.Array, *, count: int = 5_000
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws triplets of an anchor, a similar and a less similar example (section 3.5).

    The similar example is drawn from those with a similarity of at least 1; if there are none, it
    is the most similar one. The other is drawn from those less similar than that; if there are
    none, it is the least similar one.

    Args:
      key: of the draws.
      labels: `[B, K]`.
      weight: `[B]`, 0 for padding, which is never chosen.
      count: number of triplets.

    Returns:
      (anchor, similar, dissimilar): int32 `[count]` each, rows of the batch.
    """
    size = len(labels)
    keys = jax.random.split(key, 3)
    real = weight > 0
    alike = similarity(labels)
    anchor = jnp.argmax(jnp.where(real, jax.random.uniform(keys[0], (count, size)), -1.0), axis=1)
    rows = alike[anchor]
    other = real & (jnp.arange(size) != anchor[:, None])

    def draw(key: jax.Array, candidates: jax.Array, fallback: jax.Array) -> jax.Array:
        scores = jnp.where(candidates, jax.random.uniform(key, candidates.shape), -1.0)
        return jnp.where(candidates.any(axis=1), jnp.argmax(scores, axis=1), fallback)

    most = jnp.argmax(jnp.where(other, rows, -1.0), axis=1)
    similar = draw(keys[1], other & (rows >= 1), most)
    least = jnp.argmin(jnp.where(other, rows, jnp.inf), axis=1)
    limit = jnp.take_along_axis(rows, similar[:, None], axis=1)
    dissimilar = draw(keys[2], other & (rows < limit), least)
    return anchor, similar, dissimilar


def triplet_loss(
    key: jax.Array,
    embedding: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    *,
    margin: float = 0.1,
    count: int = 5_000,
) -> jax.Array:
    """Mean of max(0, |anchor - similar| - |anchor - dissimilar| + margin) over drawn triplets.

    Args:
      key: of the draws.
      embedding: `[B, F]`.
      labels: `[B, K]`.
      weight: `[B]`, 0 for padding.
      margin: by which the distances should differ.
      count: number of triplets.

    Returns:
      A scalar, 0 if the batch has fewer than three examples.
    """
    triplets = choose_triplets(key, labels, weight, count=count)
    embedding = embedding.astype(jnp.float32)
    # 1e-6 as in torch's pairwise distance: the gradient stays finite at distance 0.
    apart = jnp.linalg.norm(embedding[:, None] - embedding + 1e-6, axis=-1)
    # Sums over one-hot rows instead of a gather, whose gradient would be a scatter.
    one_hot = [jax.nn.one_hot(rows, len(labels)) for rows in triplets]
    rows = jnp.matmul(one_hot[0], apart, precision=jax.lax.Precision.HIGHEST)
    values = jnp.maximum(jnp.sum(rows * (one_hot[1] - one_hot[2]), axis=1) + margin, 0.0)
    return jnp.where((weight > 0).sum() > 2, values.mean(), 0.0)
