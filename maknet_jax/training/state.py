"""What a training run carries from step to step: arrays only."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TrainState(NamedTuple):
    """The state after `step` updates.

    Attributes:
      step: int32 scalar.
      params: the trainable parameters.
      batch_stats: BatchNorm's running statistics.
      opt_state: the optimiser's state (Ranger's slow weights among it).
      ema: the moving average of params and batch_stats, or () where none is kept.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = ()

    @property
    def variables(self):
        """What scoring takes: the moving average where one is kept, else the weights."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create(model, optimizer, *, size, seed, place=None, ema=False):
    """A fresh state: the same seed gives the same parameters.

    Args:
      model: a network of `maknet_jax.models`.
      optimizer: an optax transformation.
      size: the edge S of the images.
      seed: an integer.
      place: variables -> variables, to start from other weights; the optimiser begins with what it
        returns (Ranger's slow weights are a copy of it).
      ema: keep a moving average.
    """
    made = _init(model, optimizer, size, ema)(jax.random.key(seed))
    if place is None:
        return made
    variables = {"params": made.params, "batch_stats": made.batch_stats}
    variables = jax.tree.map(jnp.array, place(variables))  # copies: a step donates its state
    opt_state = jax.jit(optimizer.init)(variables["params"])
    average = jax.tree.map(jnp.copy, variables) if ema else ()
    return made._replace(**variables, opt_state=opt_state, ema=average)


def shapes(model, optimizer, *, size, ema=False):
    """The same with shapes and types for arrays: what a checkpoint is restored into."""
    return _init(model, optimizer, size, ema).eval_shape(jax.random.key(0))


@functools.lru_cache(maxsize=1)  # shapes and arrays of one network come of one trace
def _init(model, optimizer, size, ema):
    options = {}
    if jax.default_backend() == "cpu":
        # It runs once: optimising its hundred random draws takes a minute, eight times the rest.
        options["xla_backend_optimization_level"] = 0

    @functools.partial(jax.jit, compiler_options=options)
    def init(key):
        variables = model.init({"params": key}, jnp.zeros((1, size, size, 3)), train=False)
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats}) if ema else ()
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), average)

    return init
