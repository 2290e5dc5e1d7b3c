"""`maknet plan`: what a training run would cost on a TPU or a GPU, without having one."""

import dataclasses
import pathlib
import time
from typing import Any

from ml_collections import ConfigDict

from maknet_jax import console, files
from maknet_jax.data import object_store, pipeline, records
from maknet_jax.errors import InputError
from maknet_jax.planning import chips, compiled

SCALES = (8, 64, 256)  # chips
DEEPLESION = (compiled.EXAMPLES, 115)  # images and labels of the paper's training set
LOADER_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of a training run.

    Attributes:
      topology: such as v5e:4x4.
      network: name of the model.
      size: pixels per side of the images.
      batch: images per chip and step.
      chips: number of chips of the topology.
      images: labelled images of an epoch.
      labels: number of labels.
      costs: of one step per chip; None if it does not fit.
      step_seconds: roofline time of a step, all-reduces included; a lower bound.
      images_per_second: of all chips at that time; an upper bound.
      hours: of the recipe at that rate; a lower bound.
      efficiency: chips -> share of the time of a step that is not spent in all-reduces, if nothing
        overlaps; empty for a topology of one chip, whose program has no all-reduces.
      loader: images/s that this host's loader delivered, or None if it was not measured.
    """

    topology: str
    network: str
    size: int
    batch: int
    chips: int
    images: int
    labels: int
    costs: compiled.Costs | None
    step_seconds: float = 0.0
    images_per_second: float = 0.0
    hours: float = 0.0
    efficiency: dict[int, float] = dataclasses.field(default_factory=dict)
    loader: float | None = None


def plan(
    config: ConfigDict,
    topology: str,
    *,
    batch: int | None = None,
    images: int | None = None,
    labels: int | None = None,
    out: str | pathlib.Path | None = None,
) -> Plan:
    """Compiles the training step of a config for absent chips and estimates the run.

    Nothing runs on the chips: times are roofline bounds of the compiled program, and all-reduces
    are estimated from the figures of the makers.

    Args:
      config: a locked config of `maknet train`.
      topology: v5e:4x4, v6e:2x2 (TPU) or h100:8, h200:4x8 (GPU), see `compiled.devices_of`.
      batch: images per chip; None divides those of the config among the chips.
      images: labelled images of an epoch; None takes those of `data.path`, or DeepLesion's.
      labels: number of labels; None likewise.
      out: a JSON file to write.

    Raises:
      InputError: the topology is invalid, its compiler is not installed, or the batch cannot be
        divided among the chips.
    """
    chip, devices = chips.of_topology(topology), compiled.devices_of(topology)
    per_step = config.data.batch_size + config.pseudo.batch_size * bool(config.pseudo.path)
    if batch is None:
        if per_step % len(devices):
            raise InputError(
                f"the {per_step} images per step of the config cannot be divided among "
                f"{len(devices)} chips: pass --batch, images per chip"
            )
        batch = per_step // len(devices)
    dataset = _dataset(config)
    if dataset is not None:
        images = images or dataset.split(config.data.train_split)["count"]
        labels = labels or len(dataset.vocabulary)
    images, labels = images or DEEPLESION[0], labels or DEEPLESION[1]
    result = Plan(
        topology=topology,
        network=config.model.name,
        size=config.data.size,
        batch=batch,
        chips=len(devices),
        images=images,
        labels=labels,
        costs=compiled.compile_step(config, "train", batch, topology, labels=labels),
        # Of a data set in an object store, only the description is copied.
        loader=_loader_rate(config, dataset) if dataset and not dataset.url else None,
    )
    if result.costs is not None:
        result = _with_times(result, chip, config.epochs * per_step / config.data.batch_size)
    if out is not None:
        document: dict[str, Any] = dataclasses.asdict(result)
        files.write_json(pathlib.Path(out), document)
    return result


def _dataset(config: ConfigDict) -> records.Dataset | None:
    """The data set of a config; None where the path does not exist."""
    if object_store.is_url(config.data.path):
        return records.open_dataset(config.data.path)
    path = pathlib.Path(config.data.path)
    return records.open_dataset(path) if (path / "dataset.json").is_file() else None


def _loader_rate(config: ConfigDict, dataset: records.Dataset) -> float:
    """Images per second that the loader of this host delivers, after the first batches."""
    batches = pipeline.train_batches(
        dataset.source(config.data.train_split),
        batch_size=config.data.batch_size,
        seed=config.seed,
        threads=config.data.threads,
    )
    for _ in range(3):  # threads start, buffers fill
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < LOADER_SECONDS:
        count += len(next(batches)["index"])
    return count / (time.perf_counter() - start)


def _with_times(result: Plan, chip: chips.Chip, epochs: float) -> Plan:
    """Adds times and efficiencies to a plan whose program fits."""
    costs = result.costs
    assert costs is not None
    alone = costs.seconds(chip)
    count, size = costs.allreduces, costs.allreduce_bytes

    def step(number: int) -> float:
        return alone + chips.allreduce_seconds(chip, number, size, count)

    seconds = step(result.chips)
    rate = result.batch * result.chips / seconds
    return dataclasses.replace(
        result,
        step_seconds=seconds,
        images_per_second=rate,
        hours=epochs * result.images / rate / 3600,
        efficiency={number: alone / step(number) for number in SCALES} if count else {},
    )


def describe(result: Plan) -> str:
    """The plan as text."""
    chip = chips.of_topology(result.topology)
    head = (
        f"{result.network} at {result.size} x {result.size} pixels, {result.labels} labels, "
        f"{result.batch} images per chip on {result.topology} "
        f"({console.plural(result.chips, 'chip')}), bfloat16"
    )
    costs = result.costs
    if costs is None:
        return f"{head}\ndoes not fit into the {chip.memory / 1e9:.0f} GB of a chip: lower --batch"
    parts = {
        "FLOPs": costs.flops / chip.flops,
        "bandwidth": costs.hbm_bytes / chip.bandwidth,
        "all-reduces": result.step_seconds - costs.seconds(chip),
    }
    bound = max(parts, key=lambda name: parts[name])
    rows = [
        ["memory", f"{costs.memory / 1e9:.2f} of {chip.memory / 1e9:.0f} GB per chip: fits"],
        ["FLOPs per step", f"{costs.flops / 1e9:,.0f} billion per chip"],
        ["main memory traffic", f"{costs.hbm_bytes / 1e9:.2f} GB per chip and step"],
        ["all-reduces", f"{costs.allreduces}, {costs.allreduce_bytes / 1e6:.1f} MB per step"],
        ["step, at least", f"{result.step_seconds * 1e3:.2f} ms, bound by {bound}"],
        ["images per second, at most", f"{result.images_per_second:,.0f}"],
        ["recipe, at least", f"{result.hours:.2f} h for {result.images:,} images per epoch"],
        *[["efficiency", "not estimated for one chip: choose a topology of several"]]
        * (not result.efficiency),
        *(
            [f"efficiency at {number} chips", f"{share:.1%} if all-reduces do not overlap"]
            for number, share in result.efficiency.items()
        ),
    ]
    if result.loader is None:
        rows.append(["loader", "not measured: data.path is not on this host"])
    else:
        need = result.images_per_second * min(1, chip.per_host / result.chips)
        enough = "enough" if result.loader >= need else "too slow: the chips would wait"
        rows.append(
            ["loader of this host", f"{result.loader:,.0f} images/s of {need:,.0f}: {enough}"]
        )
    note = (
        "counts of the compiled program; times are bounds from peak FLOPs and bandwidth: nothing "
        f"ran on a chip. Compiled in {costs.compile_seconds:.0f} s."
    )
    return "\n".join([head, console.format_table(["one step", "value"], rows), note])
