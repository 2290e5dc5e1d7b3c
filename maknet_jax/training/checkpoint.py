"""Checkpoints of a `TrainState` (Orbax), each leaf with its digest.

Orbax restores a flipped bit in an array without a word, so SHA-256 digests are kept beside the
arrays and compared on reading; a damaged checkpoint is passed over and the previous one used.
"""

import hashlib
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from maknet_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one folder; the one named N holds the state after N updates."""

    def __init__(self, folder, *, keep=2):
        """Opens or makes a folder.

        Args:
          folder: where the checkpoints lie.
          keep: how many of the newest are kept; 2, so that a damaged one has a predecessor.
        """
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self):
        """The steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state, meta=None):
        """Writes `state` under its step, with `meta` (JSON). A step that exists is left alone."""
        step = int(state.step)
        if step in self.steps():
            return
        content = {"digests": digests(state), "meta": meta or {}}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), content=ocp.args.JsonSave(content)
            ),
        )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not written: {self.folder} has a newer one")

    def restore(self, like, step=None):
        """Reads the newest checkpoint that is whole, or the one of `step`.

        Args:
          like: `state.shapes` of the network that is expected.
          step: which one; None takes the newest that is whole.

        Returns:
          (state of NumPy arrays, meta, damaged): `damaged` maps the steps that were passed over to
          the reason; state is None where the folder holds none.

        Raises:
          InputError: the asked one, or every one, is damaged, or it is of another network.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise InputError(f"checkpoint {step} is not in {self.folder}: it has {steps}")
        damaged = {}
        for candidate in [step] if step is not None else reversed(steps):
            try:
                state, meta = self._read(like, candidate)
                return state, meta, damaged
            except Exception as error:
                # Orbax raises many kinds of errors on a damaged file; each means the same here.
                text = " ".join(str(error).split())[:200]
                damaged[candidate] = f"{type(error).__name__}: {text}"
        if damaged:
            candidate, reason = next(iter(damaged.items()))
            raise InputError(
                f"no checkpoint in {self.folder} can be read ({candidate}: {reason}): restore a "
                "copy or start in another workdir"
            )
        return None, {}, {}

    def _read(self, like, step):
        # Restored to NumPy: where the arrays live is for the caller to say.
        as_numpy = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(as_numpy), content=ocp.args.JsonRestore()
            ),
        )
        # Orbax restores another shape than the asked one without a word.
        wanted, _ = jax.tree_util.tree_flatten_with_path(like)
        for (path, leaf), array in zip(wanted, jax.tree.leaves(restored.state), strict=True):
            if array.shape != leaf.shape:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"another network: {name} is {array.shape}, not {leaf.shape}")
        expected = restored.content["digests"]
        found = digests(restored.state)
        if found != expected:
            wrong = [name for name in expected if found.get(name) != expected[name]]
            raise ValueError(f"{len(wrong)} arrays differ from their digest, first {wrong[:1]}")
        return restored.state, restored.content["meta"]

    def set_aside(self, step):
        """Moves a damaged checkpoint to `FOLDER_damaged/STEP`: its name must become free."""
        if jax.process_index() == 0:
            target = self.folder.with_name(f"{self.folder.name}_damaged") / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(self.folder / str(step), target)
        self._manager.reload()

    def discard(self, step):
        """Removes a checkpoint."""
        self._manager.delete(step)

    def close(self):
        """Ends the manager's threads."""
        self._manager.close()


def digests(tree):
    """Leaf path -> SHA-256 of its type, shape and bytes; the arrays are fully replicated."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    result = {}
    for path, leaf in leaves:
        array = np.asarray(leaf)
        head = f"{array.dtype}{array.shape}".encode()
        result[jax.tree_util.keystr(path)] = hashlib.sha256(head + array.tobytes()).hexdigest()
    return result
