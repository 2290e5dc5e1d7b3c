"""Which images a verb explains, and the loop that does so batch by batch and can be resumed."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
import re

import jax
import numpy as np
from jax.tree_util import Partial

from maknet_jax import console, files
from maknet_jax.ct import preprocess, volumes
from maknet_jax.data import records
from maknet_jax.errors import InputError, Rejected
from maknet_jax.runs import workdir
from maknet_jax.training import sharding, transfer


@dataclasses.dataclass(frozen=True)
class Case:
    """One image: `records.Example`'s fields; no labels (length 0) where nobody knows them."""

    id: str
    image: np.ndarray
    labels: np.ndarray
    label_mask: np.ndarray
    meta: dict

    def truth(self, column):
        """Of a label: "true", "false", or "unknown" where its annotation is missing."""
        if not len(self.labels) or not self.label_mask[column]:
            return "unknown"
        return "true" if self.labels[column] else "false"

    @property
    def group(self):
        """Its patient, else its series: what makes it depend on other images."""
        if patient := re.search(r"(\d{6})_\d\d_\d\d", self.id):  # as DeepLesion names its files
            return patient[1]
        kept = self.meta.get("patient") or self.meta.get("series")
        return kept or self.id.rpartition(":")[0] or self.id


@dataclasses.dataclass(frozen=True)
class Picked:
    """A selection: what reads its images, and what it is.

    reads: a callable an image -> `Case`; raises Rejected(name of the input, reason).
    failures: (input, reason) of what could not even be listed.
    about: JSON: the same selection has the same.
    """

    reads: list
    failures: list
    about: dict


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained run as attributions see it, on the devices of this process.

    Computed in float32 on any device, products too: sums over a path of bfloat16 are not complete.
    `logit_fn` takes images in [0, 1], `to_input` makes them of HU.
    """

    name: str
    run: workdir.Run
    logit_fn: Partial
    to_input: object

    @property
    def about(self):
        """What the results depend on: name, checkpoint, step and the digest of the weights."""
        weights = transfer.digest(self.run.variables["params"], self.run.variables["batch_stats"])
        return [self.name, self.run.name, self.run.step, weights]

    def put(self, hu):
        """int16 HU `[B, S, S, 3]` -> float32 images on the devices, the batch split."""
        put = sharding.put_batch(self.run.mesh, {"image": np.asarray(hu)})
        return self.to_input(put["image"])

    def confidences(self, images):
        """`[B, K]` of images as `put` returns them."""
        return np.asarray(_confidences(self.logit_fn, images))


@jax.jit
def _confidences(logit_fn, images):
    return jax.nn.sigmoid(logit_fn(images))


def open_networks(folder, compare=None, *, checkpoint="best", devices=None):
    """The `Network` of a workdir, and that of `compare` beside it if given.

    `devices` are those of this process unless given.

    Raises:
      InputError: the second knows other labels or another size of images; a network that looks at
        more than the image.
    """
    devices = devices or jax.local_devices()
    networks = []
    for path in [folder, *([compare] if compare else [])]:
        run = workdir.open_run(path, checkpoint_name=checkpoint, devices=devices)
        if getattr(run.model, "takes_box", False):
            raise InputError(
                f"{path} is a {run.config.model.name}, which looks at a lesion's box beside the "
                "image: only networks that see the image alone can be explained"
            )
        model = run.model.clone(dtype=np.float32)

        def logits(variables, images, model=model):
            # Accelerators would round the factors of products, on the way back as well.
            with jax.default_matmul_precision("highest"):
                return model.apply(variables, images, train=False).logits.astype(np.float32)

        # A folder that is called round-1 says little without the one above it.
        name = f"{run.config.model.name} ({'/'.join(pathlib.Path(path).resolve().parts[-2:])})"
        name += " again" if name in [network.name for network in networks] else ""
        to_input = jax.jit(workdir.to_input(run.config))
        networks.append(Network(name, run, Partial(logits, run.variables), to_input))
    first, last = networks[0].run, networks[-1].run
    if (first.vocabulary.names, first.config.data.size) != (
        last.vocabulary.names,
        last.config.data.size,
    ):
        raise InputError(
            f"--compare {compare} has other labels or images than {folder}: compare networks that "
            "were trained on the same data"
        )
    return networks


def pick(
    run,
    folder,
    *,
    path=None,
    data=None,
    split=None,
    ids=None,
    labels=None,
    limit=None,
    png_window=None,
):
    """Selects images of a prepared split, or all slices of CT files.

    Args:
      run: a `workdir.Run`.
      folder: its workdir.
      path: a file or folder of CT; the id of a slice is SERIES:NUMBER, as in `maknet predict`.
      data: a prepared data set; None takes the one trained on.
      split: of the data set.
      ids: only these.
      labels: names; of a labelled split only images that have one of them.
      limit: so many at most.
      png_window: (low, high) HU of 8-bit PNGs.

    Raises:
      InputError: nothing is left, or an id is unknown.
    """
    columns = label_columns(run, labels)
    wanted = set(ids) if ids else None
    if (path is None) == (split is None):
        raise InputError("name a --split of the data, or files of CT: one of the two")
    if path is not None:
        reads, found, series, failures = _slices(run, path, wanted, png_window)
        about = {"path": str(path), "series": sorted({ref.key for ref in series})}
        about["digest"] = digest([[ref.key, ref.count, *sizes(ref.paths)] for ref in series])
        lacking = []
    else:
        reads, found, lacking, dataset = _records(run, folder, data, split, wanted, columns)
        about, failures = {"fingerprint": dataset.fingerprint, "split": split}, []
    unknown = sorted((wanted or set()) - set(found))
    if unknown:
        raise InputError(f"--ids {unknown[0]!r} is not among the images of {path or split}")
    if lacking:
        raise InputError(
            f"--ids {lacking[0]!r} is annotated with none of --labels {','.join(labels)}, which "
            "select the images too: leave one of the two out"
        )
    if not reads:
        why = f": {failures[0][0]}: {failures[0][1]}" if failures else ": check --ids and --labels"
        raise InputError(f"no image of {path or split} is left{why}")
    about |= {"ids": sorted(wanted or ()), "labels": list(labels or ()), "limit": limit}
    return Picked(reads[:limit], failures, about)


def digest(value):
    """16 digits that tell a JSON value from others."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def sizes(paths):
    """(name, bytes) of files, to see that they are others than before."""
    return [[path.name, path.stat().st_size] for path in map(pathlib.Path, paths)]


