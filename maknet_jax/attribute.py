"""`maknet attribute`: why a network gives its labels, for any number of images (paper, 5.1)."""

import pathlib

import jax
import numpy as np
from PIL import Image

from maknet_jax import console, files
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.explain import selection
from maknet_jax.figures import contact_sheet, overlay, page
from maknet_jax.training import sharding

SHARES = np.linspace(0, 1, 21)  # of the pixels, for deletion and insertion
AREAS = ("deletion", "insertion", "random deletion", "random insertion")
COLUMNS = (
    "id",
    "model",
    "label",
    "truth",
    "confidence",
    "threshold",
    "change",
    "residual",
    "relative",
    "flagged",
    "file",
)


def attribute(
    folder,
    out,
    *,
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
    refine=None,
    output="probability",
    baseline="black",
    faithful=False,
    checkpoint="best",
    batch_size=None,
    png_window=None,
    display=contact_sheet.SOFT_TISSUE,
    most_shown=50,
):
    """Integrated Gradients of a selection of images; run again it goes on where it was.

    Args:
      folder: the workdir of `maknet train`.
      out: the folder to write: cases/*.npz (maps), overlays/*.png, index.json, attributions.csv,
        index.html (works offline), summary.json, failures.csv.
      path: see `cases.pick`, as split, data, ids, labels, limit and png_window.
      labels: explain these; None explains the `top` most confident ones of each image.
      compare: a second workdir, shown beside the first.
      top: labels an image.
      steps: see `integrated_gradients`, as method and output.
      refine: how often the steps of an image with a flagged map are doubled at most; None takes 4
        with the trapezoid, the others cannot.
      baseline: "black", "blurred" or a number in HU.
      faithful: measure deletion and insertion of each image's first label too (the first network's
        for both), against random pixels; 84 more forward passes an image.
      checkpoint: "best" or "last".
      batch_size: images a step; None takes one a device.
      display: (low, high) HU of the pictures.
      most_shown: images on the page; all are in the other files.

    Returns:
      The summary.

    Raises:
      InputError: nothing to explain, or arguments that make no sense.
    """
    out = pathlib.Path(out)
    if refine is None:
        refine = 4 if method == "trapezoid" else 0
    ig.check(method, steps, refine, output)  # all is checked before `out` is claimed
    perturbation.make_baseline(np.zeros((1, 1, 1), np.int16), baseline)
    networks = selection.open_networks(folder, compare, checkpoint=checkpoint)
    run = networks[0].run
    columns = selection.label_columns(run, labels)
    given = {"path": path, "split": split, "data": data, "ids": ids, "labels": labels}
    picked = selection.pick(run, folder, **given, limit=limit, png_window=png_window)
    devices = jax.local_device_count()
    batch_size = sharding.round_up_to_devices(batch_size or devices, devices)
    top = min(top, len(run.vocabulary))
    options = {"steps": steps, "method": method, "output": output, "refine": refine}
    about = options | {"baseline": baseline, "top": top, "faithful": faithful}
    about |= {"networks": [net.about for net in networks]}
    about |= {"display": list(display), "png_window": png_window and list(png_window)}
    fits = {}

    def explain_batch(numbered):
        batch = list(numbered.values())
        hu = selection.padded(batch, batch_size)
        base = np.stack([perturbation.make_baseline(image, baseline) for image in hu])
        found, random = [], None
        if faithful:  # by the image's number, whatever the batch
            order = [
                faithfulness.random_ranks(differs, number)
                for differs, number in zip(perturbation.differs(hu, base), numbered, strict=False)
            ]
            random = np.stack(order + order[-1:] * (batch_size - len(order)))
        for net in networks:
            images, black = net.put(hu), net.put(base)
            confidences = net.confidences(images)
            targets = np.argsort(-confidences, axis=1, kind="stable")[:, :top]
            if columns:
                targets = np.tile(np.int64(columns), (batch_size, 1))
            first = found[0][2][:, 0] if found else targets[:, 0]
            # Networks are compared by one label, which the second may not have among its own.
            asked = np.column_stack([targets, first]) if found and faithful else targets
            if net.name not in fits:
                fits[net.name] = ig.fit(net.logit_fn, images, asked.shape[1], output=output)
            chunk, rows = fits[net.name]
            result = ig.integrated_gradients(
                net.logit_fn, images, asked, black, chunk=chunk, rows=rows, **options
            )
            areas = None
            if faithful:
                maps = result.maps[:, -1 if found else 0].sum(-1)
                areas = _areas(net, images, black, first, maps, random)
            found.append((net, confidences, targets, result, areas))
        return [
            _result(out, number, case, row, found, display, top)
            for row, (number, case) in enumerate(numbered.items())
        ]

    done, failures = selection.explain(
        "attribute", out, picked, about, explain_batch, batch_size=batch_size
    )
    summary = about | {"workdir": str(folder), "images": len(done), "failures": len(failures)}
    if jax.process_index() == 0:
        summary |= _write(out, done, failures, summary, most_shown)
    return summary


def _areas(net, images, black, targets, maps, random):
    """`[B, 4]` in the order of `AREAS`."""
    areas = []
    for order in (faithfulness.ranks(maps), random):
        for curve in faithfulness.curves(net.logit_fn, images, targets, black, order, SHARES):
            areas.append(faithfulness.area(curve, SHARES))
    return np.stack(areas, axis=1)


