r"""Sanity checks of attributions (Adebayo et al. 2018): do maps depend on weights and on labels?

    python benchmarks/experiments/attribution_sanity.py \
        --workdirs runs/maknet,runs/vgg16 --masks openkbp/train --folder runs/sanity
    python benchmarks/experiments/attribution_sanity.py --workdirs RUN --quick  # to see it run

A map that stays the same when the network is replaced by a random one shows the image, not what the
network learned. Here weights are randomised from the output to the input in five steps of equally
many layers (the values of each array are permuted, which keeps their distribution); and, with
--random-labels EPOCHS, the first network is trained again, with its own recipe but without noise,
on 500 of its training images, whose labels were permuted among them, so that it must memorise
them. For one label of one image per patient: the rank correlation (Spearman) of each map with the
original one in the body, of absolute and of signed values, and the mass inside the organ over its
share of the body. Integrated Gradients contain the image as a factor, so absolute values of
unrelated networks correlate, too; signed values should not.

Maps are of the logit, because a random network saturates the probability. Means over patients, 95 %
intervals by resampling patients. FOLDER/sanity.png shows one image per organ. Resumes in --folder,
training included.
"""

import argparse
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.tree_util import Partial
from scipy import stats

from benchmarks import harness
from benchmarks.experiments import organ_maps
from benchmarks.experiments.organ_maps import Row
from maknet_jax import console, files, train
from maknet_jax.attribution import perturbation
from maknet_jax.cli import options
from maknet_jax.data import records
from maknet_jax.explain import results
from maknet_jax.explain.network import Network
from maknet_jax.explain.options import PathOptions
from maknet_jax.explain.selection import SelectedImage
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir
from maknet_jax.training.state import Variables