def label_columns(run, labels):
    """Names of labels -> their columns.

    Raises:
      InputError: a name is unknown.
    """
    index = run.vocabulary.index
    for name in labels or ():
        if name not in index:
            raise InputError(f"label {name!r} is unknown: the network has {', '.join(index)}")
    return [index[name] for name in labels or ()]


def _records(run, folder, data, split, wanted, columns):
    about = files.read_json(pathlib.Path(folder) / "dataset.json")
    dataset = records.open_dataset(data or about["path"])
    records.check_size(dataset, run.config.data.size)
    dataset.split(split)
    source, known = dataset.source(split), dataset.vocabulary.names == run.vocabulary.names

    def read(number):
        example = source[number]
        # Other labels than the network's say nothing about its own.
        labels, mask = (example.labels, example.label_mask) if known else (np.zeros(0),) * 2
        return Case(example.id, example.image, labels, mask, example.meta)

    numbers, found, lacking = range(len(source)), [], []
    if wanted or columns:  # else nothing needs to be read to choose
        chosen = []
        for number in numbers:
            case = read(number)
            if wanted and case.id not in wanted:
                continue
            found.append(case.id)
            if not columns or not len(case.labels) or case.labels[columns].any():
                chosen.append(number)
            elif wanted:
                lacking.append(case.id)
        numbers = chosen
    return [functools.partial(read, number) for number in numbers], found, lacking, dataset


