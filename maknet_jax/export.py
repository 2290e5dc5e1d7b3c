"""`maknet export`: a trained network as a bundle, which every verb opens like a workdir."""

import importlib.metadata
import os
import pathlib
from typing import Any

import jax
import numpy as np

import maknet_jax
from maknet_jax import console, evaluate
from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.runs import bundle, card, domain_file, ownership, stablehlo, workdir
from maknet_jax.runs.progress import Progress
from maknet_jax.training import transfer


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    dtype: str = "float32",
    name: str | None = None,
    license_name: str | None = None,
    note: str | None = None,
    data: str | os.PathLike[str] | None = None,
    zipped: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a bundle atomically, see `runs.bundle`.

    Args:
      folder: a workdir of `maknet train`; or a bundle, to store it in another dtype.
      out: the folder to write.
      checkpoint: "best" or "last".
      dtype: of the stored kernels: "float32", "float16" or "bfloat16"; restored to float32 when the
        bundle is opened.
      name: the title; None takes that of the bundle, or the name of the workdir.
      license_name: of the weights, as named by the Hugging Face Hub; None takes that of the bundle,
        and "other" for a workdir.
      note: a known limit of the network, for the model card; None takes that of the bundle.
      data: the training data set, if it has moved; the bundle records its origin.
      zipped: also write OUT.zip.
      overwrite: replace an existing bundle at `out`.

    Returns:
      The summary: the paths, the bytes of each file, the labels and the step.

    Raises:
      InputError: `folder` is not a run, `data` is not its training data, or `out` exists.
    """
    bundle.check_free(out, zipped=zipped, overwrite=overwrite)
    out = pathlib.Path(out).absolute()
    with ownership.owned(out.parent, "maknet export", "--out", file=out.name):
        return _export(
            folder, out, checkpoint, dtype, name, license_name, note, data, zipped, overwrite
        )


def _export(
    folder: str | os.PathLike[str],
    out: pathlib.Path,
    checkpoint: str,
    dtype: str,
    name: str | None,
    license_name: str | None,
    note: str | None,
    data: str | os.PathLike[str] | None,
    zipped: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """See `export`."""
    run = workdir.open_run(folder, checkpoint_name=checkpoint, devices=jax.local_devices())
    if run.source.resolve() in (out.resolve(), out.with_name(f"{out.name}.zip").resolve()):
        raise InputError(f"--out {out} is {folder} itself: choose another folder")
    params, batch_stats = (
        jax.tree.map(np.asarray, run.variables.get(kind, {})) for kind in ("params", "batch_stats")
    )
    stored = bundle.pack(params, batch_stats, dtype)
    restored = jax.tree.map(lambda array: array.astype(np.float32), stored)
    network, description = stablehlo.export_network(
        run.config, len(run.vocabulary), transfer.named(stored)
    )
    weights, _ = transfer.encode(**stored, metadata={"model": run.model_name})
    title, licence = bundle.title(run.source.resolve()), "other"
    checkpoint_digest = transfer.digest(params, batch_stats)
    if run.is_bundle:
        title, licence = run.metadata["name"], card.license_of(bundle.read_card(run.source))
        # Of the weights before any rounding to another dtype.
        checkpoint_digest = run.metadata["checkpoint"]["digest"]
        note = note or run.metadata.get("note")
    info = {
        "name": name or title,
        "config": bundle.without_paths(run.config),
        "labels": run.vocabulary.to_json(),
        "thresholds": run.thresholds.tolist(),
        "preprocessing": bundle.preprocessing(run.config, takes_box=run.model.takes_box),
        "checkpoint": {
            "name": run.name,
            "step": run.step,
            "digest": checkpoint_digest,
        },
        "weights": {
            "dtype": dtype,
            "digest": transfer.digest(**restored),
            "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(params))),
        },
        "data": _data(run, data),
        "metrics": _metrics(run),
        "out_of_domain": run.domain.about if run.domain else None,
        "stablehlo": description,
        "versions": {"maknet-jax": maknet_jax.__version__}
        | {each: importlib.metadata.version(each) for each in ("jax", "flax", "safetensors")},
    }
    info |= {"note": note} if note else {}
    content = {
        bundle.WEIGHTS: weights,
        bundle.NETWORK: network,
        bundle.CARD: card.model_card(info, license_name or licence, out.name).encode(),
    }
    if run.domain:
        content[domain_file.FILE] = domain_file.encode(run.domain)
    written = bundle.write(out, info, content, zipped=zipped, overwrite=overwrite)
    sizes = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    return {
        "files": [str(path) for path in written],
        "bytes": sizes,
        "labels": len(run.vocabulary),
        "checkpoint": run.name,
        "step": run.step,
        "data": info["data"],
        "splits": list(info["metrics"]),
    }


def _data(run: workdir.Run, path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The entry `data` of `bundle.json`: what is known about the training data."""
    if run.is_bundle:
        return dict(run.dataset)
    fingerprint = run.dataset["fingerprint"]
    known: dict[str, Any] = {
        "fingerprint": fingerprint,
        "pseudo_labels": run.dataset.get("pseudo_labels"),
        "origin": run.dataset.get("origin") or {},
    }
    try:
        dataset = records.open_dataset(path or run.data_path)
    except InputError:
        if path is not None:
            raise
        console.Log().say(
            f"the data of {run.source} are not at {run.data_path}: the bundle will not state the "
            "number of images; pass their folder as --data"
        )
        return known
    if dataset.fingerprint != fingerprint:
        if path is not None:
            raise InputError(f"{path} is not the data that {run.source} was trained on")
        return known
    return known | {
        "origin": dataset.origin,
        "images": {name: split["count"] for name, split in dataset.info["splits"].items()},
        "choice": dataset.choice,
    }


def _metrics(run: workdir.Run) -> dict[str, dict[str, Any]]:
    """Split -> metrics, from validation and from evaluations of the exported weights."""
    if run.is_bundle:
        return dict(run.metadata["metrics"])
    metrics: dict[str, dict[str, Any]] = {}
    # A best checkpoint is saved by its validation, a last one at any step.
    validated = run.name == "best" or Progress.from_json(run.metadata).validated_step == run.step
    if validated and run.metadata.get("metrics"):
        metrics["validation"] = dict(run.metadata["metrics"])
    for summary in evaluate.summaries(run.source):
        if (summary["checkpoint"], summary["step"]) == (run.name, run.step):
            metrics |= summary["splits"]
    return metrics
