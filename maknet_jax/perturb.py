"""`maknet perturb`: what a network still says when parts of the image change (paper, 5.2)."""

import functools
import hashlib
import pathlib

import jax
import numpy as np
from PIL import Image

from maknet_jax import console, files
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.ct import nifti, png
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain import selection
from maknet_jax.figures import contact_sheet, overlay, page
from maknet_jax.runs import workdir

STRATEGIES = ("neighbour", "patch", "attribution", "random")
COLUMNS = (
    "id",
    "model",
    "perturbed",
    "label",
    "truth",
    "before",
    "after",
    "rank_before",
    "rank_after",
    "fell_out",
)


def perturb(
    folder,
    out,
    *,
    strategies=STRATEGIES,
    masks=None,
    organs=None,
    share=0.1,
    path=None,
    split=None,
    data=None,
    ids=None,
    labels=None,
    limit=None,
    compare=None,
    top=5,
    steps=50,
    method="trapezoid",
    baseline="black",
    checkpoint="best",
    batch_size=None,
    png_window=None,
    display=contact_sheet.SOFT_TISSUE,
    most_shown=50,
):
    """Perturbs a selection of images and compares the first labels; run again it goes on.

    "neighbour" fills a region with the pixels around it, "patch" blackens its bounding box;
    "attribution" deletes the pixels that raise the confidences of the original's first labels most,
    for each network by its own map, and "random" as many at random, the control.

    Args:
      folder: the workdir of `maknet train`.
      out: the folder to write: cases/*.npz, pictures/*.png, perturbations.csv, index.html (works
        offline), summary.json, failures.csv.
      strategies: of the four.
      masks: where the regions are: a NIfTI of labels, a PNG or a folder of PNGs called as the
        slices, or a folder of organ maps as the phantom has; masks are of whole slices. None takes
        DeepLesion's boxes.
      organs: names (the phantom's) or values of the masks, each a region of its own; None takes
        all that is not 0 as one.
      share: of the pixels that are deleted.
      path: see `cases.pick`, as split, data, ids, labels, limit and png_window.
      compare: a second workdir, shown beside the first.
      top: first labels that are compared.
      steps: see `attribute.attribute`, as the rest.

    Returns:
      The summary: for each network and strategy by how much the confidences of the first labels
      fall, and how many of those stay, with 95 % intervals over patients or series.

    Raises:
      InputError: nothing to perturb, or arguments that make no sense.
    """
    out = pathlib.Path(out)
    ig.check(method, steps, 0, "probability")  # all is checked before `out` is claimed
    perturbation.make_baseline(np.zeros((1, 1, 1), np.int16), baseline)
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies:
        raise InputError(f"strategy {unknown} is unknown: choose of {', '.join(STRATEGIES)}")
    if not 0 < share < 1:
        raise InputError(f"--share {share} should lie between 0 and 1")
    networks = selection.open_networks(folder, compare, checkpoint=checkpoint)
    run = networks[0].run
    given = {"path": path, "split": split, "data": data, "ids": ids, "labels": labels}
    picked = selection.pick(run, folder, **given, limit=limit, png_window=png_window)
    find = functools.partial(find_regions, masks=masks, organs=organs, size=run.config.data.size)
    needed = {"neighbour", "patch"} & set(strategies)
    digest = None
    if needed:
        digest = masks and _check_masks(pathlib.Path(masks), organs)
        picked = selection.Picked(
            [functools.partial(_with_regions, read, find) for read in picked.reads],
            picked.failures,
            picked.about,
        )
    devices = jax.local_device_count()
    batch_size = workdir.global_batch(batch_size or devices, devices)
    top = min(top, len(run.vocabulary))
    about = {"strategies": list(strategies), "masks": masks and str(masks), "organs": organs}
    about |= {"masks_digest": digest, "share": share, "top": top, "steps": steps}
    about |= {"method": method, "baseline": baseline}
    about |= {"networks": [net.about for net in networks]}
    about |= {"display": list(display), "png_window": png_window and list(png_window)}

    def explain_batch(numbered):
        hu = selection.padded(list(numbered.values()), batch_size)
        base = np.stack([perturbation.make_baseline(image, baseline) for image in hu])
        influential = [_influential(net, hu, base, about) for net in networks]
        return [
            _perturbed(
                out, networks, number, case, about, base[row], [masks[row] for masks in influential]
            )
            for row, (number, case) in enumerate(numbered.items())
        ]

    done, failures = selection.explain(
        "perturb", out, picked, about, explain_batch, batch_size=batch_size
    )
    summary = about | {"workdir": str(folder), "images": len(done), "failures": len(failures)}
    if jax.process_index() == 0:
        summary |= _write(out, done, failures, summary, most_shown)
    return summary


