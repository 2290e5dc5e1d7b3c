"""`maknet retrieve`: the lesions of a data set most similar to one lesion (LesaNet)."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from maknet_jax import console, files
from maknet_jax.ct import png, reading, volumes
from maknet_jax.data import lesions, pipeline, records
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain.ranking import group_of
from maknet_jax.figures import contact_sheet
from maknet_jax.runs import workdir
from maknet_jax.training import sharding

NEIGHBOURS = 6  # read on each side of a DICOM slice: 2 mm even where slices are 0.4 mm apart
_NO_SPACING = "{} does not store its spacing: add --spacing X,Y,Z in mm"


def retrieve(
    folder: str | pathlib.Path,
    image: str | pathlib.Path,
    box: Sequence[float],
    data: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    spacing: tuple[float, float, float] | None = None,
    splits: Sequence[str] | None = None,
    top: int = 11,
    checkpoint: str = "best",
    batch_size: int = 32,
    include_patient: bool = False,
    **overrides: bool,
) -> dict[str, Any]:
    """Writes the most similar lesions as a CSV and, beside it, as a contact sheet.

    Lesions are compared by the cosine of their embeddings, so that a record of the same slice and
    box has similarity 1. By default this record and the other lesions of its patient are left out,
    because they say nothing about how similar lesions of different patients are. The patient is
    known from the file name, if it is DeepLesion's, and from a record of the same pixels. A lesion
    in several splits is listed once, in the first of them.

    Args:
      folder: the workdir of a LesaNet run.
      image: a 16-bit PNG beside those of its neighbour slices, or a DICOM slice.
      box: x0, y0, x1, y1 of the lesion in pixels of the slice, counted from 0.
      data: a data set written by `prepare deeplesion --lesions`.
      out: the CSV; the contact sheet has the same name with .png.
      spacing: (x, y, z) in mm; None takes the file's, which PNGs do not have.
      splits: searches these; None searches all.
      top: number of lesions.
      checkpoint: "best" or "last".
      batch_size: patches per step.
      include_patient: also list the query and the other lesions of its patient.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary: the rows of the CSV as dicts (`found`), the number of lesions of the query's
      patient that were left out (`left_out`), the files and the step of the checkpoint.

    Raises:
      InputError: the run is not a LesaNet run, the image cannot be read, or `data` is not lesion
        data of the same size.
    """
    files.check_file_name(out, ".csv")
    run = workdir.open_run(folder, checkpoint_name=checkpoint)
    dataset = records.open_dataset(data)
    if not run.model.takes_box:
        raise InputError(f"{folder} is not a LesaNet run: choose a run of configs/lesanet.py")
    records.check_size(dataset, run.size)
    query = read_query(image, box, spacing, run.size, reading.Overrides(**overrides))
    embed = make_embed(run)
    size = sharding.round_up_to_devices(batch_size)
    embedding = next(_embedded(embed, [query], size))[1][0]
    lesions_by_patient: dict[str, list[tuple[float, str, int]]] = {}  # (cosine, split, index)
    seen: set[str] = set()
    own = {_patient_of(png.split_name(image)[0])}
    names = splits or list(dataset.info["splits"])
    total = sum(dataset.split(name)["count"] for name in names)
    with console.progress("retrieve", total) as advance:
        for name in names:
            for batch, embeddings in _embedded(embed, dataset.source(name), size):
                cosines = embeddings @ embedding
                # A copied file may lack its neighbours: the middle slices are compared.
                middle = batch["image"][: len(cosines), ..., 1]
                same = (middle == query.image[..., 1]).all(axis=(1, 2))
                for k, cosine in enumerate(cosines):
                    record_id = str(batch["id"][k])
                    if record_id in seen:  # hand-labelled lesions are in the test split, too
                        continue
                    seen.add(record_id)
                    patient = _patient_of(record_id)
                    row = float(cosine), name, int(batch["index"][k])
                    lesions_by_patient.setdefault(patient, []).append(row)
                    if same[k]:
                        own.add(patient)
                advance(len(embeddings))
    left_out = 0
    if not include_patient:
        left_out = sum(len(lesions_by_patient.pop(patient, ())) for patient in own)
    nearest = sorted(
        (row for rows in lesions_by_patient.values() for row in rows),
        key=lambda row: (-row[0], *row[1:]),
    )[:top]
    if not nearest:
        patient = f" besides {left_out} of the query's own patient" if left_out else ""
        raise InputError(
            f"{data} has no lesion in {', '.join(names)}{patient}: choose other splits"
        )
    examples = [dataset.source(name)[index] for _, name, index in nearest]
    header = ["rank", "similarity", "id", "split", "labels"]
    rows = []
    for rank, ((cosine, name, _), example) in enumerate(zip(nearest, examples, strict=True), 1):
        labels = [dataset.vocabulary.names[k] for k in np.flatnonzero(example.labels)]
        rows.append([rank, f"{cosine:.4f}", example.id, name, "|".join(labels)])
    out = pathlib.Path(out)
    console.write_table(out, header, rows)
    shown = [
        dataclasses.replace(
            example, id=f"{cosine:.3f} {example.id}", meta=example.meta | {"split": name}
        )
        for (cosine, name, _), example in zip(nearest, examples, strict=True)
    ]
    sheet = out.with_suffix(".png")
    contact_sheet.write_contact_sheet(sheet, [query, *shown], dataset.vocabulary.names)
    return {
        "found": [dict(zip(header, row, strict=True)) for row in rows],
        "left_out": left_out,
        "files": [str(out), str(sheet)],
        "step": run.step,
    }


def read_query(
    image: str | pathlib.Path,
    box: Sequence[float],
    spacing: Sequence[float] | None,
    size: int,
    overrides: reading.Overrides = reading.STRICT,
) -> records.Example:
    """The patch of a lesion in a file, as an example without labels.

    Args:
      image: see `retrieve`.
      box: see `retrieve`.
      spacing: see `retrieve`.
      size: the edge of the patch in pixels.
      overrides: see `retrieve`.

    Raises:
      InputError: the image cannot be read, its spacing is unknown, or the box is invalid.
    """
    path = pathlib.Path(image)
    try:
        if path.suffix.lower() == ".png":
            if spacing is None:
                raise InputError(_NO_SPACING.format(path))
            patch, inside, _ = lesions.patch_of_png(path, box, spacing, size, overrides)
        else:
            volume, centre = volumes.load_series_of(path, overrides=overrides, around=NEIGHBOURS)
            if centre is None and len(volume.hu) > 1:
                raise InputError(
                    f"{path} has {len(volume.hu)} slices: pass the file of one slice, PNG or DICOM"
                )
            centre = centre or 0
            spacing = spacing or volume.spacing[::-1]
            if not all(math.isfinite(value) for value in spacing[:2]):
                raise InputError(_NO_SPACING.format(path))

            def read(offset: int) -> np.ndarray:
                return volume.hu[np.clip(centre + offset, 0, len(volume.hu) - 1)]

            slices = lesions.three_slices(read, spacing[2])
            patch, inside = lesions.make_patch(slices, box, spacing, size)
    except Rejected as error:
        raise InputError(f"{path}: {png.reason_without_window(error)}") from None
    none = np.zeros(0, np.uint8)
    return records.Example("query", patch, none, none, {"box": inside})


def make_embed(run: workdir.Run) -> Callable[[dict[str, np.ndarray]], jax.Array]:
    """Returns embed(batch) -> embeddings `[B, F]` of length 1, on the devices.

    Args:
      run: a LesaNet run.
    """
    return lambda batch: run.score_with_features(batch)[1]


def _embedded(
    embed: Callable[[dict[str, np.ndarray]], jax.Array],
    source: Sequence[records.Example] | records.RecordSource,
    batch_size: int,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields (batch, embeddings `[B, F]` without those of the padding) of a source in its order."""
    for batch in pipeline.ordered_batches(source, batch_size=batch_size):
        yield batch, np.asarray(embed(batch))[batch["weight"] > 0]


def _patient_of(name: str) -> str:
    """The patient of a record or series of DeepLesion; other names stand for themselves."""
    return group_of(name, {})