def _result(out, number, case, row, found, display, top):
    """(about, arrays) of one image, and its overlay on disk."""
    names = found[0][0].run.vocabulary.names
    arrays, models = {"image": case.image[..., 1]}, []
    for number_of, (net, confidences, targets, result, areas) in enumerate(found):
        scores, explained = confidences[row], targets[row].tolist()
        best = np.argsort(-scores, kind="stable")[:top].tolist()
        maps = result.maps[row, : len(explained)]
        scale = np.abs(maps).max(axis=(1, 2, 3)) + np.float32(1e-30)
        # Half precision relative to each map's largest value: half the bytes, 3 digits.
        arrays[f"maps_{number_of}"] = (maps / scale[:, None, None, None]).astype(np.float16)
        arrays[f"scale_{number_of}"] = scale
        rows = []
        for column in dict.fromkeys(best + explained):
            entry = {"label": names[column], "truth": case.truth(column)}
            entry |= {"confidence": float(scores[column])}
            entry |= {"threshold": float(net.run.thresholds[column]), "map": None}
            if column in explained:
                at = explained.index(column)
                entry |= {"map": at, "change": float(result.end[row, at] - result.start[row, at])}
                entry |= {"residual": float(result.residual[row, at])}
                entry |= {"relative": float(result.relative[row, at])}
                entry |= {"flagged": bool(result.flagged[row, at])}
            rows.append(entry)
        missed = [
            [names[k], float(scores[k])] for k in np.flatnonzero(case.labels) if k not in best
        ]
        models.append({"name": net.name, "labels": rows, "missed": missed})
        if areas is not None:
            models[-1]["areas"] = dict(zip(AREAS, areas[row].tolist(), strict=True))
            models[-1]["areas_of"] = names[found[0][2][row, 0]]
    about = {"id": case.id, "group": case.group, "meta": case.meta, "models": models}
    grey = contact_sheet.to_grey(case.image[..., 1], display)
    strip = [np.repeat(grey[..., None], 3, axis=-1)]
    for picture in _pictures(arrays, len(found)):
        strip.append(overlay.over(grey, picture[0]))
    with files.write_whole(out / "overlays" / f"{number:05d}.png", "wb") as file:
        Image.fromarray(np.concatenate(strip, axis=1)).save(file, format="PNG")
    return about, arrays


def _pictures(arrays, models):
    """For each model the RGBA overlay of each of its maps."""
    for number in range(models):
        maps = arrays[f"maps_{number}"].astype(np.float32).sum(axis=-1)
        smoothed = [overlay.smooth(one) for one in maps]
        yield [overlay.colours(one, overlay.scale_of(one)) for one in smoothed]


def cards(done, display):
    """The cards of a page: an image with its maps each.

    Args:
      done: paths of results.
      display: (low, high) HU.
    """
    for path in done:
        about, arrays = selection.load(path)
        grey = overlay.to_uri(contact_sheet.to_grey(arrays["image"], display))
        pictures = _pictures(arrays, len(about["models"]))
        for model, some in zip(about["models"], pictures, strict=True):
            model["uris"] = [overlay.to_uri(one) for one in some]
        yield page.attribution_card(about["id"], grey, about["models"])


def _differences(areas):
    """(name, one value an image) of what is compared on the same images."""
    for area in AREAS[:2]:
        for name, each in areas.items():
            yield f"{name}: {area}, map minus random", each[area] - each[f"random {area}"]
        if len(areas) == 2:
            one, two = areas
            yield f"{area}, {one} minus {two}", areas[one][area] - areas[two][area]


def _write(out, done, failures, summary, most_shown):
    index, rows, relative, areas, groups = [], [], {}, {}, []
    for number, path in done.items():
        about = selection.load_about(path)
        file = path.relative_to(out).as_posix()
        index.append({"number": number, "file": file, "overlay": f"overlays/{path.stem}.png"})
        index[-1] |= about
        groups.append(about["group"])
        for model in about["models"]:
            name = model["name"]
            areas.setdefault(name, []).append(list(model.get("areas", {}).values()))
            for entry in model["labels"]:
                if entry["map"] is None:
                    continue
                relative.setdefault(name, []).append(entry["flagged"])
                values = {"id": about["id"], "model": name, "file": file} | entry
                rows.append([values[column] for column in COLUMNS])
    files.write_json(out / "index.json", index)
    console.write_table(out / "attributions.csv", COLUMNS, rows)
    console.write_failures(out / "failures.csv", failures)
    more = {"complete": {}, "flagged": {}, "groups": len(set(groups))}
    for name, flags in relative.items():
        more["flagged"][name] = int(np.sum(flags))
        more["complete"][name] = float(1 - np.mean(flags))
    if summary["faithful"]:
        areas = {
            name: dict(zip(AREAS, np.transpose(each), strict=True)) for name, each in areas.items()
        }
        more["faithfulness"] = {
            name: {area: faithfulness.bootstrap(values, groups) for area, values in each.items()}
            for name, each in areas.items()
        }
        more["differences"] = {
            name: faithfulness.bootstrap(values, groups) for name, values in _differences(areas)
        }
    shown = [done[number] for number in list(done)[:most_shown]]
    with files.write_whole(out / "index.html") as file:
        lead = page.attribution_lead(summary | more, len(shown))
        file.write(page.document("Attributions", lead, cards(shown, summary["display"])))
    names = ("index.html", "attributions.csv", "index.json", "cases", "overlays")
    more["files"] = [str(out / name) for name in names]
    more["failures_file"] = str(out / "failures.csv") if failures else None
    files.write_json(out / "summary.json", summary | more)
    return more