def _check_masks(masks, organs):
    """Refuses what would reject every image; returns the digest of the masks."""
    if not masks.exists():
        raise InputError(f"--masks {masks} does not exist: give a NIfTI, a PNG or a folder")
    for organ in organs or ():
        _value(organ, _names_of(masks))
    try:
        if _is_nifti(masks):
            nifti.check_nifti(masks)
        elif masks.is_file():
            _read_png(masks)
    except Rejected as error:
        raise InputError(f"--masks {masks}: {error}") from None
    if masks.is_file():
        return hashlib.sha256(masks.read_bytes()).hexdigest()[:16]
    found = sorted(path for path in masks.rglob("*") if path.is_file())
    return selection.digest(selection.sizes(found))


def _with_regions(read, find):
    case = read()
    try:
        case.meta["regions"] = find(case)  # taken out again before the result is kept
    except Rejected as error:
        raise Rejected(case.id, str(error)) from error
    return case


def find_regions(case, *, masks, organs, size):
    """The regions of an image: name -> bool `[size, size]`, those that it does not show left out.

    Raises:
      Rejected: none is in sight, one is all that is in sight, or there is no mask for this image.
      InputError: an organ is unknown.
    """
    crop, box = case.meta.get("crop"), case.meta.get("box")  # of a patch: in its own pixels
    if crop is not None:  # DeepLesion counts pixels from 1
        box = [place - 1 for place in case.meta.get("slice_box") or ()]
    if masks is None:
        if not box:
            raise Rejected("no box: only DeepLesion has boxes, else give --masks")
        regions = {"lesion": perturbation.box_region(box, crop or (0, 0, size, size), size)}
    else:
        if crop is None:
            raise Rejected(
                "a patch around a lesion, but masks are of whole slices: leave --masks "
                "out, and its box is taken"
            )
        plane, values = _mask_of(case, pathlib.Path(masks))
        shape, (*_, bottom, right) = case.meta.get("shape"), crop
        # Records do not keep the size of their slices, but where they were cut out.
        known = shape is None or tuple(shape[-2:]) == plane.shape
        if not known or bottom > plane.shape[0] or right > plane.shape[1]:
            of = "{1} x {2}".format(*shape) if shape else f"{bottom} x {right} or more"
            raise Rejected(
                "the mask is {} x {}, the slice {}: give masks of whole slices".format(
                    *plane.shape, of
                )
            )
        plane = perturbation.mask_region(plane, crop, size)
        regions = {"region": plane != 0}
        if organs:
            regions = {str(organ): plane == _value(organ, values) for organ in organs}
    regions = {name: region for name, region in regions.items() if region.any()}
    if not regions:
        raise Rejected("none of the regions is in sight")
    for name, region in regions.items():
        if region.all():
            raise Rejected(f"region {name} fills the whole image: nothing is left around it")
    return regions


def _value(organ, values):
    value = values.get(organ, organ)
    try:
        return int(value)
    except ValueError:
        known = ", ".join(values) or "numbers only"
        raise InputError(f"--organs {organ!r} is unknown: the masks have {known}") from None


