"""PyTorch in a separate process, for the benchmarks that compare JAX with it.

The process runs `torch_networks.py`, or a script that extends it, under another Python. It gets
weights and batches from here and sleeps between requests, so that the two never run at once.
"""

import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import numpy.typing as npt
from flax import traverse_util

from benchmarks import harness, timing
from maknet_jax.cli import options
from maknet_jax.errors import InputError
from maknet_jax.training import losses, state

TOLERANCE = 1e-3  # of the largest logit, map value or loss
NETWORKS = pathlib.Path(__file__).resolve().with_name("torch_networks.py")


def parser(file: str, description: str | None) -> options.Parser:
    """`harness.parser` with --torch-python; JAX runs on the CPU, as PyTorch does."""
    jax.config.update("jax_platforms", "cpu")
    result = harness.parser(file, description)
    result.add_argument("--torch-python", required=True, help="a Python with torch and NumPy")
    return result


class Worker:
    """The process of a script that follows the protocol of torch_networks.py; a context manager.

    Attributes:
      versions: "torch", its version, and "threads", the number of its threads.
    """

    def __init__(self, python: str, script: pathlib.Path | None = None) -> None:
        """Starts the process.

        Args:
          python: a Python with torch and NumPy.
          script: the script; torch_networks.py by default.

        Raises:
          InputError: `python` does not run, or cannot run the script.
        """
        self._script = script or NETWORKS
        self._errors = tempfile.TemporaryFile("w+")
        paths = [str(harness.BENCHMARKS.parent), os.environ.get("PYTHONPATH")]
        try:
            self._process = subprocess.Popen(
                [python, self._script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                # The scripts import each other from this checkout, which PYTHON need not install.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
        except OSError as error:
            self._errors.close()
            raise InputError(
                f"--torch-python {python}: {error.strerror}: pass a Python with torch and NumPy"
            ) from None
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self.versions = self._answer()
        except InputError as error:
            self.close()
            raise InputError(
                f"--torch-python {python}: {error}: pass a Python with torch and NumPy"
            ) from None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
          InputError: the process ended; with the last line of its standard error.
        """
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return self._answer()

    def timer(self, name: str, step: str, *, at_least: float = 0.5) -> Callable[[], float]:
        """`timing.timer` of one step of a network that was sent to the process."""
        return timing.timer(
            lambda calls: self.ask(name=name, step=step, calls=calls)["seconds"], at_least=at_least
        )

    def send(
        self, name: str, network: harness.Network, batch: Mapping[str, np.ndarray], **settings: Any
    ) -> None:
        """Sends a network's weights and a batch to the process.

        Args:
          name: identifies the network in later requests.
          network: the network.
          batch: arrays by name.
          settings: whatever else the script expects.
        """
        config = network.config
        flat: dict[str, jax.Array] = {}
        for tree in network.state.variables.values():
            flat |= traverse_util.flatten_dict(tree, sep="/")
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "network.npz"
            arrays = {f"weights/{path}": np.asarray(array) for path, array in flat.items()}
            arrays |= {f"batch/{key}": value for key, value in batch.items()}
            np.savez(file, allow_pickle=False, **arrays)
            self.ask(
                name=name,
                load=str(file),
                model=config.model.name,
                options=config.model.options.to_dict(),
                window=config.data.window,
                **settings,
            )

    def close(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._process.wait()
        self._answers.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            reason = (self._errors.read().strip() or "no error message").splitlines()[-1]
            raise InputError(f"the process of {self._script.name} ended: {reason.strip()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def perturb_constant_initial_values(variables: state.Variables) -> state.Variables:
    """Adds noise to all but 4-D kernels, a `state.Place`.

    Parameters that start as 0, 1 or the identity would hide a mistake in the transfer to PyTorch.
    """
    rng = np.random.default_rng(1)

    def perturb(array: jax.Array) -> jax.Array:
        noise = 0.1 * rng.standard_normal(array.shape).astype(np.float32)
        return array if array.ndim == 4 else array + noise

    return jax.tree.map(perturb, variables)


def weighted_batch(network: harness.Network) -> dict[str, np.ndarray]:
    """The network's batch with the class weights of its loss, `pos_weight` and `neg_weight`."""
    clamp = network.config.loss.clamp
    weights = losses.class_weights(network.label_counts, harness.EXAMPLES, clamp=clamp)
    return network.batch | dict(zip(("pos_weight", "neg_weight"), weights, strict=True))


def relative_difference(values: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """The largest absolute difference over the largest absolute value of `reference`."""
    values, reference = np.asarray(values), np.asarray(reference)
    return float(np.abs(values - reference).max() / np.abs(reference).max())


def check_differences(differences: Mapping[str, float], script: str, prefix: str = "") -> None:
    """Rejects networks that disagree.

    Args:
      differences: relative differences between JAX and PyTorch by name.
      script: the PyTorch code to compare with, for the error.
      prefix: starts the error.

    Raises:
      InputError: a difference exceeds `TOLERANCE` or is not a number.
    """
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise InputError(
                f"{prefix}relative difference of JAX and PyTorch ({name}) is {difference:.2g}, the "
                f"tolerance is {TOLERANCE}: make {script} match the JAX network; nothing was timed"
            )
