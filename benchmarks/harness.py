"""What the benchmarks share: options, the steps of `maknet train`, turns, tables and JSON."""

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import maknet_jax
from maknet_jax import console, files
from maknet_jax.cli import exit_codes, options
from maknet_jax.errors import InputError, Stopped
from maknet_jax.model_table import CONFIGS
from maknet_jax.runs import build
from maknet_jax.runs import config as configs
from maknet_jax.training import sharding

LABELS = 115  # body parts of LesaNet's vocabulary
EXAMPLES = 17_697  # training lesions of the paper
HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"


def run(main):
    """Runs a benchmark as a command, with the exit codes of `maknet`; programs are cached."""
    options.start_jax()
    sys.exit(exit_codes.exit_code(f"benchmarks/{pathlib.Path(sys.argv[0]).name}", main))


def _shown(file):
    """The path of a benchmark in the repository, as a user types it."""
    return pathlib.Path(file).resolve().relative_to(HERE.parent).as_posix()


def parser(file, text):
    """A parser with the options that every benchmark has; `file` is the benchmark's __file__."""
    result = options.Parser(
        prog=_shown(file),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    result.add_argument("--out", type=pathlib.Path, help="JSON (default: benchmarks/results/...)")
    result.add_argument("--size", type=options.count, help="edge of the images")
    result.add_argument("--repeats", type=options.count, help="turns, of which medians are shown")
    return result


def parse(made, argv, *, full, quick):
    """Parses; what was not given comes from `full`, or with --quick from `quick` where it is.

    `extent` of the result is "quick", "full", or "partial" where another value than in `full` was
    given.
    """
    chosen = made.parse_args(argv)
    chosen.extent = "quick" if chosen.quick else "full"
    for name, value in (full | quick if chosen.quick else full).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
        elif getattr(chosen, name) != value and not chosen.quick:
            chosen.extent = "partial"
    chosen.began = _ticks()
    return chosen


@contextlib.contextmanager
def kept(folder, option="--workdir"):
    """The folder that was named by an option, or a temporary one, of which a stop keeps nothing."""
    if folder:
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="maknet-") as temporary:
        try:
            yield pathlib.Path(temporary)
        except Stopped:
            raise Stopped(f"nothing is kept without {option}: begin again") from None


def _ticks():
    """(busy, all, our) seconds of all cores since the start; zeros for the first two off Linux."""
    line = _read("/proc/stat").partition("\n")[0]
    ticks = [int(tick) / os.sysconf("SC_CLK_TCK") for tick in line.split()[1:9]]
    idle = sum(ticks[3:5])  # and waiting for the disk
    return sum(ticks) - idle, sum(ticks), sum(os.times()[:4])


def _others_share(began):
    """The share of the cores that other work took since `began`, or None where nobody counts."""
    busy, total, ours = (now - then for now, then in zip(_ticks(), began, strict=True))
    return max(0.0, (busy - ours) / total) if total else None


def words(text):
    """The type of a,b,c."""
    return text.split(",")


def counts(text):
    """The type of 8,32,64."""
    return [options.count(part) for part in text.split(",")]


def seeds(text):
    """The type of 5,6,7: whole numbers from 0."""
    found = words(text)
    if not all(part.isdecimal() for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} should be whole numbers from 0, with commas")
    return [int(part) for part in found]


def precisions(text):
    """The type of float32,bfloat16."""
    for part in text.split(","):
        if part not in ("float32", "bfloat16"):
            raise argparse.ArgumentTypeError(f"{part!r} should be float32 or bfloat16")
    return text.split(",")


def device():
    """What the numbers were measured on."""
    first = jax.devices()[0]
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    cpu = f"{cpu[1] if cpu else platform.machine()}, {options.cores()} cores"
    name = cpu if first.platform == "cpu" else f"{jax.device_count()} x {first.device_kind}"
    return {"name": name, "platform": first.platform, "count": jax.device_count(), "host": cpu}


