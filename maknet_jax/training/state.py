"""The state that training steps update: arrays only."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

Variables: TypeAlias = dict[str, Any]  # nested dicts of arrays, as Flax returns them
Place: TypeAlias = Callable[[Variables], Variables]


class TrainState(NamedTuple):
    """The state after `step` updates.

    Attributes:
      step: int32 scalar.
      params: the trainable parameters.
      batch_stats: BatchNorm's running statistics.
      opt_state: the optimiser's state, including Ranger's slow weights.
      ema: the moving average of params and batch_stats, or () without one.
    """

    step: jax.Array
    params: Variables
    batch_stats: Variables
    opt_state: optax.OptState
    ema: Variables | tuple[()] = ()

    @property
    def variables(self) -> Variables:
        """The variables for scoring: the moving average if there is one, else the weights."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    size: int,
    seed: int,
    place: Place | None = None,
    ema: bool = False,
) -> TrainState:
    """Creates a state before its first update; the same seed gives the same parameters.

    Args:
      model: a network of `maknet_jax.models`.
      optimizer: an optax transformation.
      size: the edge S of the images in pixels.
      seed: an integer.
      place: variables -> variables, to start from other weights. The optimiser also starts from the
        result (Ranger's slow weights are a copy of it).
      ema: keep a moving average.
    """
    state = _init(model, optimizer, size, ema)(jax.random.key(seed))
    if place is None:
        return state
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    variables = jax.tree.map(jnp.array, place(variables))  # copies: a step donates its state
    opt_state = jax.jit(optimizer.init)(variables["params"])
    average = jax.tree.map(jnp.copy, variables) if ema else ()
    return state._replace(**variables, opt_state=opt_state, ema=average)


def shapes(
    model: nn.Module, optimizer: optax.GradientTransformation, *, size: int, ema: bool = False
) -> TrainState:
    """The state of `create` with `jax.ShapeDtypeStruct` for arrays."""
    return _init(model, optimizer, size, ema).eval_shape(jax.random.key(0))


@functools.lru_cache(maxsize=1)  # shapes and arrays of one network share one trace
def _init(
    model: nn.Module, optimizer: optax.GradientTransformation, size: int, ema: bool
) -> Any:  # a jitted function of a key; `jax.stages.Wrapped` has no eval_shape
    options = {}
    if jax.default_backend() == "cpu":
        # It runs once: optimising its hundred random draws takes a minute of compilation, eight
        # times as long as everything else.
        options["xla_backend_optimization_level"] = 0

    @functools.partial(jax.jit, compiler_options=options)
    def init(key: jax.Array) -> TrainState:
        variables = model.init({"params": key}, jnp.zeros((1, size, size, 3)), train=False)
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats}) if ema else ()
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), average)

    return init
