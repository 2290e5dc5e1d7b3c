"""LesaNet's losses: weighted cross entropy on both heads, hard examples, and triplets.

Yan et al. 2019, arXiv:1904.04661, sections 3.3 to 3.5; constants and rules of choice are those of
its published code. Everything is drawn on the device, from `batch["key"]`.
"""

import jax
import jax.numpy as jnp

from maknet_jax.errors import InputError
from maknet_jax.training import losses


def lesion_loss_fn(
    *,
    pos_weight,
    neg_weight,
    exclusive,
    head_weights=(1.0, 1.0),
    rhem_weight=1.0,
    rhem_power=2.0,
    rhem_draws=10_000,
    triplet_weight=5.0,
    triplet_margin=0.1,
    triplets=5_000,
):
    """Returns loss_fn(outputs, batch) -> (scalar, metrics) for LesaNet.

    Args:
      pos_weight: [K], see `losses.class_weights`.
      neg_weight: [K].
      exclusive: bool [K, K], labels that exclude each other (`Vocabulary.exclusive`).
      head_weights: of the cross entropy before and after the score propagation.
      rhem_weight: of `hard_examples`.
      rhem_power: see there.
      rhem_draws: see there.
      triplet_weight: of `triplet_loss`.
      triplet_margin: see there.
      triplets: see there.

    Returns:
      A pure function. `outputs` has logits and scores_before_spl [B, K] and the embedding as
      features; `batch` has labels, label_mask [B, K], weight [B] and a key. metrics holds loss,
      loss_before_spl, loss_after_spl, loss_rhem and loss_triplet.

    Raises:
      InputError: a number of draws below 1.
    """
    if rhem_draws < 1 or triplets < 1:
        raise InputError(
            f"rhem_draws {rhem_draws} and triplets {triplets} should be 1 or more: set their "
            "weights to 0 to leave them out"
        )
    exclusive = jnp.asarray(exclusive, jnp.float32)

    def cross_entropy(scores, batch):
        weights = {"pos_weight": pos_weight, "neg_weight": neg_weight}
        values = losses.weighted_focal_loss(scores, batch["labels"], gamma=0.0, **weights)
        return losses.masked_mean(values, batch["label_mask"], batch["weight"])

    def loss_fn(outputs, batch):
        rhem_key, triplet_key = jax.random.split(batch["key"])
        labels, weight = batch["labels"], batch["weight"]
        before, after = outputs.scores_before_spl, outputs.logits
        # Absence is sure only of what a label that is there excludes: reports leave much out.
        sure = (labels > 0) | (labels @ exclusive > 0)
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
        loss = sum(share * value for share, value in parts.values())
        return loss, {"loss": loss} | {name: value for name, (_, value) in parts.items()}

    return loss_fn


def hard_examples(key, logits, labels, sure, *, power=2.0, draws=10_000):
    """RHEM: the mean cross entropy of elements drawn by how wrong they are (section 3.4).

    Args:
      key: of the draws.
      logits: [B, K].
      labels: [B, K].
      sure: [B, K], 0 for elements that are not drawn.
      power: an element is drawn, with replacement, in proportion to (|p - y| sure)^power.
      draws: how many.

    Returns:
      A scalar, 0 where nothing can be drawn.
    """
    logits = logits.astype(jnp.float32)
    error = jnp.abs(jax.nn.sigmoid(logits) - labels) * sure
    chance = jax.lax.stop_gradient(error**power).ravel()
    drawn = jax.random.choice(
        key, chance.size, (draws,), p=chance / jnp.maximum(chance.sum(), 1e-30)
    )
    # Counted instead of gathered: the gradient then is a product, not a scatter.
    times = jnp.zeros(chance.size).at[drawn].add(jnp.where(chance.sum() > 0, 1.0, 0.0))
    values = losses.weighted_focal_loss(logits, labels, pos_weight=1.0, neg_weight=1.0, gamma=0.0)
    return jnp.sum(jnp.where(times > 0, times * values.ravel(), 0.0)) / draws


def similarity(labels):
    """How alike the label sets of examples are: their common labels times their Jaccard index.

    Args:
      labels: [B, K], 0 or 1.

    Returns:
      [B, B]; two empty sets have 0.
    """
    common = labels @ labels.T
    size = labels.sum(axis=1)
    return common**2 / jnp.maximum(size[:, None] + size - common, 1.0)


def choose_triplets(key, labels, weight, *, count=5_000):
    """Anchors, and for each an example that is like it and one that is less so (section 3.5).

    The like one is drawn from those with a similarity of 1 or more, else it is the most similar;
    the other from all that are less similar than it, else it is the least similar.

    Args:
      key: of the draws.
      labels: [B, K].
      weight: [B], 0 for padding, which is never chosen.
      count: triplets.

    Returns:
      (anchor, like, unlike): int32 [count] each, rows of the batch.
    """
    size = len(labels)
    keys = jax.random.split(key, 3)
    real = weight > 0
    alike = similarity(labels)
    anchor = jnp.argmax(jnp.where(real, jax.random.uniform(keys[0], (count, size)), -1.0), axis=1)
    rows = alike[anchor]
    other = real & (jnp.arange(size) != anchor[:, None])

    def draw(key, among, otherwise):
        random = jnp.argmax(jnp.where(among, jax.random.uniform(key, among.shape), -1.0), axis=1)
        return jnp.where(among.any(axis=1), random, otherwise)

    most = jnp.argmax(jnp.where(other, rows, -1.0), axis=1)
    like = draw(keys[1], other & (rows >= 1), most)
    least = jnp.argmin(jnp.where(other, rows, jnp.inf), axis=1)
    chosen = jnp.take_along_axis(rows, like[:, None], axis=1)
    unlike = draw(keys[2], other & (rows < chosen), least)
    return anchor, like, unlike


def triplet_loss(key, embedding, labels, weight, *, margin=0.1, count=5_000):
    """The mean of max(0, |anchor - like| - |anchor - unlike| + margin) over drawn triplets.

    Args:
      key: of the draws.
      embedding: [B, F].
      labels: [B, K].
      weight: [B], 0 for padding.
      margin: of the distances.
      count: triplets.

    Returns:
      A scalar, 0 where the batch has fewer than three examples.
    """
    anchor, like, unlike = choose_triplets(key, labels, weight, count=count)
    embedding = embedding.astype(jnp.float32)
    # As torch's pairwise distance: its gradient stays finite at 0.
    apart = jnp.linalg.norm(embedding[:, None] - embedding + 1e-6, axis=-1)
    # Sums over one-hot rows: gathering would have a scatter for a gradient.
    one_hot = [jax.nn.one_hot(rows, len(labels)) for rows in (anchor, like, unlike)]
    rows = jnp.matmul(one_hot[0], apart, precision=jax.lax.Precision.HIGHEST)
    values = jnp.maximum(jnp.sum(rows * (one_hot[1] - one_hot[2]), axis=1) + margin, 0.0)
    return jnp.where((weight > 0).sum() > 2, values.mean(), 0.0)
