"""Do attributions lie in the organ that a label names? On the phantom, whose organs are known.

    python benchmarks/experiments/organs.py --folder /tmp/organs  # draws a phantom and trains on it
    python benchmarks/experiments/organs.py --workdir demo/rounds/round-1 --masks demo/phantom/masks

In its own phantom an organ that may be missing is missing in up to half of the patients: where
organs always come together, a network may name one by the others, and rightly points at them.

For each image of the split and each label that is an organ in sight, given with confidence: the
share of the map's raising mass in the body that lies inside the organ, beside the organ's share of
the body (chance), and the confidence while pixels are deleted in the order of the map, beside
random pixels.
"""

import pathlib

import jax
import numpy as np
from scipy import ndimage

from benchmarks import harness
from maknet_jax import files, phantom, prepare, train
from maknet_jax.attribution import faithfulness as faith
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.attribution import perturbation
from maknet_jax.cli import options
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain.masks import find_regions
from maknet_jax.explain.network import open_networks
from maknet_jax.explain.options import SelectionOptions
from maknet_jax.explain.selection import select
from maknet_jax.figures import overlay
from maknet_jax.runs import config as configs

FULL = {"images": 200, "steps": 50, "repeats": 1}
TRAINING = {"patients": 800, "epochs": 24, "size": 96, "seed": 0}
QUICK = {"images": 12, "steps": 10}
QUICK_TRAINING = {"patients": 60, "epochs": 12, "size": 64, "seed": 0}
NOISE = [f"augment.{kind}_probability=0.5" for kind in ("rotation", "crop", "contrast")]
BODY = -500  # HU
SHARES = np.linspace(0, 1, 21)


