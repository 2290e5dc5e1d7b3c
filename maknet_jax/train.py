"""`maknet train`: the training loop of all configs.

Step N takes batch N of an order that depends only on the seed, and checkpoint N holds the state
after N updates. A run that was stopped and resumed therefore gives the same result as an
uninterrupted one, bit for bit on the same devices. (On GPUs that needs
XLA_FLAGS=--xla_gpu_deterministic_ops=true; tested on CPU only.)
"""

import contextlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from maknet_jax import console, files
from maknet_jax.data import object_store, pipeline
from maknet_jax.errors import InputError, Stopped
from maknet_jax.evaluation import domain_fit
from maknet_jax.evaluation.evaluator import Evaluator
from maknet_jax.runs import domain_file, remote, stopping, workdir
from maknet_jax.runs import steps as step_results
from maknet_jax.runs.progress import Progress
from maknet_jax.runs.setup import Setup, set_up
from maknet_jax.runs.throughput import Throughput
from maknet_jax.runs.training_claim import claim_workdir
from maknet_jax.training import agreement, checkpoint, sharding
from maknet_jax.training import log as metric_log
from maknet_jax.training.background import Background
from maknet_jax.training.state import TrainState


def train(
    config: ConfigDict,
    folder: str | os.PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
    """Trains in `folder`, or resumes the run in it.

    Args:
      config: a locked config, see `configs/teacher.py`.
      folder: the workdir, or its s3:// or gs:// URL; created if needed. A run in it must have the
        same config and data.
      devices: the devices to train on; None takes all.

    Returns:
      The summary (also in `summary.json`).

    Raises:
      InputError: the data do not match the config, or the workdir holds another run.
      Stopped: a signal; the state is saved.
    """
    if not object_store.is_url(folder):
        return _train(config, pathlib.Path(folder), devices)
    with remote.opened(os.fspath(folder), "maknet train") as copy:
        return _train(config, copy.folder, devices, copy)


def _train(
    config: ConfigDict,
    folder: pathlib.Path,
    devices: Sequence[jax.Device] | None,
    copy: remote.Copy | None = None,
) -> dict[str, Any]:
    """See `train`; with a `copy`, `folder` is that of a workdir in an object store."""
    checkpoint.check_path(folder)
    setup = set_up(config, folder, devices=devices)  # raises InputError before anything is written
    last, best = (folder / workdir.FOLDERS[name] for name in ("last", "best"))
    saving = Background()
    options: dict[str, Any] = {"background": saving} | ({"written": copy.upload} if copy else {})
    with (
        claim_workdir(setup, shared=copy is None),
        contextlib.closing(saving),
        console.Log(folder / "log.jsonl" if _is_main() else None) as log,
        stopping.noted_signals() as stop,
        contextlib.closing(checkpoint.Checkpoints(last, **options)) as lasts,
        contextlib.closing(checkpoint.Checkpoints(best, keep=1, **options)) as bests,
    ):
        if copy:
            copy.upload()  # the claim
        return _Loop(setup, log, stop, saving, last=lasts, best=bests, copy=copy).run()


def _is_main() -> bool:
    """Whether this process writes the logs: only the first one does."""
    return jax.process_index() == 0


def _evaluator(setup: Setup, stop: list[int]) -> Evaluator | None:
    """The evaluator of the validation split; None if that is empty."""
    config, splits = setup.config, setup.dataset.info["splits"]
    if not splits.get(config.data.val_split, {"count": 0})["count"]:
        return None
    return Evaluator(
        setup.dataset.source(config.data.val_split),
        setup.assembly.predict,
        batch_size=config.data.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        stop=lambda: bool(stop),
    )


class _Loop:
    """The training loop of one run, with its checkpoints and logs."""

    def __init__(
        self,
        setup: Setup,
        log: console.Log,
        stop: list[int],
        saving: Background,
        *,
        last: checkpoint.Checkpoints,
        best: checkpoint.Checkpoints,
        copy: remote.Copy | None = None,
    ) -> None:
        self.copy, self.address = copy, copy.url if copy else str(setup.folder)
        self.setup, self.log, self.stop = setup, log, stop
        self.saving, self.last, self.best = saving, last, best
        self.progress = Progress(init=setup.init)
        self.evaluator = _evaluator(setup, stop)
        self.parents = setup.dataset.vocabulary.parents

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns the summary."""
        setup, config, total = self.setup, self.setup.config, self.setup.total
        train_step = setup.assembly.train_step
        assert train_step is not None  # assembled for training
        state = self._restore_or_create()
        first = int(state.step)
        key = jax.random.key(config.seed + 1)
        batches = pipeline.mixed_batches(
            setup.sources,
            setup.batch_sizes,
            seed=config.seed,
            start=first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
        )
        steps = step_results.Steps(
            lambda: bool(self.stop),
            self.log.say,
            save_minutes=config.checkpoint_minutes,
            has_failed=lambda: self.saving.failed,
            most_skipped=config.skip_nonfinite,
            skipped=self.progress.skipped,
        )
        every = max(1, round(config.evaluate_every * setup.epoch_steps))
        with (
            contextlib.closing(Throughput(setup.images, step=first)) as throughput,
            contextlib.closing(
                metric_log.MetricLog(setup.folder if _is_main() else None, step=first)
            ) as metrics,
            console.progress("train", total, done=first) as advance,
        ):
            if self.progress.evaluation_due:
                self._repeat_evaluation(state, metrics)
            for number in range(first + 1, total + 1):
                batch = steps.mark(throughput.take(batches))
                state, values = train_step(
                    state, sharding.put_batch(setup.assembly.mesh, batch), key
                )
                throughput.started(values)
                # One step in flight: the host never runs far ahead of the device.
                steps.add(number, values, batch["id"].tolist())
                self.progress.pending.append(values)
                advance()
                at_end = number == total
                evaluating = number % every == 0 or at_end
                logging = number % config.log_every == 0 or at_end
                request = steps.request()
                ending = request == step_results.STOP
                saving = evaluating or request or number % config.checkpoint_every == 0
                if saving or logging:
                    steps.settle()
                    self.progress.settle()
                    self.progress.skipped = steps.skipped, steps.in_a_row
                    if not step_results.is_skipped(values):
                        _check_finite(values["loss"], number)
                if logging:
                    means = metric_log.averages(self.progress.pending)
                    rates = throughput.read(number)
                    metrics.write(number, {f"train/{k}": v for k, v in (means | rates).items()})
                    advance(
                        0,
                        f"loss {_format(means.get('loss'))}, "
                        f"{rates['images_per_second']:.1f} images/s, "
                        f"{rates['data_wait']:.0%} waiting for data",
                    )
                    self.progress.pending = []
                if evaluating:
                    with throughput.paused():
                        ending |= not self._evaluate(state, number, metrics)
                if saving:
                    self.last.save(state, self.progress.to_json())
                    steps.saved()
                if ending and (not at_end or self.progress.evaluation_due):
                    self._wait()
                    self.log.event(message=f"stopped at step {number} of {total}", step=number)
                    raise Stopped(self._saved(number))
            self._wait()
            summary = self._finish(int(state.step) - first, throughput.total(total))
        self._measure_domain(state)
        return summary

    def _wait(self) -> None:
        """Waits until all checkpoints are written, the best one first."""
        self.best.wait()
        self.last.wait()

    def _saved(self, number: int) -> str:
        total = self.setup.total
        return f"step {number} of {total} is saved in {self.address}; {stopping.AGAIN}"

    def _restore_or_create(self) -> TrainState:
        """The state of the newest intact checkpoint or a fresh one, replicated over the mesh."""
        setup = self.setup
        state, metadata, damaged = agreement.restore(self.last, setup.assembly.shapes)
        for number in damaged:
            self.last.set_aside(number)
        for number, reason in damaged.items():
            self.log.say(f"checkpoint {number} is damaged and set aside: {reason}")
        if self.evaluator is None:
            self.log.say(
                f"no examples in split {setup.config.data.val_split!r}: no validation and no best "
                "checkpoint"
            )
        elif one_sided := setup.dataset.one_sided(setup.config.data.val_split):
            self.log.say(
                f"no image of split {setup.config.data.val_split!r} is known to have, or to lack, "
                f"{console.shortened(one_sided)}: they get no threshold and are not predicted by "
                "themselves"
            )
        if state is None:
            state = self._create()
        else:
            self.progress = Progress.from_json(metadata)
            self.log.say(f"resuming from step {int(state.step)} of {setup.total}")
        if int(state.step) < setup.total:
            self.log.say("compiling the step, which can take minutes unless it is cached")
        known = sharding.exchange(self.best.steps())[0]  # of process 0: a listing may be stale
        for number in known:
            if number > int(state.step):  # this step will be repeated
                self.best.discard(number)
        if not any(number <= int(state.step) for number in known):
            self.progress.best = self.progress.best_step = None
        return sharding.put_state(setup.assembly.mesh, state)

    def _create(self) -> TrainState:
        setup = self.setup
        self.log.say(
            f"{setup.config.model.name}: {setup.parameters:,} parameters, "
            f"{setup.total} steps of {setup.images} images on {setup.assembly.mesh.size} "
            f"{jax.devices()[0].device_kind} device(s)",
            parameters=setup.parameters,
        )
        state = setup.assembly.create(setup.config.seed, setup.place)
        if init := setup.init:
            self.log.say(
                f"starting from {init['path']}: {init['placed']} arrays placed, newly initialised: "
                f"{', '.join(init['fresh']) or 'nothing'}",
                init=init,
            )
        overview = parameter_overview.get_parameter_overview(state.params)
        if _is_main():
            with files.write_whole(setup.folder / "parameters.txt") as file:
                file.write(overview + "\n")
        return state

    def _repeat_evaluation(self, state: TrainState, metrics: metric_log.MetricLog) -> None:
        """Repeats the validation in which the previous process was interrupted."""
        number = int(state.step)
        self.progress.evaluation_due = False
        finished = self._evaluate(state, number, metrics)
        self.last.replace(state, self.progress.to_json())  # its metadata lack the results
        self._wait()
        if not finished:
            raise Stopped(self._saved(number))

    def _evaluate(self, state: TrainState, number: int, metrics: metric_log.MetricLog) -> bool:
        """Validates; returns False if a signal interrupts it, and the next run repeats it."""
        setup, progress = self.setup, self.progress
        if self.evaluator is None:
            return True

        try:
            scores = self.evaluator.scores(state.variables)
        except Stopped:
            progress.evaluation_due = True
            return False
        thresholds = scores.thresholds()
        summary = scores.report(thresholds, self.parents).summary
        values = {name: value for name, value in summary.items() if isinstance(value, float)}
        metrics.write(number, {f"val/{name}": value for name, value in values.items()})
        progress.metrics, progress.thresholds = values, np.asarray(thresholds).tolist()
        progress.validated_step = number
        auc = values.get("auc")
        if auc is not None and (progress.best is None or auc >= progress.best):
            progress.best, progress.best_step = auc, number  # ties go to the later step
            self.best.save(state, progress.best_to_json())
        best = "the validation split is too small for an AUC"
        if progress.best is not None:
            best = f"best AUC {progress.best:.4f} at step {progress.best_step}"
        self.log.say(
            f"step {number} of {setup.total}: val AUC {_format(auc)}, "
            f"F1 {_format(values.get('f1'))}, {best}",
            step=number,
            **values,
        )
        return True

    def _finish(self, steps: int, rates: Mapping[str, float | None]) -> dict[str, Any]:
        setup, progress = self.setup, self.progress
        summary = {
            "workdir": self.address,
            "steps": setup.total,
            "parameters": setup.parameters,
            "val": progress.metrics,
            "best_val_auc": progress.best,
            "best_step": progress.best_step,
            "init": progress.init,
            "skipped_steps": progress.skipped[0],
            "devices": f"{setup.assembly.mesh.size} x {jax.devices()[0].device_kind}",
            **rates,
        }
        if _is_main() and (steps or not (setup.folder / "summary.json").exists()):
            files.write_json(setup.folder / "summary.json", summary)
        return summary

    def _measure_domain(self, state: TrainState) -> None:
        """Writes the out-of-domain statistics of the best checkpoint, or else of the last state.

        Raises:
          Stopped: by a signal; the next run starts them again.
        """
        setup, config = self.setup, self.setup.config
        # Boxes show lesions, not the body: `maknet predict` does not take such networks.
        if not config.domain_components or self.evaluator is None or setup.assembly.model.takes_box:
            return
        if self.copy and not _is_main():
            self.copy.download()  # the best checkpoint, which the first process has uploaded
        with contextlib.suppress(InputError):  # every one is damaged; other verbs use the last, too
            best = agreement.restore(self.best, setup.assembly.shapes).state
            state = state if best is None else sharding.put_state(setup.assembly.mesh, best)
        step, splits = int(state.step), (config.data.train_split, config.data.val_split)
        if not sharding.any_process(domain_file.read(setup.folder, step) is None):
            return

        try:
            measured = domain_fit.measure(
                [setup.dataset.source(name) for name in splits],
                setup.assembly.predict_features,
                state.variables,
                components=config.domain_components,
                drop_maxima=setup.assembly.model.pools_maxima,
                stop=lambda: bool(self.stop),
                batch_size=config.data.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                threads=config.data.threads,
            )
        except Stopped:
            raise Stopped(f"{self.address} is trained; run the same command to finish it") from None
        if measured is None:
            self.log.say("too few patients for out-of-domain statistics: predictions are unchecked")
        elif _is_main():
            domain_file.write(setup.folder, domain_file.Statistics(*measured), step)


def _check_finite(loss: jax.Array, number: int) -> None:
    if not np.isfinite(loss):
        raise InputError(
            f"the loss is {float(loss)} at step {number}: lower optimizer.learning_rate and choose "
            "another --workdir"
        )


def _format(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
