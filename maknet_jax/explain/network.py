"""A trained run as attributions see it: a differentiable function of float32 images."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from maknet_jax.errors import InputError
from maknet_jax.runs import workdir
from maknet_jax.training import sharding, transfer


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained run on the devices of this process.

    Computes in float32 on every device, matrix products included: sums over a path in bfloat16 are
    not complete.

    Attributes:
      name: the name that results and figures show.
      run: the opened workdir.
      logit_fn: float32 images `[B, S, S, 3]` in [0, 1] -> logits `[B, K]`.
      to_input: int16 HU -> images for `logit_fn`.
    """

    name: str
    run: workdir.Run
    logit_fn: Partial
    to_input: Callable[[jax.Array], jax.Array]

    @property
    def identity(self) -> list[str | int]:
        """What the results depend on: name, checkpoint, step and digest of the weights."""
        weights = transfer.digest(self.run.variables["params"], self.run.variables["batch_stats"])
        return [self.name, self.run.name, self.run.step, weights]

    def put(self, hu: np.ndarray) -> jax.Array:
        """int16 HU `[B, S, S, 3]` -> float32 images, sharded over the devices."""
        batch = sharding.put_batch(self.run.mesh, {"image": np.asarray(hu)})
        return self.to_input(batch["image"])

    def confidences(self, images: jax.Array) -> np.ndarray:
        """Images as returned by `put` -> float32 `[B, K]`."""
        return np.asarray(_confidences(self.logit_fn, images))


@jax.jit
def _confidences(logit_fn: Partial, images: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(logit_fn(images))


def open_networks(
    folder: str | pathlib.Path,
    compare: str | pathlib.Path | None = None,
    *,
    checkpoint: str = "best",
    devices: Sequence[jax.Device] | None = None,
) -> list[Network]:
    """Opens the `Network` of a workdir, and that of the workdir `compare` unless it is None.

    Args:
      folder: a workdir of `maknet train`.
      compare: a second workdir.
      checkpoint: "best" or "last".
      devices: devices to compute on; None takes those of this process.

    Raises:
      InputError: the second network has other labels or another image size; or a network takes
        more than the image.
    """
    devices = devices or jax.local_devices()
    networks: list[Network] = []
    for path in [folder, *([compare] if compare else [])]:
        run = workdir.open_run(path, checkpoint_name=checkpoint, devices=devices)
        if run.model.takes_box:
            raise InputError(
                f"{path} is a {run.model_name}, which takes a lesion's box beside the image: only "
                "networks that take the image alone can be explained"
            )
        model = run.model.clone(dtype=np.float32)

        def logits(variables: Any, images: jax.Array, model: Any = model) -> jax.Array:
            # Accelerators would round the factors of products, in the backward pass as well.
            with jax.default_matmul_precision("highest"):
                return model.apply(variables, images, train=False).logits.astype(np.float32)

        # A folder that is called round-1 says little without its parent.
        name = f"{run.model_name} ({'/'.join(pathlib.Path(path).resolve().parts[-2:])})"
        name += " again" if name in [network.name for network in networks] else ""
        to_input = jax.jit(run.to_input)
        networks.append(Network(name, run, Partial(logits, run.variables), to_input))
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
