"""A trained run as a differentiable function of float32 images, for attributions."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.tree_util import Partial
from jax.typing import ArrayLike

from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.errors import InputError
from maknet_jax.explain.options import PathOptions
from maknet_jax.runs import workdir
from maknet_jax.training import checked, sharding, transfer


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained run on the devices of this process.

    Computes in float32 on every device, including matrix products: sums over a path in bfloat16 are
    not complete.

    Attributes:
      name: the name in results and figures.
      run: the opened workdir.
      logit_fn: float32 images `[B, S, S, 3]` in [0, 1] -> logits `[B, K]`.
      to_input: int16 HU -> images for `logit_fn`.
    """

    name: str
    run: workdir.Run
    logit_fn: Partial
    to_input: Callable[[jax.Array], jax.Array]
    _fits: dict[tuple[Any, ...], tuple[int, int]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def identity(self) -> list[str | int]:
        """Checkpoint, step and digest of the weights, on which the results depend.

        The name is not part of it, because it changes when the workdir is moved.
        """
        weights = transfer.digest(self.run.variables["params"], self.run.variables["batch_stats"])
        return [self.run.name, self.run.step, weights]

    def put(self, hu: np.ndarray) -> jax.Array:
        """int16 HU `[B, S, S, 3]` -> float32 images, sharded over the devices."""
        batch = sharding.put_batch(self.run.mesh, {"image": np.asarray(hu)})
        return self.to_input(batch["image"])

    def confidences(self, images: jax.Array) -> np.ndarray:
        """Images as returned by `put` -> float32 `[B, K]`."""
        return np.asarray(ig.outputs(self.logit_fn, images)["probability"])

    def attribute(
        self, images: jax.Array, targets: ArrayLike, baseline: jax.Array, path: PathOptions
    ) -> ig.Attribution:
        """Integrated Gradients in chunks that fit the devices; the chunk size is computed once.

        Args:
          images: as returned by `put`.
          targets: `[B, T]` columns of labels.
          baseline: the start of the path, as returned by `put`.
          path: the path.
        """
        key = (images.shape, np.shape(targets)[1], path.output)
        if key not in self._fits:
            self._fits[key] = ig.fit(self.logit_fn, images, key[1], output=path.output)
        chunk, rows = self._fits[key]
        return ig.integrated_gradients(
            self.logit_fn,
            images,
            targets,
            baseline,
            steps=path.steps,
            method=path.method,
            output=path.output,
            refine=path.refinements,
            chunk=chunk,
            rows=rows,
        )


@dataclasses.dataclass(frozen=True)
class _Logits:
    """The logits of a model; equal for equal models, whose compiled programs are shared."""

    model: nn.Module

    def __call__(self, variables: Any, images: jax.Array) -> jax.Array:
        # Accelerators would otherwise round the factors of products, also in the backward pass.
        with jax.default_matmul_precision("highest"):
            return checked.apply(self.model, variables, images).logits.astype(np.float32)


def network_name(run: workdir.Run) -> str:
    """The name of a network in figures, with the parent folder: round-1 alone says little."""
    return f"{run.model_name} ({'/'.join(run.source.resolve().parts[-2:])})"


def make_network(run: workdir.Run, name: str) -> Network:
    """The `Network` of an opened run.

    Raises:
      InputError: the network needs more than the image.
    """
    if run.model.takes_box:
        raise InputError(
            f"{run.source} is a {run.model_name}, which needs a lesion's box in addition to the "
            "image: choose a network that takes only the image"
        )
    model = run.model.clone(dtype=np.float32)
    logits = Partial(_Logits(model), run.prepared)
    return Network(name, run, logits, jax.jit(run.to_input))


def open_networks(
    folder: str | pathlib.Path,
    compare: str | pathlib.Path | None = None,
    *,
    checkpoint: str = "best",
    devices: Sequence[jax.Device] | None = None,
) -> list[Network]:
    """Opens the `Network` of a model, and that of the model `compare` unless it is None.

    Args:
      folder: a workdir of `maknet train`, a bundle or a released name.
      compare: a second one.
      checkpoint: "best" or "last".
      devices: devices to compute on; None takes those of this process.

    Raises:
      InputError: the second network has other labels or another image size; or a network needs more
        than the image.
    """
    devices = devices or jax.local_devices()
    networks: list[Network] = []
    for path in [folder, *([compare] if compare else [])]:
        run = workdir.open_run(path, checkpoint_name=checkpoint, devices=devices)
        name = network_name(run)
        name += " again" if name in [network.name for network in networks] else ""
        networks.append(make_network(run, name))
    first, last = networks[0].run, networks[-1].run
    if (first.vocabulary.names, first.size) != (
        last.vocabulary.names,
        last.size,
    ):
        raise InputError(
            f"--compare {compare} and {folder} differ in their labels or image size: compare "
            "networks that were trained on the same data"
        )
    return networks
