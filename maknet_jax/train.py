"""`maknet train`: the one training loop. What is learned is decided by the config.

Step N takes batch N of an order that follows from the seed, and the checkpoint named N holds the
state after N updates: a run that was stopped goes on as if it had not been, bit for bit on the same
devices. (On GPUs that needs XLA_FLAGS=--xla_gpu_deterministic_ops=true; seen on CPU only.)
"""

import contextlib
import functools
import pathlib
import signal
import time

import jax
import numpy as np
from clu import parameter_overview

from maknet_jax import console, files
from maknet_jax.data import pipeline, pseudo_labels, records
from maknet_jax.errors import InputError, Stopped
from maknet_jax.evaluation.evaluator import Evaluator
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir
from maknet_jax.training import checkpoint, log, sharding, state, step, transfer

# What may differ when a run goes on: it changes no number.
FREE = {"data.path", "data.threads", "pseudo.path"}


def train(config, folder, *, devices=None):
    """Trains, or goes on training, in `folder`.

    Args:
      config: a locked config, see `configs/teacher.py`.
      folder: the workdir; made, or continued where it holds a run of the same config and data.
      devices: the devices to train on; None takes all.

    Returns:
      The summary (also in `summary.json`).

    Raises:
      InputError: the data do not fit the config, or the workdir is another run's.
      Stopped: SIGTERM or SIGINT; the state is saved.
    """
    folder = pathlib.Path(folder)
    dataset, mesh = records.open_dataset(config.data.path), sharding.data_mesh(devices)
    check(config, dataset, mesh.size)
    split = dataset.split(config.data.train_split)
    if not split["count"] or not len(dataset.vocabulary):
        raise InputError(f"{dataset.path} has no labelled record in {config.data.train_split}")
    run = _Run(config, folder, dataset, split, mesh)  # may refuse: nothing is written before
    main = jax.process_index() == 0
    _claim(folder, config, dataset, run.sources, write=main)
    log_file = folder / "log.jsonl" if main else None
    with console.Log(log_file) as say, _stop_flag() as stop, contextlib.closing(run):
        return run.loop(stop, say)


def check(config, dataset, devices):
    """Raises InputError where values of a config do not fit the data or so many devices."""
    if dataset.size != config.data.size:
        raise InputError(
            f"config data.size {config.data.size} is not the {dataset.size} of {dataset.path}: "
            "change one of them"
        )
    for name in ("epochs", "evaluate_every", "checkpoint_every", "log_every"):
        if not 0 < config[name] < 1e9:
            raise InputError(f"config {name} {config[name]} should be above 0 and below 1e9")
    values = {"seed": config.seed, "data.threads": config.data.threads}
    for name, value in (values | {"pseudo.balance": config.pseudo.balance}).items():
        if value < 0:
            raise InputError(f"config {name} {value} should be 0 or above")
    window = config.data.window
    if len(window) != 2 or not window[0] < window[1]:
        raise InputError(f"config data.window {tuple(window)} should be (low, high) in HU")
    if not 0 <= config.ema_decay < 1:
        raise InputError(f"config ema_decay {config.ema_decay} should be 0 or above and below 1")
    sizes = {"data": config.data.batch_size}
    if config.pseudo.path:
        sizes["pseudo"] = config.pseudo.batch_size
    for name, size in sizes.items():
        if size < 1 or size % devices:
            rule = f"above 0 and a multiple of the {devices} device(s)"
            raise InputError(f"config {name}.batch_size {size} should be {rule}")


