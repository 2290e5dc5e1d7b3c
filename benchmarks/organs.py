"""Do attributions lie in the organ that a label names? On the phantom, whose organs are known.

    python benchmarks/organs.py --workdir demo/rounds/round-1 --masks demo/phantom/masks

For each image of the split and each label that is an organ in sight, given with confidence: the
share of the map's raising mass inside the organ, beside the organ's share of the body (chance), and
the confidence while pixels are deleted in the order of the map, beside random pixels.
"""

import pathlib

import harness
import jax
import numpy as np

from maknet_jax import cases, files, perturb
from maknet_jax.attribution import faithfulness as faith
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.attribution import overlay, perturbation
from maknet_jax.cli import options
from maknet_jax.errors import InputError, Rejected

FULL = {"images": 200, "steps": 50, "repeats": 1, "size": 0}
QUICK = {"images": 12, "steps": 10}
BODY = -500  # HU
SHARES = np.linspace(0, 1, 21)


def main(argv=None):
    """Measures, prints and writes."""
    parser = harness.parser(__file__, __doc__)
    parser.add_argument("--workdir", required=True, help="a run trained on the phantom")
    parser.add_argument("--masks", required=True, help="the phantom's masks")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=options.count, help="at most")
    parser.add_argument("--steps", type=options.count, help="of the path")
    parser.add_argument("--baseline", default="black")
    parser.add_argument("--least", type=float, default=0.5, help="confidence of a label")
    parser.add_argument("--smooth", type=float, default=1.0, help="sigma in pixels, of the order")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    masks = pathlib.Path(chosen.masks)
    # Image by image, each with as many labels as it has organs: one device, however many there are.
    net = cases.open_networks(chosen.workdir, devices=jax.local_devices()[:1])[0]
    organs = set(files.read_json(masks / "organs.json").values())
    labels = {k: n for k, n in enumerate(net.run.vocabulary.names) if n in organs}
    picked = cases.pick(net.run, chosen.workdir, split=chosen.split, limit=chosen.images)
    rows, options_ = [], {"steps": chosen.steps, "refine": 2}
    for number, read in enumerate(picked.reads):
        case = read()
        image = net.put(case.image[None])
        base = perturbation.make_baseline(case.image, chosen.baseline)
        black, differs = net.put(base[None]), perturbation.differs(case.image, base)
        scores = net.confidences(image)[0]
        regions = {}
        for column, name in labels.items():
            if scores[column] >= chosen.least:
                try:
                    regions[column] = perturb.find_regions(
                        case, masks=masks / "deeplesion", organs=[name],
                        size=len(case.image),
                    )[name]  # fmt: skip
                except Rejected:
                    continue  # given, but not in sight
        if not regions:
            continue
        body = case.image[..., 1] > BODY
        found = ig.integrated_gradients(net.logit_fn, image, [list(regions)], black, **options_)
        for place, (column, region) in enumerate(regions.items()):
            attribution = found.maps[0, place].sum(-1)
            noise = np.random.default_rng([number, column]).normal(size=attribution.shape)
            areas = []
            # Smoothed alike, so that only the places differ; air is no random pixel.
            ordered = [overlay.smooth(values, chosen.smooth) for values in (attribution, noise)]
            ordered[1] = np.where(differs, ordered[1], -np.inf)
            for values in ordered:
                order = faith.ranks(values[None])
                curves = faith.curves(net.logit_fn, image, [column], black, order, SHARES)
                areas += [float(faith.area(curve, SHARES)[0]) for curve in curves]
            rows.append(
                {"patient": case.group, "id": case.id, "label": labels[column],
                 "inside": faith.mass_inside(attribution, region),
                 "chance": float(region.sum() / max(1, (body | region).sum())),
                 "flagged": bool(found.flagged[0, place]), "areas": areas}
            )  # fmt: skip
    if not rows:
        raise InputError(f"{chosen.workdir} gives no organ of {chosen.split} with confidence")
    results = _summary(rows)
    cells = [[name, *("{:.3f} ({:.3f} to {:.3f})".format(*results[name][kind])
              for kind in ("map", "random", "difference"))] for name in results]  # fmt: skip
    flagged = np.mean([row["flagged"] for row in rows])
    harness.report(
        __file__, argv, chosen, ["", "map", "chance", "difference"], cells,
        [f"{len(rows)} labels of {len({row['id'] for row in rows})} images of "
         f"{len({row['patient'] for row in rows})} patients; means over patients, 95 % by "
         f"resampling patients; {flagged:.1%} of maps flagged as not complete"],
        {"results": results, "rows": rows},
    )  # fmt: skip


def _summary(rows):
    """name -> map, random and difference, each (mean, low, high)."""
    patients = {}
    for row in rows:
        deletion, insertion, random_deletion, random_insertion = row["areas"]
        patients.setdefault(row["patient"], []).append(
            [[row["inside"], row["chance"]], [deletion, random_deletion],
             [insertion, random_insertion]]
        )  # fmt: skip
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