FULL = {"patients": None, "per_organ": 1, "steps": 50, "stages": 5, "random_labels": 0.0}
QUICK = {"patients": 2, "per_organ": 1, "steps": 8, "stages": 2, "random_labels": 0.0}
MEMORISED = 500  # images with random labels
ORIGINAL, RANDOM_LABELS = "original", "random labels"
HEADER = ("network, weights", "patients", "correlation of absolute", "signed", "times chance")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains if asked to, explains, prints the table, writes the JSON and the picture."""
    parser = organ_maps.parser(__file__, __doc__)
    parser.add_argument(
        "--stages", type=options.count, help="steps from output to input (default: 5)"
    )
    parser.add_argument(
        "--random-labels",
        type=harness.positive,
        help="epochs of training the first network on random labels, such as 200 (default: 0, omit "
        "this check)",
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    networks, selection, settings = organ_maps.open_images(chosen, most=1)
    settings |= {"stages": chosen.stages, "random_labels": chosen.random_labels}
    variants = [randomised(net, chosen.stages, chosen.seed) for net in networks]
    notes = []
    with harness.run_folder(chosen.folder, "--folder") as folder:
        if chosen.random_labels:
            random, auc = train_on_random_labels(networks[0].run, folder, chosen)
            variants[0][RANDOM_LABELS] = random
            notes.append(f"random labels: AUC {auc:.3f} on the training images and their labels")
        paths, failures = organ_maps.explain(
            __file__,
            folder / "maps",
            selection,
            settings,
            lambda image, number: compare(networks, variants, image, number, settings),
        )
        stored = [results.load_metadata(path)["rows"] for path in paths]
        draw(folder / "sanity.png", paths, networks)
    rows = [[row for image in stored for row in image[place]] for place in range(len(networks))]
    document = {net.name: summarize(part) for net, part in zip(networks, rows, strict=True)}
    cells = [
        [
            f"{name}, {variant}",
            values["patients"],
            *(
                console.format_interval(values[kind], signed=True)
                for kind in ("absolute", "signed")
            ),
            console.format_interval(values["times_chance"], 1),
        ]
        for name, by_variant in document.items()
        for variant, values in by_variant.items()
    ]
    notes += [f"failed: {name}: {reason}" for name, reason in failures]
    notes.insert(0, f"one label of one image per patient, split {chosen.split}")
    harness.report(
        __file__, argv, chosen, HEADER, cells, notes, organ_maps.rounded({"networks": document})
    )


def layers_of(net: Network) -> list[str]:
    """The top-level layers with parameters, from input to output, in the order of their calls."""
    run, order = net.run, []

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.path and context.module.path[0] not in order:
            order.append(context.module.path[0])
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, run.size, run.size, 3), np.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(run.model.apply, train=False), run.variables, images)
    return [name for name in order if name in run.variables["params"]]


def randomised(net: Network, stages: int, seed: int) -> dict[str, Variables]:
    """The weights of a network, randomised from its output down to each of some layers.

    Args:
      net: the network.
      stages: number of steps; all have the same number of layers, up to one.
      seed: of the permutations.

    Returns:
      Name -> params and batch_stats; the first is the original, the last is all random.
    """
    run, layers = net.run, layers_of(net)[::-1]
    generator = np.random.default_rng(seed)
    fresh = jax.tree.map(lambda values: _permuted(np.asarray(values), generator), run.variables)
    variables: dict[str, Variables] = {ORIGINAL: run.variables}
    replaced: list[str] = []
    for group in np.array_split(layers, min(stages, len(layers))):
        replaced += group.tolist()
        variables[f"random down to {replaced[-1]}"] = {
            kind: {
                name: (fresh if name in replaced else run.variables)[kind][name] for name in tree
            }
            for kind, tree in run.variables.items()
        }
    return variables


def _permuted(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(values.ravel()).reshape(values.shape)


def train_on_random_labels(
    run: workdir.Run, folder: pathlib.Path, chosen: argparse.Namespace
) -> tuple[Variables, float]:
    """Trains the network of a run on permuted labels; returns (weights, AUC of the training).

    Args:
      run: the run, whose recipe and training images are used.
      folder: of the data set and the new run.
      chosen: the options.
    """
    data = shuffle_labels(records.open_dataset(run.data_path), run.train_split, folder, chosen.seed)
    config = configs.from_json(configs.to_json(run.config))
    config.seed += 1  # equal initial weights would make the maps alike
    # The checkpoint is the one that fits the random labels best.
    config.data.path, config.data.train_split, config.data.val_split = str(data), "train", "train"
    config.augment = configs.load("teacher").augment  # without noise
    config.epochs, config.evaluate_every = chosen.random_labels, chosen.random_labels / 4
    train.train(config, folder / "run")
    summary = files.read_json(folder / "run" / "summary.json")
    opened = workdir.open_run(folder / "run", devices=jax.local_devices()[:1])
    return opened.variables, summary["best_val_auc"]


def shuffle_labels(
    dataset: records.Dataset, split: str, folder: pathlib.Path, seed: int
) -> pathlib.Path:
    """Writes a data set of a few images whose labels and masks are permuted among them.

    Args:
      dataset: the data set.
      split: the split of the images; it becomes "train".
      folder: the data set is written into it, unless it exists.
      seed: of the choice of the images and of the permutation.

    Returns:
      The path of the data set.
    """
    out, source = folder / f"shards-{MEMORISED}-seed{seed}", dataset.source(split)
    if (out / "dataset.json").exists():
        return out
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(source))[:MEMORISED])
    images, others = (
        [source[int(k)] for k in numbers] for numbers in (chosen, rng.permutation(chosen))
    )
    rows = [
        dataclasses.replace(image, labels=other.labels, label_mask=other.label_mask)
        for image, other in zip(images, others, strict=True)
    ]
    name = "train/part-00000-of-00001.array_record"
    count, digest = records.write_shard(out / name, map(records.encode, rows))
    known = np.stack([row.label_mask for row in rows]) > 0
    present = known & (np.stack([row.labels for row in rows]) > 0)
    entry = {
        "count": count,
        "label_counts": present.sum(axis=0).tolist(),
        "known_counts": known.sum(axis=0).tolist(),
        "shards": [{"file": name, "count": count, "digest": digest}],
    }
    fingerprint = hashlib.sha256(digest.encode()).hexdigest()
    info = dataset.info | {"splits": {"train": entry}, "fingerprint": fingerprint}
    files.write_json(out / "dataset.json", info | {"content": records.content_digest(info)})
    return out


def compare(
    networks: Sequence[Network],
    variants: Sequence[dict[str, Variables]],
    image: SelectedImage,
    number: int,
    settings: dict[str, Any],
) -> results.Result:
    """Explains one label of an image by all variants of each network.

    Args:
      networks: the networks.
      variants: for each network name -> weights, the original first.
      image: the image.
      number: of the image, from which the label is chosen.
      settings: of `organ_maps.open_images`.

    Returns:
      (metadata, arrays): `rows` of each network have patient, id, label, variant, `absolute` and
      `signed` (correlations with the original map in the body), `inside` and `chance`.
    """
    regions = organ_maps.label_regions(image, networks[0], settings["parts"])
    column = int(np.random.default_rng(number).choice(list(regions)))
    region = regions[column]
    body = organ_maps.body_of(image.image) | region
    path = PathOptions(steps=settings["steps"], baseline=settings["baseline"], refine=0)
    path = dataclasses.replace(path, output="logit")
    start = perturbation.make_baseline(image.image, path.baseline)
    rows: list[list[Row]] = []
    arrays = {"image": image.image[..., 1], "region": region}
    for place, (net, weights) in enumerate(zip(networks, variants, strict=True)):
        images, baseline = net.put(image.image[None]), net.put(start[None])
        maps, part = [], []
        for name, variables in weights.items():
            # The function stays the same, so that no variant is compiled again.
            other = dataclasses.replace(net, logit_fn=Partial(net.logit_fn.func, variables))
            maps.append(
                other.attribute(images, np.array([[column]]), baseline, path).maps[0, 0].sum(-1)
            )
            one, first = maps[-1][body], maps[0][body]
            row: Row = {
                "patient": image.group,
                "id": image.id,
                "label": net.run.vocabulary.names[column],
                "variant": name,
                "absolute": float(stats.spearmanr(np.abs(one), np.abs(first)).statistic),
                "signed": float(stats.spearmanr(one, first).statistic),
                "inside": organ_maps.mass_inside(maps[-1], body, region),
                "chance": float(region.sum() / body.sum()),
            }
            part.append(row)
        rows.append(part)
        arrays[f"maps_{place}"] = np.array(maps)
    return {"id": image.id, "rows": rows}, arrays


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Variant -> patients and (mean, low, high) of the correlations and of times chance."""
    document = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        part = [row for row in rows if row["variant"] == variant]
        absolute, signed, inside, chance = (
            organ_maps.by_patient(part, value)
            for value in (
                lambda row: row["absolute"],
                lambda row: row["signed"],
                lambda row: row["inside"],
                lambda row: row["chance"],
            )
        )
        document[variant] = {
            "patients": len(absolute),
            "absolute": organ_maps.interval(absolute),
            "signed": organ_maps.interval(signed),
            "times_chance": organ_maps.ratio_interval(inside, chance),
        }
    return document


def draw(path: pathlib.Path, files: Sequence[pathlib.Path], networks: Sequence[Network]) -> None:
    """Writes a picture: for the first image of each organ a line of maps per network.

    Args:
      path: the PNG.
      files: the results of the images.
      networks: the networks.
    """
    shown: dict[str, pathlib.Path] = {}
    for file in files:
        shown.setdefault(results.load_metadata(file)["rows"][0][0]["label"], file)
    pictures = []
    for organ, file in sorted(shown.items()):
        metadata, arrays = results.load(file)
        hu, region = arrays["image"], arrays["region"]
        for place, net in enumerate(networks):
            title = f"{organ} {metadata['id']}, {net.run.model_name}"
            line = [(title, organ_maps.draw_map(hu, None, region))]
            for row, values in zip(metadata["rows"][place], arrays[f"maps_{place}"], strict=True):
                caption = f"{row['variant']} {row['signed']:+.2f}"
                line.append((caption, organ_maps.draw_map(hu, values, region)))
            pictures.append(line)
    organ_maps.write_pictures(path, pictures)


if __name__ == "__main__":
    harness.run(main)