def _claim(folder, config, dataset, sources, *, write):
    wanted = configs.to_json(config)
    claimed = (folder / "config.json").exists()
    if not claimed and files.holds_other(folder, "dataset.json"):  # killed between the two
        raise InputError(f"{folder} is no workdir of `maknet train`: choose a new --workdir")
    about = {"labels": dataset.info["labels"], "size": dataset.size}
    about |= {"fingerprint": dataset.fingerprint, "path": str(dataset.path.absolute())}
    about["pseudo_labels"] = sources[1].fingerprint if config.pseudo.path else None
    if claimed:
        before = configs.from_json(files.read_json(folder / "config.json"))
        before = _flatten(configs.to_json(before))  # with the fields that were added since
        now = _flatten(wanted)
        for key in sorted((before | now).keys() - FREE):
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{folder} holds a run with {key} {before.get(key)}, not {now.get(key)}: "
                    "choose another --workdir or the same config"
                )
        before = {"pseudo_labels": None} | files.read_json(folder / "dataset.json")
        for name, path in (("fingerprint", dataset.path), ("pseudo_labels", config.pseudo.path)):
            if before[name] != about[name]:
                raise InputError(
                    f"{folder} was trained on other data than {path or 'labelled images only'}: "
                    "choose another --workdir or the same data"
                )
    sharding.wait_for_all("looked")  # before the first one writes
    if write:
        files.write_json(folder / "dataset.json", about)
        files.write_json(folder / "config.json", wanted)
    sharding.wait_for_all("claimed")


def _flatten(node, prefix=""):
    if not isinstance(node, dict):
        return {prefix: node}
    parts = [_flatten(child, f"{prefix}.{key}".strip(".")) for key, child in node.items()]
    return {key: value for part in parts for key, value in part.items()}


@contextlib.contextmanager
def _stop_flag():
    """Yields a list that a signal fills; the loop looks at it between two steps."""
    caught, before = [], {}

    def note(number, _):
        if not caught:
            console.say_from_signal("stopping after this step; its state will be saved")
        caught.append(number)

    with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:  # too late to stop this run, but not what comes after it
        signal.raise_signal(caught[0])


class _BrokenOff(Exception):
    """A signal came while the validation split was scored."""