def provenance(benchmark):
    """What the JSON of every benchmark says: its name, the device, versions and the time."""
    versions = {"maknet_jax": maknet_jax.__version__, "jax": jax.__version__}
    return {
        "benchmark": benchmark,
        "device": device(),
        "versions": versions | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _read(path):
    path = pathlib.Path(path)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def page_of(network):
    """A network's name, the name of a config page or the path of one -> (short name, page)."""
    return pathlib.Path(network).stem, CONFIGS.get(network, network)


class Network:
    """A page's network on random images: the very steps that `maknet train` compiles.

    Attributes:
      config: the page, with the benchmark's size, batch and precision.
      batch: what the pipeline would give, NumPy arrays.
      label_counts: `[K]`, of which the loss' class weights are made.
      assembly: the network with its steps, `build.Assembly`.
      state: the state of the training.
    """

    def __init__(
        self, network, *, size, batch_size, precision, place=None, labels=LABELS, devices=None
    ):
        """Args: place: see `state.create`; labels: K; devices: default all; the rest: the page."""
        changes = {"data.size": size, "data.batch_size": batch_size, "precision": precision}
        page = page_of(network)[1]
        self.config = configs.load(page, [f"{name}={value}" for name, value in changes.items()])
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
            raise InputError(f"batch {batch_size} is no multiple of the {mesh.size} devices")
        none_exclusive = np.zeros((labels, labels), bool)
        training = build.TrainingSet(1000, self.label_counts, EXAMPLES, none_exclusive)
        self.assembly = build.assemble(self.config, labels, mesh, training=training)
        if self.assembly.model.takes_box:
            corner = rng.uniform(0.2, 0.4, (batch_size, 2)) * size
            edges = rng.uniform(0.1, 0.4, (batch_size, 2)) * size
            self.batch["box"] = np.concatenate([corner, corner + edges], axis=1, dtype=np.float32)
        self.state = sharding.put_state(mesh, self.assembly.create(0, place))
        self._key = sharding.put_state(mesh, jax.random.key(0))
        self._batch = sharding.put_batch(mesh, self.batch)

    def train(self):
        """One update; returns the step's metrics."""
        self.state, metrics = self.assembly.train_step(self.state, self._batch, self._key)
        return metrics

    def predict(self):
        """Logits `[B, K]` of the batch, in the state's weights."""
        batch = self._batch
        variables = self.state.variables
        return self.assembly.predict_step(variables, batch["image"], batch.get("box"))


def matmul(precision):
    """(call, FLOPs): a square product, large enough to keep the device busy."""
    edge = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (edge, edge), precision)
    product = jax.jit(jnp.dot)
    return functools.partial(product, a, a), 2 * edge**3


def elapsed(call, calls):
    """Seconds that `calls` calls take, all results waited for."""
    began = time.perf_counter()
    for _ in range(calls):
        result = call()
        if jax.default_backend() == "cpu":  # else independent calls would share the cores
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return time.perf_counter() - began


def timer(run, *, at_least=0.5):
    """A function that gives seconds per call.

    Args:
      run: run(calls) -> seconds; it is run once to compile and once to see how long it takes.
      at_least: seconds that each of its turns should last, so that the clock and the queue are
        small beside it.
    """
    run(1)
    calls = max(1, math.ceil(at_least / run(1)))
    return lambda: run(calls) / calls


def take_turns(timers, repeats):
    """name -> `repeats` times, taken in turns: a slow minute of the machine slows all of them."""
    seconds = {name: [] for name in timers}
    for _ in range(repeats):
        for name, measure in timers.items():
            seconds[name].append(measure())
    return seconds


def spread(values):
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rates(amount, seconds):
    """The spread of amount / seconds."""
    return spread([amount / value for value in seconds])


def ratios(slow, fast):
    """The spread of how many times faster `fast` is, turn by turn."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def shown(values, unit=""):
    """`spread` in a cell of a table."""
    ordered = (values[name] for name in ("median", "low", "high"))
    median, low, high = (f"{v:,.0f}{unit}" if v >= 999.5 else f"{v:.3g}{unit}" for v in ordered)
    return median if low == high else f"{median} ({low} to {high})"


def compact(document):
    """JSON with one row per line, because results are read in diffs too."""

    def nested(value):
        return isinstance(value, (dict, list)) and value

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


def report(file, argv, chosen, header, rows, notes, results):
    """Prints the table and its notes, and writes the JSON.

    Args:
      file: the benchmark's __file__.
      argv: its arguments.
      chosen: the parsed options.
      header: of the table.
      rows: of the table.
      notes: lines to print below it.
      results: what the JSON holds beside the machine, versions and settings.
    """
    settings = {key: value for key, value in vars(chosen).items() if key != "out"}
    others = _others_share(settings.pop("began"))
    name, about = pathlib.Path(file).stem, device() | {"share_of_other_work": others}
    command = ["python", _shown(file), *(sys.argv[1:] if argv is None else argv)]
    print(f"{name} on {about['name']}, jax {jax.__version__}, Python {platform.python_version()}\n")
    print(console.format_table(header, rows))
    print("\n" + "\n".join(notes))
    if others is not None and others > 0.05:
        print(f"other work took {others:.0%} of the cores meanwhile: no numbers to quote")
    slug = re.sub(r"[^a-z0-9]+", "-", about["name"].lower()).strip("-")
    # Others than the full ones never go in their place.
    extent = "" if chosen.extent == "full" else f"-{chosen.extent}"
    path = chosen.out or RESULTS / f"{name}{extent}-{slug}.json"
    document = provenance(name) | {"device": about, "command": shlex.join(command)}
    with files.write_whole(path) as file:
        file.write(compact(document | {"settings": settings} | results))
    print(f"\nwritten: {path}")