def _mask_of(case, masks):
    """(mask or label map of the case's slice, name -> value)."""
    if "file" not in case.meta:
        raise Rejected(
            "the record does not keep its file's name, so no mask is known to be of it: "
            "give the CT files themselves"
        )
    name, names = pathlib.Path(case.meta["file"]), _names_of(masks)
    if _is_nifti(masks):
        if "shape" not in case.meta:
            raise Rejected(f"{masks} is of a volume, this a slice of a prepared set: give CT files")
        volume = _label_map(str(masks), case.meta["file"] if case.meta["kind"] == "nifti" else None)
        if len(volume) != case.meta["shape"][0]:
            raise Rejected(
                f"{masks} has {len(volume)} slices, the series {case.meta['shape'][0]}: give the "
                "mask of this series"
            )
        return volume[case.meta["slice"]], names
    series, index = png.split_name(name)
    stored = masks / f"{series}.npz"
    if stored.exists():
        with np.load(stored) as maps:
            key = "none" if index is None else f"{index:03d}"
            if key not in maps:
                raise Rejected(f"{stored} has no map {key}")
            return maps[key], names
    return _read_png(masks / name.with_suffix(".png").name if masks.is_dir() else masks), names


def _is_nifti(masks):
    return masks.name.lower().endswith((".nii", ".nii.gz"))


def _names_of(masks):
    """name -> value, where organs.json lies in a folder of masks or above it."""
    above = [folder / "organs.json" for folder in (masks, masks.parent) if masks.is_dir()]
    names = next((files.read_json(file) for file in above if file.exists()), {})
    return {organ: value for value, organ in names.items()}


def _read_png(file):
    """The stored values: palette and 16-bit files would change if they were made grey."""
    try:
        with Image.open(file) as picture:
            if picture.mode not in ("1", "L", "P", "I", "I;16"):
                raise Rejected(f"{file} is a picture of {picture.mode}: masks have one channel")
            return np.asarray(picture)
    except FileNotFoundError:
        raise Rejected(f"no mask {file}") from None
    except (OSError, SyntaxError) as error:
        raise Rejected(f"{file} is no whole PNG ({error})") from None


@functools.lru_cache(maxsize=1)
def _label_map(masks, like):
    return nifti.load_label_map(masks, like=like)


def _influential(net, hu, base, about):
    """The pixels that raise each image's first labels most: bool `[B, S, S]`."""
    if not {"attribution", "random"} & set(about["strategies"]):
        return np.zeros(hu.shape[:3], bool)
    images = net.put(hu)
    order = np.argsort(-net.confidences(images), axis=1, kind="stable")
    result = ig.integrated_gradients(
        net.logit_fn,
        images,
        order[:, : about["top"]],
        net.put(base),
        steps=about["steps"],
        method=about["method"],
    )
    maps = result.maps.sum(axis=(1, 4))
    return np.stack([perturbation.most_influential(one, about["share"]) for one in maps])


def _perturbed(out, networks, number, case, about, base, influential):
    """(about, arrays) of one image, and its pictures on disk."""
    regions = case.meta.pop("regions", {})
    common = [("original", case.image)]
    for name, region in regions.items():
        if "neighbour" in about["strategies"]:
            common.append((f"neighbour: {name}", perturbation.neighbour(case.image, region)))
        if "patch" in about["strategies"]:
            common.append((f"patch: {name}", perturbation.patch(case.image, region)))
    names, display = networks[0].run.vocabulary.names, about["display"]
    ranks = faithfulness.random_ranks(perturbation.differs(case.image, base), number)
    models, arrays, strips = [], {}, []
    for place, (net, mask) in enumerate(zip(networks, influential, strict=True)):
        deleted = {"attribution": mask, "random": ranks < mask.sum()}
        forms = common + [
            (f"{name}: {gone.mean():.0%} of pixels", perturbation.delete(case.image, gone, base))
            for name, gone in deleted.items()
            if name in about["strategies"]
        ]
        hu = np.stack([image for _, image in forms])
        order, scores = _scored(net, hu)
        first = order[0, : about["top"]].tolist()
        columns = []
        for row, (title, _) in enumerate(forms):
            rank = np.argsort(order[row])
            now = order[row, : about["top"]].tolist()
            labels = [
                {
                    "label": names[k],
                    "truth": case.truth(k),
                    "confidence": float(scores[row, k]),
                    "before": float(scores[0, k]),
                    "rank": int(rank[k]) + 1,
                    "state": "" if k in first and k in now else "gone" if k in first else "new",
                }
                for k in now + [k for k in first if k not in now]
            ]
            columns.append({"title": title, "labels": labels})
        models.append({"name": net.name, "columns": columns})
        arrays[f"pictures_{place}"] = contact_sheet.to_grey(hu[..., 1], display)
        strips.append(np.concatenate(list(arrays[f"pictures_{place}"]), axis=1))
    with files.write_whole(out / "pictures" / f"{number:05d}.png", "wb") as file:
        Image.fromarray(np.concatenate(strips)).save(file, format="PNG")
    return {"id": case.id, "group": case.group, "models": models}, arrays


