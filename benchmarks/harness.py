"""Shared by the benchmarks: options, `Network`, the printed table and the JSON.

A benchmark parses with `parser` and `parse`, measures (see `timing.py`), and ends with `report`,
which prints a table and writes the JSON. `run` makes it a command.
"""

import argparse
import contextlib
import datetime
import inspect
import json
import os
import pathlib
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import maknet_jax
from maknet_jax import console, files
from maknet_jax.cli import exit_codes, options
from maknet_jax.errors import InputError, Stopped
from maknet_jax.model_table import CONFIGS
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import sharding, state

LABELS = 115  # body parts in LesaNet's vocabulary
EXAMPLES = 17_697  # training lesions of the paper
BENCHMARKS = pathlib.Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"  # in git: the results that RESULTS.md quotes
OUT = BENCHMARKS / "out"  # ignored by git


def run(main: Callable[[], int | None]) -> None:
    """Runs a benchmark as a command, with the settings and exit codes of `maknet train`."""
    options.keep_freed_memory()
    options.start_jax()
    sys.exit(exit_codes.exit_code(_repository_path(inspect.getfile(main)), main))


def _repository_path(file: str) -> str:
    """The path of a benchmark relative to the repository root, as a user types it."""
    return pathlib.Path(file).resolve().relative_to(BENCHMARKS.parent).as_posix()


def command_parser(file: str, description: str | None) -> options.Parser:
    """Returns a parser without options.

    Args:
      file: the script's `__file__`.
      description: help text, usually the script's docstring.
    """
    return options.Parser(
        prog=_repository_path(file),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(
    file: str, description: str | None, *, size: bool = True, repeats: bool = True
) -> options.Parser:
    """Returns a parser with the options common to the benchmarks.

    Args:
      file: see `command_parser`.
      description: see `command_parser`.
      size: with --size, of the images.
      repeats: with --repeats, of what is timed.
    """
    result = command_parser(file, description)
    result.add_argument("--quick", action="store_true", help="small sizes, only to see it run")
    add_output_options(result)
    if size:
        result.add_argument("--size", type=options.count, help="pixels per side of the images")
    if repeats:
        result.add_argument(
            "--repeats", type=options.count, help="repetitions; medians are reported"
        )
    return result


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds --out and --record, which `report` reads."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out",
        type=pathlib.Path,
        help="JSON file to write (default: a file in benchmarks/out, which git ignores)",
    )
    place.add_argument(
        "--record", action="store_true", help="write to benchmarks/results, which is in git"
    )


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    full: Mapping[str, Any],
    quick: Mapping[str, Any],
) -> argparse.Namespace:
    """Parses arguments and fills in defaults.

    Args:
      parser: the parser.
      argv: the arguments; None for those of the process.
      full: defaults by option name.
      quick: defaults that replace those of `full` with --quick.

    Returns:
      The options, with `extent`: "quick", "full", or "partial" if an option differs from `full`.
    """
    chosen = parser.parse_args(argv)
    chosen.extent = "quick" if chosen.quick else "full"
    for name, value in ({**full, **quick} if chosen.quick else full).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
        elif getattr(chosen, name) != value and not chosen.quick:
            chosen.extent = "partial"
    chosen.cpu_seconds_at_start = _cpu_seconds()
    return chosen


@contextlib.contextmanager
def run_folder(
    folder: str | pathlib.Path | None, option: str = "--workdir"
) -> Iterator[pathlib.Path]:
    """Yields the folder for the runs: `folder`, or a temporary one if it is None.

    Args:
      folder: the value of `option`.
      option: the option that makes a run resumable, named in the error.

    Raises:
      Stopped: by a signal; says so if the temporary folder is lost.
    """
    if folder:
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="maknet-") as temporary:
        try:
            yield pathlib.Path(temporary)
        except Stopped:
            raise Stopped(f"nothing was saved: pass {option} to be able to resume") from None


def _cpu_seconds() -> tuple[float, float, float]:
    """(busy, total, this process) CPU seconds since boot; the first two are 0 except on Linux."""
    line = _read("/proc/stat").partition("\n")[0]
    ticks = [int(tick) / os.sysconf("SC_CLK_TCK") for tick in line.split()[1:9]]
    idle = sum(ticks[3:5])  # idle and iowait
    return sum(ticks) - idle, sum(ticks), sum(os.times()[:4])


