"""`maknet retrieve`: the lesions of a prepared set that are most like one lesion (LesaNet)."""

import dataclasses
import math
import pathlib

import jax
import numpy as np

from maknet_jax import console
from maknet_jax.ct import volumes
from maknet_jax.data import lesions, pipeline, records
from maknet_jax.errors import InputError, Rejected
from maknet_jax.figures import contact_sheet
from maknet_jax.runs import workdir
from maknet_jax.training import sharding, step

AROUND = 6  # neighbours of a DICOM slice: 2 mm of slices as thin as 0.4 mm


def retrieve(
    folder,
    image,
    box,
    data,
    out,
    *,
    spacing=None,
    splits=None,
    top=11,
    checkpoint="best",
    batch_size=32,
):
    """Writes the most similar lesions as a CSV and, beside it, as a contact sheet.

    Lesions are compared by the cosine of their embeddings; a record of the same slice and box is
    found with 1.

    Args:
      folder: the workdir of a LesaNet.
      image: a 16-bit PNG with those beside it, or a slice of DICOM.
      box: x0, y0, x1, y1 of the lesion in pixels of the slice, from 0.
      data: a data set of `prepare deeplesion --lesions`.
      out: the CSV; the sheet has its name and ends in .png.
      spacing: (x, y, z) in mm; None takes the file's, which PNGs do not have.
      splits: to look in; None takes all.
      top: how many.
      checkpoint: "best" or "last".
      batch_size: patches a step.

    Returns:
      The summary: the rows of the CSV as dicts, and the files.

    Raises:
      InputError: the run is no LesaNet, the image cannot be read, or the data are no lesions.
    """
    if pathlib.Path(out).suffix.lower() != ".csv":
        raise InputError(f"--out {out} should end in .csv: the picture beside it ends in .png")
    run = workdir.open_run(folder, checkpoint_name=checkpoint)
    dataset = records.open_dataset(data)
    if not run.model.takes_box:
        raise InputError(f"{folder} is no LesaNet: take a run of configs/lesanet.py")
    records.check_size(dataset, run.size)
    query = read_query(image, box, spacing, run.size)
    embed = make_embed(run)
    size = sharding.round_up_to_devices(batch_size)
    own = np.concatenate(list(_embeddings(embed, [query], size)))[0]
    found = []
    names = splits or list(dataset.info["splits"])
    total = sum(dataset.split(name)["count"] for name in names)
    with console.progress("retrieve", total) as advance:
        for name in names:
            number = 0
            for rows in _embeddings(embed, dataset.source(name), size):
                cosines = rows @ own
                found += [(float(c), name, number + k) for k, c in enumerate(cosines)]
                number += len(rows)
                advance(len(rows))
                found = sorted(found, key=lambda row: (-row[0], *row[1:]))[:top]
    if not found:
        raise InputError(f"{data} has no lesion in {', '.join(names)}")
    examples = [dataset.source(name)[number] for _, name, number in found]
    header = ["rank", "similarity", "id", "split", "labels"]
    rows = []
    for rank, ((cosine, name, _), example) in enumerate(zip(found, examples, strict=True), 1):
        labels = [dataset.vocabulary.names[k] for k in np.flatnonzero(example.labels)]
        rows.append([rank, f"{cosine:.4f}", example.id, name, "|".join(labels)])
    out = pathlib.Path(out)
    console.write_table(out, header, rows)
    shown = [
        dataclasses.replace(example, id=f"{cosine:.3f} {example.id}")
        for (cosine, *_), example in zip(found, examples, strict=True)
    ]
    sheet = out.with_suffix(".png")
    contact_sheet.write_contact_sheet(sheet, [query, *shown], dataset.vocabulary.names)
    made = [dict(zip(header, row, strict=True)) for row in rows]
    return {"found": made, "files": [str(out), str(sheet)], "step": run.step}


def read_query(image, box, spacing, size):
    """The patch of a lesion in a file as a `records.Example` without labels.

    Raises:
      InputError: the image cannot be read, its spacing is unknown, or the box is none.
    """
    path = pathlib.Path(image)
    try:
        if path.suffix.lower() == ".png":
            if spacing is None:
                raise InputError(f"{path} does not know its spacing: add --spacing X,Y,Z in mm")
            patch, inside, _ = lesions.patch_of_png(path, box, spacing, size)
        else:
            volume, centre = volumes.load_series_of(path, around=AROUND)
            if centre is None and len(volume.hu) > 1:
                raise InputError(
                    f"{path} has {len(volume.hu)} slices: name one slice's file, PNG or DICOM"
                )
            centre = centre or 0
            spacing = spacing or volume.spacing[::-1]
            if not all(math.isfinite(value) for value in spacing[:2]):
                raise InputError(f"{path} does not know its spacing: add --spacing X,Y,Z in mm")

            def read(offset):
                return volume.hu[np.clip(centre + offset, 0, len(volume.hu) - 1)]

            slices = lesions.three_slices(read, spacing[2])
            patch, inside = lesions.make_patch(slices, box, spacing, size)
    except Rejected as error:
        raise InputError(f"{path}: {error}") from None
    none = np.zeros(0, np.uint8)
    return records.Example(f"query: {path.name}", patch, none, none, {"box": inside})


def make_embed(run):
    """embed(batch) -> embeddings `[B, F]` of length 1, on the devices.

    Args:
      run: `workdir.Run` of a LesaNet.
    """
    to_input = run.to_input

    @jax.jit
    def embed(variables, images, box):
        boxes = step.box_kwargs(run.model, box)
        return run.model.apply(variables, to_input(images), train=False, **boxes).features

    def of_batch(batch):
        batch = sharding.put_batch(run.mesh, batch)
        return embed(run.variables, batch["image"], batch.get("box"))

    return of_batch


def _embeddings(embed, source, batch_size):
    """Yields embeddings of a source in its order, NumPy `[B, F]` without padding."""
    for batch in pipeline.ordered_batches(source, batch_size=batch_size):
        yield np.asarray(embed(batch))[batch["weight"] > 0]