def _slices(run, path, wanted, png_window):
    series, failures = volumes.find_series(path)
    size, none = run.config.data.size, np.zeros(0, np.uint8)

    @functools.lru_cache(maxsize=1)
    def load(ref):
        volume = volumes.load_series(ref, png_window=png_window)
        return volume, preprocess.body_threshold(volume.hu, png_window)

    def read(ref, number):
        try:
            volume, threshold = load(ref)
        except Rejected as error:
            raise Rejected(ref.paths[0], str(error)) from error
        around = preprocess.neighbours(volume.hu, number)
        image, crop = preprocess.make_triplet(around, size, threshold=threshold)
        file = ref.paths[0] if ref.kind == "nifti" else volume.slices[number]
        meta = {"file": file, "slice": number, "crop": crop, "kind": ref.kind}
        meta["shape"] = volume.hu.shape
        return Case(f"{ref.key}:{number}", image, none, none, meta)

    places = {f"{ref.key}:{number}": (ref, number) for ref in series for number in range(ref.count)}
    found = [key for key in places if not wanted or key in wanted]
    return [functools.partial(read, *places[key]) for key in found], found, series, failures


def explain(title, out, picked, settings, explain_batch, *, batch_size):
    """Runs `explain_batch` over a selection; what is done already is not done again.

    OUT/cases/00012.npz is one image's result, written whole: a killed run neither repeats nor loses
    one. Several processes share the images between them.

    Args:
      title: of the progress bar.
      out: the folder.
      picked: a `Picked`.
      settings: JSON of all that the results depend on; OUT/settings.json holds them to it.
      explain_batch: a dict number -> `Case` -> a list of (about, arrays).
      batch_size: images a step.

    Returns:
      (number -> path of the result, failures).

    Raises:
      InputError: `out` holds something else.
    """
    out = pathlib.Path(out)
    settings = json.loads(json.dumps(settings | {"selection": picked.about}))
    claim = out / "settings.json"
    if claim.is_file():
        before = files.read_json(claim)
        for key in sorted(settings.keys() | before.keys()):
            if before.get(key) != settings.get(key):
                raise InputError(
                    f"{out} holds results with {key} {before.get(key)}, not {settings.get(key)}: "
                    "choose another --out or the same settings"
                )
    elif files.holds_other(out):
        raise InputError(f"--out {out} holds something else: choose a new folder")
    sharding.wait_for_all("looked")
    if jax.process_index() == 0:
        files.write_json(claim, settings)
    names = {n: out / "cases" / f"{n:05d}.npz" for n in range(len(picked.reads))}
    mine = range(jax.process_index(), len(names), jax.process_count())
    todo = [number for number in mine if not names[number].exists()]
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        console.progress(title, len(mine), done=len(mine) - len(todo)) as advance,
    ):
        loading = [reader.submit(_read, picked, numbers) for numbers in batches[:1]]
        for place, numbers in enumerate(batches):
            cases, _ = loading.pop().result()
            # The next batch is read while this one is explained.
            loading += [reader.submit(_read, picked, more) for more in batches[place + 1 :][:1]]
            results = explain_batch(cases) if cases else []
            for number, result in zip(cases, results, strict=True):
                save(names[number], *result)
            advance(len(numbers))
    sharding.wait_for_all("explained")
    done = {number: path for number, path in names.items() if path.exists()}
    # Whichever process met them: what left no result is asked for its reason again.
    _, failures = _read(picked, [number for number in names if number not in done])
    failures = sorted({*picked.failures, *failures})
    if not done:
        if jax.process_index() == 0:
            claim.unlink(missing_ok=True)  # nothing came of these settings: others may
        raise InputError(f"no image could be read: {failures[0][0]}: {failures[0][1]}")
    return done, failures


def _read(picked, numbers):
    """(number -> `Case`, failures)."""
    cases, failures = {}, []
    for number in numbers:
        try:
            cases[number] = picked.reads[number]()
        except Rejected as error:
            failures.append(error.args if len(error.args) == 2 else (f"image {number}", str(error)))
    return cases, failures


def padded(cases, batch_size):
    """int16 HU `[batch_size, S, S, 3]`: the last image repeated where there are fewer."""
    images = [case.image for case in cases]
    return np.stack(images + images[-1:] * (batch_size - len(images)))


def save(path, about, arrays):
    """Writes one image's result whole: compressed arrays, and a dict as JSON."""
    with files.write_whole(path, "wb") as file:
        np.savez_compressed(file, about=json.dumps(about), **arrays)


def load_about(path):
    """The dict alone: arrays, which are large, are not decompressed."""
    with np.load(path) as stored:
        return json.loads(str(stored["about"]))


def load(path):
    """(about, arrays) as `save` wrote them."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "about"}
    return load_about(path), arrays