class _Run:
    """One run: what it is made of, and its loop."""

    def __init__(self, config, folder, dataset, split, mesh):
        self.config, self.folder, self.mesh = config, folder, mesh
        self.main = jax.process_index() == 0  # of several processes only this one writes logs
        self.epoch_steps = split["count"] / config.data.batch_size  # epochs of labelled images
        self.total = max(1, round(config.epochs * self.epoch_steps))
        self.sources = [dataset.source(config.data.train_split)]
        self.batch_sizes = [config.data.batch_size]
        frequencies = [np.asarray(split["label_counts"]) / split["count"]]
        if config.pseudo.path:
            pseudo = pseudo_labels.PseudoSource(
                config.pseudo.path,
                size=dataset.size,
                names=dataset.vocabulary.names,
                balance=config.pseudo.balance,
                seed=config.seed,
            )
            self.sources.append(pseudo)
            self.batch_sizes.append(config.pseudo.batch_size)
            frequencies.append(pseudo.label_counts / len(pseudo))
        self.images = sum(self.batch_sizes)  # of a step
        self.parents, exclusive = dataset.vocabulary.parents, dataset.vocabulary.exclusive
        model = workdir.build_model(config, len(dataset.vocabulary))
        step.box_of(model, pipeline.to_fields(self.sources[-1][0], 0).get("box"))  # may refuse
        optimizer = workdir.build_optimizer(config, self.total)
        # A label's weights in the loss follow from its share in the batches.
        share = np.average(frequencies, axis=0, weights=self.batch_sizes)
        loss = workdir.build_loss(config, share * split["count"], split["count"], exclusive)
        keeps = {"size": config.data.size, "ema": config.ema_decay > 0}
        self.shapes = state.shapes(model, optimizer, **keeps)
        place, start = self._start_from(dataset.vocabulary)
        self.create = functools.partial(state.create, model, optimizer, place=place, **keeps)
        self.parameters = int(parameter_overview.count_parameters(self.shapes.params))
        self.train_step = workdir.jit_train(config, model, optimizer, loss, mesh)
        self.evaluator = None
        if dataset.info["splits"].get(config.data.val_split, {"count": 0})["count"]:
            self.evaluator = Evaluator(
                dataset.source(config.data.val_split),
                workdir.make_predict(workdir.jit_predict(config, model, mesh), mesh),
                batch_size=config.data.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                threads=config.data.threads,
            )
        self.last = self.best = None
        self.meta = dict.fromkeys(("best", "best_step", "thresholds"))
        self.meta |= {"metrics": {}, "init": start}

    def _start_from(self, vocabulary):
        """(what places the weights of init.path, what they are); Nones where none are needed."""
        init, last = self.config.init, self.folder / workdir.FOLDERS["last"]
        if not init.path or any(path.name.isdigit() for path in last.glob("*")):
            return None, None  # random, or going on from a checkpoint
        params, batch_stats, about = workdir.open_weights(
            init.path, vocabulary=vocabulary if init.head else None
        )

        def place(variables):
            return transfer.place(variables, params, batch_stats, head=init.head)[0]

        # On shapes already: weights that do not fit are refused before anything is written.
        own = {"params": self.shapes.params, "batch_stats": self.shapes.batch_stats}
        _, placed, fresh = transfer.place(own, params, batch_stats, head=init.head)
        parts = sorted({name.split("/")[1] for name in fresh})
        return place, about | {"placed": len(placed), "fresh": parts}

    def close(self):
        """Ends the checkpoints' threads."""
        for checkpoints in (self.last, self.best):
            if checkpoints is not None:
                checkpoints.close()

    def loop(self, stop, say):
        """Trains to the end; returns the summary."""
        config, total, self.say = self.config, self.total, say
        self.last = checkpoint.Checkpoints(self.folder / workdir.FOLDERS["last"])
        self.best = checkpoint.Checkpoints(self.folder / workdir.FOLDERS["best"], keep=1)
        current, pending = self._resume()
        first = int(current.step)
        key = jax.random.key(config.seed + 1)
        batches = pipeline.mixed_batches(
            self.sources,
            self.batch_sizes,
            seed=config.seed,
            start=first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
        )
        every = max(1, round(config.evaluate_every * self.epoch_steps))
        began = started = time.perf_counter()
        done = first
        with (
            contextlib.closing(
                log.MetricLog(self.folder if self.main else None, step=first)
            ) as metrics,
            console.progress("train", total, done=first) as advance,
        ):
            if self.meta.pop("evaluation_due", False):
                finished = self._evaluate(current, first, metrics, stop)
                self.last.discard(first)  # its meta lacks what was found now
                self.last.save(current, self.meta | {"pending": pending})
                if not finished:
                    raise Stopped(f"step {first} of {total} is saved in {self.folder}")
            for number in range(first + 1, total + 1):
                batch = sharding.put_batch(self.mesh, next(batches))
                current, values = self.train_step(current, batch, key)
                if pending:  # one step in flight: the host never runs far ahead of the device
                    jax.block_until_ready(pending[-1])
                pending.append(values)
                advance()
                at_end = number == total
                evaluating = number % every == 0 or at_end
                stopping = sharding.any_process(bool(stop))
                saving = evaluating or stopping or number % config.checkpoint_every == 0
                if (saving or number % config.log_every == 0) and not np.isfinite(values["loss"]):
                    raise InputError(
                        f"the loss is {float(values['loss'])} at step {number}: lower "
                        "optimizer.learning_rate and choose another --workdir"
                    )
                if number % config.log_every == 0 or at_end:
                    means = log.averages(pending)
                    now = time.perf_counter()
                    rate = (number - done) * self.images / (now - started)
                    means["images_per_second"] = rate
                    metrics.write(number, {f"train/{k}": v for k, v in means.items()})
                    advance(0, f"loss {means['loss']:.4f}, {rate:.1f} images/s")
                    pending, started, done = [], now, number
                if evaluating:
                    paused = time.perf_counter()
                    stopping |= not self._evaluate(current, number, metrics, stop)
                    started += time.perf_counter() - paused
                if saving:
                    # Steps that no line of metrics holds yet: a restart must not lose them.
                    waiting = [{k: float(v) for k, v in values.items()} for values in pending]
                    self.last.save(current, self.meta | {"pending": waiting})
                if stopping and (not at_end or "evaluation_due" in self.meta):
                    self.say.event(message=f"stopped at step {number} of {total}", step=number)
                    raise Stopped(
                        f"step {number} of {total} is saved in {self.folder}; the same command "
                        "goes on"
                    )
        return self._finish(int(current.step) - first, time.perf_counter() - began)

    def _resume(self):
        kept, meta, damaged = self.last.restore(self.shapes)
        for number in damaged:
            self.last.set_aside(number)
        sharding.wait_for_all("set aside")
        for number, reason in damaged.items():
            self.say.say(f"checkpoint {number} is damaged and set aside: {reason}")
        if self.evaluator is None:
            self.say.say(f"no {self.config.data.val_split!r} examples: no validation, no best")
        if kept is None:
            self.say.say(
                f"{self.config.model.name}: {self.parameters:,} parameters, "
                f"{self.total} steps of {self.images} images on {self.mesh.size} "
                f"{jax.devices()[0].device_kind} device(s)",
                parameters=self.parameters,
            )
            kept = self.create(seed=self.config.seed)
            if start := self.meta["init"]:
                self.say.say(
                    f"starting from {start['path']}: {start['placed']} arrays placed, fresh: "
                    f"{', '.join(start['fresh']) or 'nothing'}",
                    init=start,
                )
            overview = parameter_overview.get_parameter_overview(kept.params)
            if self.main:
                with files.write_whole(self.folder / "parameters.txt") as file:
                    file.write(overview + "\n")
        else:
            self.meta = self.meta | meta
            self.say.say(f"going on from step {int(kept.step)} of {self.total}")
        newer = [number for number in self.best.steps() if number > int(kept.step)]
        for number in newer:  # the run will come to it again
            self.best.discard(number)
        if not self.best.steps():
            self.meta |= {"best": None, "best_step": None}
        return sharding.put_state(self.mesh, kept), self.meta.pop("pending", [])

    def _evaluate(self, current, number, metrics, stop):
        """Validates; False where a signal broke it off, to be made up for by the next run."""
        if self.evaluator is None:
            return True

        def look_up(_):
            # Several processes score in step: there a signal waits for the end of it.
            if stop and jax.process_count() == 1:
                raise _BrokenOff

        try:
            scores = self.evaluator.scores(current.variables, look_up)
        except _BrokenOff:
            self.meta = self.meta | {"evaluation_due": True}
            return False
        thresholds = scores.thresholds()
        summary = scores.report(thresholds, self.parents).summary
        values = {k: v for k, v in summary.items() if isinstance(v, float)}
        metrics.write(number, {f"val/{name}": value for name, value in values.items()})
        self.meta = self.meta | {"metrics": values, "thresholds": np.asarray(thresholds).tolist()}
        auc, best = values.get("auc"), self.meta["best"]
        if auc is not None and (best is None or auc >= best):  # of equal ones the longer trained
            self.meta |= {"best": auc, "best_step": number}
            self.best.save(current, self.meta)
        best = "the validation split is too small to score"
        if self.meta["best"] is not None:
            best = f"best AUC {self.meta['best']:.4f} at step {self.meta['best_step']}"
        self.say.say(
            f"step {number} of {self.total}: val AUC {_shown(auc)}, F1 {_shown(values.get('f1'))}, "
            f"{best}",
            step=number,
            **values,
        )
        return True

    def _finish(self, steps, seconds):
        summary = {
            "workdir": str(self.folder),
            "steps": self.total,
            "parameters": self.parameters,
            "val": self.meta["metrics"],
            "best_val_auc": self.meta["best"],
            "best_step": self.meta["best_step"],
            "init": self.meta["init"],
            "devices": f"{self.mesh.size} x {jax.devices()[0].device_kind}",
            "images_per_second": steps * self.images / seconds if steps else None,
        }
        if self.main and (steps or not (self.folder / "summary.json").exists()):
            files.write_json(self.folder / "summary.json", summary)
        return summary


def _shown(value):
    return "undefined" if value is None else f"{value:.4f}"
