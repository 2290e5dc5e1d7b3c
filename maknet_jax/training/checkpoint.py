"""Checkpoints of a `TrainState` (Orbax), with a digest of each array and of the metadata.

Orbax silently restores an array with a flipped bit. SHA-256 digests are therefore stored beside the
arrays and compared on reading; a damaged checkpoint is skipped and the previous one is used. An
error of the system (no permission, too many open files) is not damage: it is raised as OSError.
"""

import concurrent.futures
import contextlib
import functools
import glob
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from maknet_jax.errors import InputError, system_error
from maknet_jax.training import sharding
from maknet_jax.training.background import Background
from maknet_jax.training.digests import (
    check_content,
    check_digests,
    check_shapes,
    content_digest,
    digests,
    first_nonfinite,
    tree_of,
)
from maknet_jax.training.orbax_quirks import PAUSE, check_path, quiet
from maknet_jax.training.state import TrainState

T = TypeVar("T")
_PAUSE = PAUSE  # before a failed checkpoint is read again
_LISTINGS = 10  # how often a folder that changes while it is read is listed again


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`.

    Attributes:
      state: NumPy arrays; None if the folder holds no checkpoint.
      metadata: as it was saved.
      damaged: step -> reason, of the newer checkpoints that were skipped.
    """

    state: TrainState | None
    metadata: dict[str, Any]
    damaged: dict[int, str]


class Checkpoints:
    """The checkpoints of one folder; checkpoint N holds the state after N updates."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 2,
        writable: bool = True,
        background: Background | None = None,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens a folder, or creates it.

        Args:
          folder: the folder of the checkpoints.
          keep: number of checkpoints to keep; 2 leaves one to fall back on if one is damaged.
          writable: False only reads, possibly while a training writes; changes nothing.
          background: the thread that writes checkpoints; None writes them in `save`.
          written: called after each write by the thread that wrote it, as to copy it elsewhere; its
            errors are those of the write.

        Raises:
          InputError: see `check_path`.
        """
        self.folder = pathlib.Path(folder).absolute()
        self._background, self._written = background, written
        self._writing: concurrent.futures.Future[None] | None = None
        # Process 0 writes and all read independently, without barriers.
        self._alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process {jax.process_index()}",
        )
        options: dict[str, Any] = {"create": False, "enable_async_checkpointing": False}
        if writable:
            check_path(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)  # Orbax would need all processes
            if jax.process_index() == 0:
                self._remove_unfinished()
                self._restore_replaced()
                options["max_to_keep"] = keep
        orbax = ocp.CheckpointManagerOptions(multiprocessing_options=self._alone, **options)
        self._manager = _listed(lambda: ocp.CheckpointManager(self.folder, options=orbax))

    def _remove_unfinished(self) -> None:
        """Removes what a killed process or a full disk left of a checkpoint."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _aside(self, kind: str) -> pathlib.Path:
        """A folder beside this one, for checkpoints that are not part of it."""
        return self.folder.with_name(f"{self.folder.name}_{kind}")

    def _restore_replaced(self) -> None:
        """Completes or undoes a `replace` that was killed."""
        for old in sorted(self._aside("replaced").glob("*")):
            if not (self.folder / old.name).exists():
                old.rename(self.folder / old.name)
        for kind in ("new", "replaced"):
            shutil.rmtree(self._aside(kind), ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes `state` under its step with `metadata` (JSON), unless the step exists.

        With a background thread it returns as soon as the state is copied; then `wait` or the next
        save raises the errors. A collective if there are several processes: the first one writes.

        Raises:
          InputError: a value is not finite, and nothing is written; there is a newer checkpoint; or
            what was written cannot be opened.
          OSError: the disk is full, for example; the previous checkpoints are intact.
        """
        self.wait()
        self._start(self._write, state, metadata, wanted=int(state.step) not in self.steps())

    def replace(self, state: TrainState, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes `state` in place of the checkpoint of its step, which stays until it is written.

        Like `save` otherwise. A kill leaves the old or the new checkpoint; between two renames, the
        next opening of the folder restores the old one.

        Raises:
          InputError: see `save`.
          OSError: see `save`.
        """
        self.wait()
        self._start(self._replace, state, metadata)

    def _start(
        self,
        write: Callable[[int, TrainState, str], None],
        state: TrainState,
        metadata: Mapping[str, Any] | None,
        *,
        wanted: bool = True,
    ) -> None:
        """Writes on process 0 if it is wanted there, in the background if there is one."""
        step = int(state.step)
        if jax.process_index() == 0 and wanted:
            arrays = sharding.host_copy(state)  # the next training step donates the state
            task = functools.partial(write, step, arrays, json.dumps(dict(metadata or {})))
            if self._background is None:
                task()
            else:
                self._writing = self._background.start(task)
        if self._background is None:
            sharding.wait_for_all(f"saved {step}")

    def wait(self) -> None:
        """Waits until the last checkpoint is written; a collective if there are several processes.

        Raises:
          InputError: see `save`; on the other processes for all of its errors.
          OSError: see `save`.
        """
        if self._background is None:
            return
        if self._writing:
            self._writing.result()
        error = self._background.take_error()
        (reason, *_) = sharding.exchange(str(error) if error else None)
        if error or reason:
            raise error or InputError(f"process 0 cannot save a checkpoint: {reason}")

    def _write(self, step: int, state: TrainState, metadata: str) -> None:
        """Writes a checkpoint; for errors see `save`."""
        if name := first_nonfinite(state):
            raise InputError(
                f"the state after step {step} is not saved, because {name} is not finite: run the "
                f"same command to resume from step {max(self.steps(), default=0)}, or lower "
                "optimizer.learning_rate and choose another --workdir"
            )
        content: dict[str, Any] = {"digests": digests(state), "meta": json.loads(metadata)}
        content["sha256"] = content_digest(content)
        folder = self.folder / str(step)
        try:
            with quiet():
                saved = self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), content=ocp.args.JsonSave(content)
                    ),
                )
                if saved:
                    self._check_written(step, content)
        except Exception as error:
            self._remove_unfinished()
            if isinstance(error, InputError):
                raise
            # Orbax raises many types of errors.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise system_error(error, folder) or InputError(
                f"{folder} was not written ({reason}): run the same command to resume"
            ) from None
        if not saved:
            raise InputError(f"{folder} was not written, because {self.folder} has a newer one")
        self._written()

    def _replace(self, step: int, state: TrainState, metadata: str) -> None:
        """Writes a checkpoint beside the old one and swaps them; for errors see `save`."""
        old, new = self.folder / str(step), self._aside("new")
        shutil.rmtree(new, ignore_errors=True)
        try:
            with contextlib.closing(Checkpoints(new)) as writer:
                writer._write(step, state, metadata)
            self._aside("replaced").mkdir(exist_ok=True)
            old.rename(self._aside("replaced") / str(step))
            (new / str(step)).rename(old)
        finally:
            self._restore_replaced()
        self._manager.reload()
        self._written()

    def _check_written(self, step: int, content: Mapping[str, Any]) -> None:
        """Opens a new checkpoint: Orbax can write one without its manifest."""
        self._manager.reload()
        folder = self.folder / str(step)
        complete = (folder / "state" / "manifest.ocdbt").is_file()
        if not complete or self._read_content(step) != content:
            raise InputError(f"{folder} was written but cannot be opened: check its file system")

    def restore(self, like: TrainState | None = None) -> Restored:
        """Reads the newest intact checkpoint; for several processes see `agreement`.

        A checkpoint that cannot be read is read again after a pause, from a new listing of the
        folder: a training that runs may have deleted it, and an error of the storage may pass.

        Args:
          like: `state.shapes` of the expected network; None reads what is there, without the
            state of the optimiser, which is then ().

        Raises:
          InputError: there are checkpoints, and every one is damaged or of another network.
          OSError: the system cannot read a checkpoint: no permission, for example.
        """
        damaged: dict[int, str] = {}
        for _ in range(_LISTINGS):
            before, damaged = self._listing(), {}
            _listed(self._manager.reload)
            for candidate in sorted(self._manager.all_steps(), reverse=True):
                try:
                    return Restored(*self._read_twice(like, candidate), damaged)
                except Exception as error:
                    # Orbax raises many types of errors on a damaged file; treat them all alike.
                    if failure := system_error(error, self.folder / str(candidate)):
                        raise failure from None
                    text = " ".join(str(error).split())[:200]
                    damaged[candidate] = f"{type(error).__name__}: {text}"
                if self._listing() != before:  # a training deleted it
                    break
            if self._listing() == before:
                break
        if damaged:
            candidate, reason = next(iter(damaged.items()))
            raise InputError(
                f"no checkpoint in {self.folder} can be read ({candidate}: {reason}): restore a "
                "copy or start in another workdir"
            )
        return Restored(None, {}, {})

    def read(self, like: TrainState | None, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint, see `restore`: (state, metadata).

        Raises:
          Exception: it is missing or damaged.
        """
        _listed(self._manager.reload)
        return self._read_twice(like, step)

    def _listing(self) -> list[str]:
        """The names of all files, which change when a checkpoint is written or deleted."""
        return sorted(glob.glob("**", root_dir=self.folder, recursive=True))

    def _read_twice(self, like: TrainState | None, step: int) -> tuple[TrainState, dict[str, Any]]:
        try:
            return self._read(like, step)
        except Exception:
            time.sleep(_PAUSE)
            return self._read(like, step)

    def check(self, like: TrainState, step: int) -> str:
        """Reads a checkpoint and compares all digests; returns a remark, "" if there is none.

        Raises:
          Exception: it is damaged, see `restore`.
        """
        self._read_all(like, step)
        old = "sha256" not in self._read_content(step)
        return "no digest of the metadata (written by an earlier version)" if old else ""

    def _read_content(self, step: int) -> dict[str, Any]:
        """The digests and the metadata of a checkpoint."""
        content = self._manager.restore(
            step, args=ocp.args.Composite(content=ocp.args.JsonRestore())
        ).content
        check_content(content)
        return content

    def _read(self, like: TrainState | None, step: int) -> tuple[TrainState, dict[str, Any]]:
        return self._read_weights(step) if like is None else self._read_all(like, step)

    def _read_weights(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state without that of the optimiser; the digests name its arrays."""
        stored = self._read_content(step)
        expected = {
            name: digest
            for name, digest in stored["digests"].items()
            if not name.startswith(".opt_state")
        }
        tree = tree_of(expected)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        # Not by the manager, which reads and writes an item in one way only.
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=self._alone)
        checkpointer = ocp.Checkpointer(handler, multiprocessing_options=self._alone)
        with contextlib.closing(checkpointer) as reader:
            restored = reader.restore(
                self.folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True),
            )
        state = TrainState(
            step=restored["step"],
            params=restored["params"],
            batch_stats=restored.get("batch_stats", {}),
            opt_state=(),
            ema=restored.get("ema", ()),
        )
        check_digests(state, expected)
        return state, stored["meta"]

    def _read_all(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        # Restored as NumPy arrays: the caller decides on which devices to put them.
        as_numpy = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(as_numpy), content=ocp.args.JsonRestore()
            ),
        )
        check_shapes(restored.state, like)
        check_content(restored.content)
        check_digests(restored.state, restored.content["digests"])
        return restored.state, restored.content["meta"]

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to `FOLDER_damaged/STEP`, so that its step can be saved.

        A collective if there are several processes.
        """
        if jax.process_index() == 0:
            target = self._aside("damaged") / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(self.folder / str(step), target)
        sharding.wait_for_all(f"set aside {step}")
        self._manager.reload()

    def discard(self, step: int) -> None:
        """Removes a checkpoint; a collective if there are several processes."""
        self.wait()
        if jax.process_index() == 0:
            self._manager.delete(step)
        sharding.wait_for_all(f"discarded {step}")
        self._manager.reload()

    def close(self) -> None:
        """Waits until the last checkpoint is written, and stops the manager's threads."""
        if self._writing:
            self._writing.result()
        self._manager.close()


def _listed(read: Callable[[], T]) -> T:
    """Repeats a listing of checkpoints that fails because a training deletes one meanwhile."""
    for _ in range(_LISTINGS):
        with contextlib.suppress(FileNotFoundError):
            return read()
    return read()