def _scored(net, hu):
    """(labels by confidence, confidences), `[N, K]` each, a device's worth of images at a time."""
    devices = jax.local_device_count()
    rows = workdir.global_batch(len(hu), devices)
    padded = np.concatenate([hu, hu[:1].repeat(rows - len(hu), axis=0)])
    parts = [net.confidences(net.put(padded[k : k + devices])) for k in range(0, rows, devices)]
    scores = np.concatenate(parts)[: len(hu)]
    return np.argsort(-scores, axis=1, kind="stable"), scores


def _write(out, done, failures, summary, most_shown):
    rows, drops, stays, groups = [], {}, {}, {}
    for path in done.values():
        about = selection.load_about(path)
        for model in about["models"]:
            original, *columns = model["columns"]
            before = {entry["label"]: entry for entry in original["labels"]}
            fallen = {}
            for column in columns:
                first = [e for e in column["labels"] if e["label"] in before]
                for entry in first:
                    old = before[entry["label"]]
                    rows.append(
                        [
                            about["id"],
                            model["name"],
                            column["title"],
                            entry["label"],
                            entry["truth"],
                            old["confidence"],
                            entry["confidence"],
                            old["rank"],
                            entry["rank"],
                            entry["state"] == "gone",
                        ]
                    )
                fall = np.mean([e["before"] - e["confidence"] for e in first])
                stay = np.mean([e["state"] != "gone" for e in first])
                strategy = column["title"].partition(":")[0]
                fallen.setdefault(strategy, []).append((fall, stay))
            for strategy, values in fallen.items():  # one value an image, whatever its organs
                key = model["name"], strategy
                drops.setdefault(key, []).append(np.mean(values, axis=0)[0])
                stays.setdefault(key, []).append(np.mean(values, axis=0)[1])
                groups.setdefault(key, []).append(about["group"])
    console.write_table(out / "perturbations.csv", COLUMNS, rows)
    console.write_failures(out / "failures.csv", failures)
    results = [
        {
            "model": key[0],
            "strategy": key[1],
            "images": len(values),
            "groups": len(set(groups[key])),
            "fall": faithfulness.bootstrap(values, groups[key]),
            "stay": faithfulness.bootstrap(stays[key], groups[key]),
        }
        for key, values in drops.items()
    ]
    shown = [done[number] for number in list(done)[:most_shown]]
    with files.write_whole(out / "index.html") as file:
        lead = page.perturbation_lead(summary, *table(results), len(shown))
        file.write(page.document("Perturbations", lead, map(_card, shown)))
    files_ = [str(out / name) for name in ("index.html", "perturbations.csv", "cases", "pictures")]
    more = {"results": results, "files": files_}
    more["failures_file"] = str(out / "failures.csv") if failures else None
    files.write_json(out / "summary.json", summary | more)
    return more


def table(results):
    """(header, rows) of a summary's results: text."""
    rows = [
        [
            result["model"],
            result["strategy"],
            result["images"],
            result["groups"],
            *(console.format_interval(result[name]) for name in ("fall", "stay")),
        ]
        for result in results
    ]
    header = [
        "network",
        "perturbed",
        "images",
        "patients or series",
        "confidence falls by",
        "of the first stay",
    ]
    return header, rows


def _card(path):
    about, arrays = selection.load(path)
    for place, model in enumerate(about["models"]):
        for column, picture in zip(model["columns"], arrays[f"pictures_{place}"], strict=True):
            column["uri"] = overlay.to_uri(picture)
    return page.perturbation_card(about["id"], about["models"])
