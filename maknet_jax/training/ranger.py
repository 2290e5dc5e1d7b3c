"""Ranger: rectified Adam with lookahead, a slow copy of the weights."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class RadamRangerState(NamedTuple):
    """State of `scale_by_radam_ranger`: number of updates and the two moments of the gradient."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count; int32 []
    mu: optax.Updates
    nu: optax.Updates


class LookaheadSlowState(NamedTuple):
    """State of `lookahead_slow`: number of updates and the slow weights."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count; int32 []
    slow: optax.Params


def _step_sizes(b1: float, b2: float, n_sma_threshold: float) -> tuple[np.ndarray, int]:
    """Returns the step sizes of updates 1, 2, ..., float32, and the first rectified update.

    Computed on the host in float64: N_sma is a small difference of numbers near 2/(1-b2), and in
    float32 its error would be 1 % at the first rectified updates. After the last entry the step
    size no longer changes in float32.
    """
    if not (0.0 <= b1 < 1.0 and 0.0 < b2 < 1.0):
        raise ValueError(f"b1={b1}, b2={b2}: Ranger needs 0 <= b1 < 1 and 0 < b2 < 1")
    n_sma_max = 2.0 / (1.0 - b2) - 1.0
    decay = max(b1, b2)
    t = np.arange(1, max(10, math.ceil(math.log(1e-12) / math.log(decay))) + 1, dtype=np.float64)
    n_sma = n_sma_max - 2.0 * t * b2**t / (1.0 - b2**t)
    # Below 4 the formula has an imaginary root: such updates are never rectified.
    rectified = n_sma > max(n_sma_threshold, 4.0)
    sizes = 1.0 / (1.0 - b1**t)
    n = n_sma[rectified]
    sizes[rectified] *= np.sqrt(
        (1.0 - b2 ** t[rectified])
        * ((n - 4.0) / (n_sma_max - 4.0))
        * ((n - 2.0) / (n_sma_max - 2.0))
        * (n_sma_max / n)
    )
    first = int(np.argmax(rectified)) + 1 if rectified.any() else np.iinfo(np.int32).max
    return sizes.astype(np.float32), first


def scale_by_radam_ranger(
    *, b1: float = 0.95, b2: float = 0.999, eps: float = 1e-5, n_sma_threshold: float = 5.0
) -> optax.GradientTransformation:
    """Scales gradients by rectified Adam, as Ranger implements it.

    Liu et al. 2020, arXiv 1908.03265. Unlike in `optax.scale_by_radam`, eps is added to the root of
    the second moment BEFORE the bias correction, as in the published code. For gradients near eps
    the steps differ considerably.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      n_sma_threshold: updates whose N_sma (length of the approximated moving average) is at most
        this are plain momentum. With the defaults the first rectified update is the 6th.

    Returns:
      An `optax.GradientTransformation`; its updates have the sign of the gradient.

    Raises:
      ValueError: b1 or b2 is out of range.
    """
    sizes, first_rectified = _step_sizes(b1, b2, n_sma_threshold)

    def init(params: optax.Params) -> RadamRangerState:
        return RadamRangerState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update(
        updates: optax.Updates, state: RadamRangerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RadamRangerState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.nu, updates)
        size = jnp.asarray(sizes)[jnp.minimum(count, len(sizes)) - 1]
        rectified = count >= first_rectified

        def scaled(m: jax.Array, v: jax.Array) -> jax.Array:
            step = jnp.where(rectified, m / (jnp.sqrt(v) + eps), m)
            return size.astype(m.dtype) * step

        return jax.tree.map(scaled, mu, nu), RadamRangerState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def lookahead_slow(k: int = 6, alpha: float = 0.5) -> optax.GradientTransformation:
    """Moves the weights to a slow copy at every k-th update (Zhang et al. 2019, arXiv 1907.08610).

    It must be the last transformation of a chain: params + updates are the fast weights. The slow
    weights are stored in this state, so params remain a plain tree. As in Ranger, the fast weights
    are evaluated. After a synchronisation the two agree up to float rounding.

    Args:
      k: updates between two synchronisations.
      alpha: step of the slow weights towards the fast ones, 0 to 1.

    Returns:
      An `optax.GradientTransformation`; `update` needs params.

    Raises:
      ValueError: k or alpha is out of range.
    """
    if k < 1 or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"k={k}, alpha={alpha}: lookahead needs k >= 1 and 0 <= alpha <= 1")

    def init(params: optax.Params) -> LookaheadSlowState:
        # A copy: a buffer shared by params and slow weights could not be donated.
        return LookaheadSlowState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params))

    def update(
        updates: optax.Updates, state: LookaheadSlowState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LookaheadSlowState]:
        if params is None:
            raise ValueError("lookahead_slow needs params: call update(updates, state, params)")
        count = optax.safe_increment(state.count)
        synchronise = count % k == 0

        def moved(slow: jax.Array, param: jax.Array, step: jax.Array) -> jax.Array:
            return jnp.where(synchronise, slow + alpha * (param + step - slow), slow)

        slow = jax.tree.map(moved, state.slow, params, updates)
        updates = jax.tree.map(
            lambda s, param, step: jnp.where(synchronise, s - param, step), slow, params, updates
        )
        return updates, LookaheadSlowState(count, slow)

    return optax.GradientTransformation(init, update)


def centralize_gradients() -> optax.GradientTransformation:
    """Subtracts from each gradient its mean per output (Yong et al. 2020, arXiv 2004.01461).

    The mean is over all axes but the last, which is the output axis in Flax (HWIO, and [in, out]
    of Dense). `optax.centralize` keeps the first axis instead, which is correct only for torch's
    OIHW. Gradients with one axis (biases, BatchNorm) are not changed.
    """

    def centred(gradient: jax.Array) -> jax.Array:
        if gradient.ndim < 2:
            return gradient
        return gradient - jnp.mean(gradient, axis=tuple(range(gradient.ndim - 1)), keepdims=True)

    return optax.stateless(lambda updates, params: jax.tree.map(centred, updates))


def ranger(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.999,
    eps: float = 1e-5,
    n_sma_threshold: float = 5.0,
    alpha: float = 0.5,
    k: int = 6,
    weight_decay: float = 0.0,
    centralize: bool = False,
) -> optax.GradientTransformation:
    """Ranger of 2019, the optimiser of the paper (section 4.2): rectified Adam + lookahead.

    The defaults are those of the published code at the time of the paper; gradient centralisation
    was added to it three months later and is off. Tested against the package pytorch-ranger.

    Args:
      learning_rate: a float, or a schedule of the number of updates done (0 at the first).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      n_sma_threshold: see `scale_by_radam_ranger`.
      alpha: see `lookahead_slow`.
      k: see `lookahead_slow`.
      weight_decay: decoupled as in AdamW, scaled by the learning rate, for every parameter.
      centralize: centralise the gradients first, see `centralize_gradients`.

    Returns:
      An `optax.GradientTransformation`; `update` needs params.
    """
    return optax.chain(
        centralize_gradients() if centralize else optax.identity(),
        scale_by_radam_ranger(b1=b1, b2=b2, eps=eps, n_sma_threshold=n_sma_threshold),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
        lookahead_slow(k, alpha),
    )