def main(argv=None):
    """Measures, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--workdir", help="a run trained on a phantom (default: train one)")
    parser.add_argument("--masks", help="that phantom's masks")
    parser.add_argument("--folder", help="where to train, kept (default: a temporary one)")
    parser.add_argument("--patients", type=options.count, help="of the phantom to train on")
    parser.add_argument("--epochs", type=options.count, help="of the training")
    parser.add_argument("--seed", type=int, help="of the phantom and the training")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=options.count, help="at most")
    parser.add_argument("--steps", type=options.count, help="of the path")
    parser.add_argument(
        "--baseline",
        default="-400",
        help="black, blurred or HU; default -400: between lung and "
        "soft tissue, for what equals the baseline can get no share of the map",
    )
    parser.add_argument("--least", type=float, default=0.5, help="confidence of a label")
    parser.add_argument("--smooth", type=float, default=1.0, help="sigma in pixels, of the order")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    if bool(chosen.workdir) != bool(chosen.masks):
        raise InputError("--workdir and --masks belong together: give both, or neither to train")
    for name, value in (QUICK_TRAINING if chosen.quick else TRAINING).items():
        given = getattr(chosen, name)
        if chosen.workdir and given is not None:
            raise InputError(f"--{name} {given} is of a training: leave it out beside --workdir")
        if not chosen.workdir and given is None:
            setattr(chosen, name, value)
    with harness.kept(chosen.folder, "--folder") as folder:
        workdir, masks = chosen.workdir, chosen.masks
        if not workdir:
            workdir, masks = trained(folder, chosen)
        rows = measure(workdir, pathlib.Path(masks), chosen)
    if not rows:
        raise InputError(f"{workdir} gives no organ of {chosen.split} with confidence")
    results = _summary(rows)
    cells = [
        [
            name,
            *(
                "{:.3f} ({:.3f} to {:.3f})".format(*results[name][kind])
                for kind in ("map", "random", "difference")
            ),
        ]
        for name in results
    ]
    flagged, labels = np.mean([row["flagged"] for row in rows]), list(_by_label(rows))
    harness.report(
        __file__,
        argv,
        chosen,
        ["", "map", "chance", "difference"],
        cells,
        [
            f"{len(rows)} labels of {len({row['id'] for row in rows})} images of "
            f"{len({row['patient'] for row in rows})} patients; means over patients, 95 % by "
            f"resampling patients; {flagged:.1%} of maps flagged as not complete",
            "mass inside over chance: "
            + ", ".join(
                f"{row['label']} {row['inside'] / row['chance']:.1f}x"
                for row in sorted(labels, key=lambda row: -row["inside"] / row["chance"])
            ),
        ],
        {"results": results, "rows": labels},
    )


def trained(folder, chosen):
    """Draws a phantom, prepares it and trains the small MAKNet: (workdir, masks)."""
    paths = phantom.open_phantom(
        folder / "phantom",
        patients=chosen.patients,
        unlabelled_volumes=0,
        seed=chosen.seed,
        absent=0.5,
    )
    if not (folder / "shards" / "dataset.json").exists():
        prepare.prepare_deeplesion(
            out=folder / "shards", size=chosen.size, **phantom.deeplesion_files(paths)
        )
    changes = [f"data.path={folder / 'shards'}", f"data.size={chosen.size}", f"seed={chosen.seed}"]
    config = configs.load("smoke", [*changes, *NOISE, f"epochs={chosen.epochs:.1f}"])
    train.train(config, folder / "run")
    return folder / "run", paths["masks"]


def measure(workdir, masks, chosen):
    """A dict for every organ that the network gives to an image of the split."""
    # Image by image, each with as many labels as it has organs: one device, however many there are.
    net = open_networks(workdir, devices=jax.local_devices()[:1])[0]
    organs = set(files.read_json(masks / "organs.json").values())
    labels = {k: n for k, n in enumerate(net.run.vocabulary.names) if n in organs}
    which = SelectionOptions(split=chosen.split, limit=chosen.images)
    selection = select(net.run, workdir, which)
    rows, options_ = [], {"steps": chosen.steps, "refine": 2}
    for number, read in enumerate(selection.readers):
        case = read()
        image = net.put(case.image[None])
        base = perturbation.make_baseline(case.image, chosen.baseline)
        baseline = net.put(base[None])
        scores = net.confidences(image)[0]
        regions = {}
        for column, name in labels.items():
            if scores[column] >= chosen.least:
                try:
                    regions[column] = find_regions(
                        case,
                        masks=masks / "deeplesion",
                        organs=[name],
                        size=len(case.image),
                    )[name]
                except Rejected:
                    continue  # given, but not in sight
        if not regions:
            continue
        body = ndimage.binary_fill_holes(case.image[..., 1] > BODY)
        found = ig.integrated_gradients(net.logit_fn, image, [list(regions)], baseline, **options_)
        for place, (column, region) in enumerate(regions.items()):
            attribution = found.maps[0, place].sum(-1)
            noise = np.random.default_rng([number, column]).normal(size=attribution.shape)
            areas, whole = [], body | region
            # Smoothed alike, so that only the places differ; air is no random pixel.
            ordered = [overlay.smooth(values, chosen.smooth) for values in (attribution, noise)]
            ordered[1] = np.where(whole, ordered[1], -np.inf)
            for values in ordered:
                order = faith.ranks(values[None])
                curves = faith.curves(net.logit_fn, image, [column], baseline, order, SHARES)
                areas += [float(faith.area(curve, SHARES)[0]) for curve in curves]
            rows.append(
                {
                    "patient": case.group,
                    "id": case.id,
                    "label": labels[column],
                    "inside": faith.mass_inside(np.where(whole, attribution, 0), region),
                    "chance": float(region.sum() / whole.sum()),
                    "flagged": bool(found.flagged[0, place]),
                    "areas": areas,
                }
            )
    return rows


def _by_label(rows):
    """One row per label: maps, patients and the mean mass inside the organ and by chance."""
    groups = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    for label, members in sorted(groups.items()):
        yield {
            "label": label,
            "maps": len(members),
            "patients": len({row["patient"] for row in members}),
            "inside": float(np.mean([row["inside"] for row in members])),
            "chance": float(np.mean([row["chance"] for row in members])),
            "flagged": sum(bool(row["flagged"]) for row in members),
        }


def _summary(rows):
    """name -> map, random and difference, each (mean, low, high)."""
    patients = {}
    for row in rows:
        deletion, insertion, random_deletion, random_insertion = row["areas"]
        patients.setdefault(row["patient"], []).append(
            [
                [row["inside"], row["chance"]],
                [deletion, random_deletion],
                [insertion, random_insertion],
            ]
        )
    means = np.array([np.mean(values, axis=0) for values in patients.values()])
    names = (
        "mass inside the organ",
        "confidence while deleting",
        "confidence while inserting",
    )
    return {
        name: {
            "map": faith.bootstrap(means[:, place, 0]),
            "random": faith.bootstrap(means[:, place, 1]),
            "difference": faith.bootstrap(means[:, place, 0] - means[:, place, 1]),
        }
        for place, name in enumerate(names)
    }


if __name__ == "__main__":
    harness.run(main)