def _share_of_other_work(start: tuple[float, float, float]) -> float | None:
    """Fraction of CPU time that other processes used since `start`; None if unknown."""
    busy, total, this_process = (
        now - before for now, before in zip(_cpu_seconds(), start, strict=True)
    )
    return max(0.0, (busy - this_process) / total) if total else None


def words(text: str) -> list[str]:
    """The type of a,b,c."""
    return text.split(",")


def counts(text: str) -> list[int]:
    """The type of 8,32,64."""
    return [options.count(part) for part in text.split(",")]


def seeds(text: str) -> list[int]:
    """The type of 5,6,7: integers from 0."""
    parts = words(text)
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} should be comma-separated integers from 0")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return numbers


def positive(text: str) -> float:
    """The type of numbers above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number above 0")
    return number


def precisions(text: str) -> list[str]:
    """The type of float32,bfloat16."""
    for part in words(text):
        if part not in ("float32", "bfloat16"):
            raise argparse.ArgumentTypeError(f"{part!r} should be float32 or bfloat16")
    return words(text)


def device() -> dict[str, Any]:
    """The device and the host that the numbers are measured on."""
    first = jax.devices()[0]
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    host = f"{model[1] if model else platform.machine()}, {options.cores()} cores"
    name = host if first.platform == "cpu" else f"{jax.device_count()} x {first.device_kind}"
    return {"name": name, "platform": first.platform, "count": jax.device_count(), "host": host}


def provenance(benchmark: str) -> dict[str, Any]:
    """The part of the JSON common to all benchmarks: name, device, versions and time."""
    versions = {"maknet_jax": maknet_jax.__version__, "jax": jax.__version__}
    return {
        "benchmark": benchmark,
        "device": device(),
        "versions": versions | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _read(name: str) -> str:
    path = pathlib.Path(name)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def config_of(network: str) -> tuple[str, str]:
    """(short name, config) of a network's name, a config's name or the path of a config."""
    return pathlib.Path(network).stem, CONFIGS.get(network, network)


def replicated_key(mesh: jax.sharding.Mesh) -> jax.Array:
    """A random key on all devices of a mesh, also of several processes."""
    whole = sharding.replicated(mesh)
    return jax.jit(lambda: jax.random.key(0), out_shardings=whole)()


class Network:
    """A network on random images, with the steps that `maknet train` compiles.

    Attributes:
      config: the network's config with the size, batch and precision of the benchmark.
      batch: a batch as the input pipeline yields it, NumPy arrays by name.
      label_counts: positives per label `[K]`, for the class weights of the loss.
      assembly: the model with its jitted steps, `build.Assembly`.
      state: the training state.
    """

    def __init__(
        self,
        network: str,
        *,
        size: int,
        batch_size: int,
        precision: str,
        place: state.Place | None = None,
        labels: int = LABELS,
        devices: Sequence[jax.Device] | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """Assembles the network.

        Args:
          network: a network's name, a config's name or the path of a config.
          size: pixels per side of the images.
          batch_size: images per step.
          precision: float32 or bfloat16.
          place: changes the initial variables, see `state.create`.
          labels: number of labels K.
          devices: devices of the mesh; all by default.
          changes: values of further fields of the config.

        Raises:
          InputError: `batch_size` is not a multiple of the number of devices.
        """
        values = {"data.size": size, "data.batch_size": batch_size, "precision": precision}
        overrides = [f"{name}={value}" for name, value in (values | dict(changes or {})).items()]
        self.config = configs.load(config_of(network)[1], overrides)
        rng = np.random.default_rng(0)
        self.batch = {
            "image": rng.integers(-1024, 1024, (batch_size, size, size, 3)).astype(np.int16),
            "labels": (rng.random((batch_size, labels)) < 0.05).astype(np.float32),
            "label_mask": np.ones((batch_size, labels), np.float32),
            "weight": np.ones(batch_size, np.float32),
            "index": np.arange(batch_size, dtype=np.int32),
        }
        self.label_counts = rng.integers(100, 5000, labels)
        mesh = sharding.data_mesh(devices)
        if batch_size % mesh.size:
            raise InputError(
                f"batch {batch_size} is not a multiple of the {mesh.size} devices: "
                "choose another batch size"
            )
        none_exclusive = np.zeros((labels, labels), bool)
        training = build.TrainingSet(1000, self.label_counts, EXAMPLES, none_exclusive)
        self.assembly = build.assemble(self.config, labels, mesh, training=training)
        if self.assembly.model.takes_box:
            corner = rng.uniform(0.2, 0.4, (batch_size, 2)) * size
            edges = rng.uniform(0.1, 0.4, (batch_size, 2)) * size
            self.batch["box"] = np.concatenate([corner, corner + edges], axis=1, dtype=np.float32)
        self.state = sharding.put_state(mesh, self.assembly.create(0, place))
        self._key = replicated_key(mesh)
        self._batch = sharding.put_batch(mesh, self.batch)
        self._prepared: tuple[Any, Any] | None = None  # the state, its variables for prediction

    def train(self) -> dict[str, jax.Array]:
        """Runs one training step and returns its metrics."""
        assert self.assembly.train_step is not None  # given a training set
        self.state, metrics = self.assembly.train_step(self.state, self._batch, self._key)
        return metrics

    def predict(self) -> jax.Array:
        """Logits `[B, K]` of the batch with the current weights."""
        batch = self._batch
        if self._prepared is None or self._prepared[0] is not self.state:
            prepared = self.assembly.prepare(self.state.variables)
            self._prepared = self.state, sharding.put_state(self.assembly.mesh, prepared)
        return self.assembly.predict_step(self._prepared[1], batch["image"], batch.get("box"))


def compact(document: Mapping[str, Any]) -> str:
    """JSON with one row per line, for readable diffs."""

    def nested(value: Any) -> bool:
        return isinstance(value, (dict, list)) and bool(value)

    lines = []
    for key, value in json.loads(json.dumps(document, allow_nan=False)).items():
        if isinstance(value, list) and any(map(nested, value)):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n  ]"
        elif isinstance(value, dict) and any(map(nested, value.values())):
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text = f"{{\n{rows}\n  }}"
        else:
            text = json.dumps(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def report(
    file: str,
    argv: Sequence[str] | None,
    chosen: argparse.Namespace,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    notes: Sequence[str],
    results: Mapping[str, Any],
) -> None:
    """Prints the table and its notes, and writes the JSON.

    Args:
      file: the benchmark's `__file__`.
      argv: its arguments; None for those of the process.
      chosen: the parsed options.
      header: column titles.
      rows: cells of the table.
      notes: lines to print below the table.
      results: entries of the JSON besides provenance, command and settings.
    """
    settings = {key: value for key, value in vars(chosen).items() if key not in ("out", "record")}
    other_work = _share_of_other_work(settings.pop("cpu_seconds_at_start"))
    name, measured_on = pathlib.Path(file).stem, device() | {"share_of_other_work": other_work}
    command = ["python", _repository_path(file), *(sys.argv[1:] if argv is None else argv)]
    print(f"{name} on {measured_on['name']}, jax {jax.__version__}, ", end="")
    print(f"Python {platform.python_version()}\n")
    print(console.format_table(header, rows))
    print("\n" + "\n".join(notes))
    if other_work is not None and other_work > 0.05:
        print(f"other processes used {other_work:.0%} of the CPU time: do not quote these timings")
    slug = re.sub(r"[^a-z0-9]+", "-", measured_on["name"].lower()).strip("-")
    # Quick and partial results never overwrite full ones.
    extent = "" if chosen.extent == "full" else f"-{chosen.extent}"
    path = chosen.out or (RESULTS if chosen.record else OUT) / f"{name}{extent}-{slug}.json"
    document = provenance(name) | {"device": measured_on, "command": shlex.join(command)}
    with files.write_whole(path) as output:
        output.write(compact(document | {"settings": settings} | dict(results)))
    print(f"\nwritten: {path}")
