"""`maknet prepare`: CT and labels -> records (paper, sections 2 and 4.1)."""

import dataclasses
import pathlib

import numpy as np

from maknet_jax import console, files
from maknet_jax.ct import preprocess, pseudonym, volumes
from maknet_jax.data import deeplesion, labels, lesions, records, shards, table
from maknet_jax.errors import InputError, Rejected
from maknet_jax.figures import contact_sheet

_SHOWN = 24  # records on the contact sheet


@dataclasses.dataclass(frozen=True)
class _KeySlice:
    """One record of DeepLesion: a key slice and the labels of one lesion on it."""

    id: str
    path: str
    labels: bytes
    label_mask: bytes
    meta: tuple
    size: int
    count: int = 1


@dataclasses.dataclass(frozen=True)
class _Series:
    """The records of one unlabelled volume."""

    ref: volumes.SeriesRef
    salt: str
    size: int
    count: int


@dataclasses.dataclass(frozen=True)
class _TableVolume:
    """The rows of a table that name slices of one file or folder."""

    path: str
    rows: tuple[table.Row, ...]
    labels: tuple[bytes, ...]
    png_window: tuple[float, float] | None
    size: int
    count: int


def prepare_deeplesion(
    images,
    info,
    out,
    *,
    label_file=None,
    hand_labels=None,
    ontology=None,
    patches=False,
    size=256,
    workers=1,
):
    """DeepLesion's key slices with LesaNet's body-part labels; every lesion is one record.

    Without `label_file` each key slice, or lesion, becomes one record of the split `unlabelled`.

    Args:
      images: the folder of 16-bit PNGs, nested (`000001_01_01/109.png`) or flat.
      info: `DL_info.csv`.
      out: the folder to write.
      label_file: LesaNet's text-mined labels and split (JSON).
      hand_labels: LesaNet's hand-labelled test set (JSON).
      ontology: LesaNet's ontology (xlsx).
      patches: patches around the lesions with all 171 labels, for LesaNet, see `data.lesions`.
      size: the edge S of the images; of patches in mm.
      workers: processes.

    Returns:
      The summary: counts beside the paper's, and where the files are.

    Raises:
      InputError: see `deeplesion.number_lesions`; an input is missing; `out` is taken.
    """
    images = pathlib.Path(images)
    _check(out, size, step=8 if patches else 32)
    if not images.is_dir():
        raise InputError(f"--images {images} is no folder: see data/README.md for DeepLesion")
    if (label_file is None) != (ontology is None) or (hand_labels and not label_file):
        raise InputError("--labels and --ontology belong together, and --hand-labels needs both")
    rows = deeplesion.read_info(info)
    if label_file is None:
        vocabulary, about = labels.Vocabulary(()), {}
        chosen = {f"{row.slice_id}#{row.row + 1}" if patches else row.slice_id: row for row in rows}
        wanted = [("unlabelled", name, row, (b"", b""), {}) for name, row in chosen.items()]
    else:
        given = (label_file, hand_labels, ontology)
        vocabulary, labelled, about = _label_rows(rows, *given, patches=patches)
        wanted = [
            (
                lesion.split,
                f"{lesion.lesion.slice_id}#{lesion.lesion_idx}",
                lesion.lesion,
                _vectors(vocabulary, lesion),
                {"lesion_idx": lesion.lesion_idx},
            )
            for lesion in labelled
        ]
    splits, missing = {split: [] for split, *_ in wanted}, []
    for split, record, row, vectors, meta in wanted:
        path = deeplesion.find_image(images, row.file_name)
        if path is None:
            missing.append((row.file_name, f"image of {record} ({split}) is not under {images}"))
            continue
        meta = {"file": row.file_name, "slice_box": row.box, "spacing": row.spacing, **meta}
        splits[split].append(_KeySlice(record, str(path), *vectors, tuple(meta.items()), size))
    if not any(splits.values()):
        raise InputError(f"none of the {len(wanted)} images is under {images}: check --images")
    about["images_missing"] = len(missing)
    return _write(
        out,
        splits,
        _make_lesion if patches else _make_key_slice,
        kind="lesions" if patches else "deeplesion",
        size=size,
        vocabulary=vocabulary,
        about=about,
        workers=workers,
        missing=missing,
    )


def _label_rows(rows, label_file, hand_labels, ontology, *, patches):
    mined = deeplesion.read_mined_labels(label_file)
    hand = deeplesion.read_hand_labels(hand_labels) if hand_labels else None
    terms = labels.read_ontology(ontology)
    labels.ontology_vocabulary(terms, mined.terms)  # checks that all are known
    kept = [term for term in mined.terms if patches or terms[term].label_class == "bodypart"]
    vocabulary = labels.ontology_vocabulary(terms, kept)
    numbering = deeplesion.number_lesions(rows, mined)
    found, counts = deeplesion.label_lesions(numbering, mined, hand, vocabulary, doubtful=patches)
    about = {"numbering": numbering.reason, "label_counts": counts}
    # The paper counts lesions with a body part only.
    about["paper_counts"] = dict.fromkeys(counts, "-") if patches else deeplesion.PAPER_COUNTS
    return vocabulary, found, about


def _vectors(vocabulary, lesion):
    """Labels and mask of a lesion as LesaNet has them.

    The truth is what the reports say, ancestors not added (the mined lists bring most of them).
    Uncertain labels and their ancestors are unknown, but for those that are sure after all and
    those that a sure one excludes.
    """
    sure = set(lesion.names)
    unknown = [
        name
        for name in vocabulary.with_ancestors(lesion.unknown)
        if name in vocabulary.index and name not in sure and not vocabulary.excludes(name, sure)
    ]
    return vocabulary.vector(lesion.names).tobytes(), (1 - vocabulary.vector(unknown)).tobytes()


def _make_key_slice(unit):
    try:
        volume, centre = volumes.load_series_of(unit.path)
    except (Rejected, InputError) as error:
        return shards.Made(failures=((unit.path, str(error)),))
    slices = preprocess.neighbours(volume.hu, centre)
    image, box = preprocess.make_triplet(slices, unit.size)
    meta = dict(unit.meta) | {"crop": box}
    example = _example(unit.id, image, unit.labels, unit.label_mask, meta)
    return shards.Made((example,), counters={"neighbours repeated": 3 - len(volume.hu)})


def _make_lesion(unit):
    meta = dict(unit.meta)
    try:  # DL_info counts pixels from 1
        made = lesions.patch_of_png(
            unit.path, [place - 1 for place in meta["slice_box"]], meta["spacing"], unit.size
        )
    except (Rejected, InputError) as error:
        return shards.Made(failures=((unit.path, str(error)),))
    image, meta["box"], repeated = made
    example = _example(unit.id, image, unit.labels, unit.label_mask, meta)
    return shards.Made((example,), counters={"neighbours repeated": repeated})


def _example(record_id, image, vector, mask, meta):
    vector = np.frombuffer(vector, np.uint8)
    mask = np.frombuffer(mask, np.uint8)
    return records.encode(records.Example(record_id, image, vector, mask, meta)), vector


def prepare_dicom(folder, out, *, salt_file=None, min_slices=51, size=256, workers=1):
    """Folders of DICOM or NIfTI -> unlabelled triplets without overlap (paper, section 4.1).

    Args:
      folder: a file or a tree of CT.
      out: the folder to write.
      salt_file: the secret that ids are made with; made where it does not exist. None takes
        `~/.config/maknet/salt`. It is never written into the records.
      min_slices: smaller volumes are left out, counted (the paper keeps more than 50 slices).
      size: the edge S of the images.
      workers: processes.

    Returns:
      The summary.

    Raises:
      InputError: nothing usable is there, or `out` is taken.
    """
    _check(out, size)
    found, failures = volumes.find_series(folder, workers=workers)
    small = [ref for ref in found if ref.count < min_slices]
    kept = [ref for ref in found if ref.count >= min_slices]
    if not kept:
        why = f"{len(found)} series found, {len(small)} of fewer than {min_slices} slices, "
        first = f"; the first: {failures[0][0]}: {failures[0][1]}" if failures else ""
        raise InputError(f"no usable series in {folder}: {why}{len(failures)} unreadable{first}")
    salt = pseudonym.read_salt(salt_file, log=console.Log())
    units = [
        _Series(ref, salt, size, len(preprocess.centres(ref.count, overlap=False))) for ref in kept
    ]
    about = {
        "series": len(kept),
        "min_slices": min_slices,
        "series_too_small": len(small),
        "series_unreadable": len(failures),
    }
    failures += [
        (ref.paths[0], f"{ref.count} slices, --min-slices asks for {min_slices}") for ref in small
    ]
    return _write(
        out,
        {"unlabelled": units},
        _make_series,
        kind="dicom",
        size=size,
        vocabulary=labels.Vocabulary(()),
        about=about,
        workers=workers,
        failures=failures,
    )


def _make_series(unit):
    try:
        volume = volumes.load_series(unit.ref)
    except Rejected as error:
        return shards.Made(failures=((unit.ref.paths[0], str(error)),))
    series = pseudonym.pseudonym(unit.salt, volume.series)
    examples = []
    for centre in preprocess.centres(len(volume.hu), overlap=False):
        slices = preprocess.neighbours(volume.hu, centre)
        image, box = preprocess.make_triplet(slices, unit.size)
        meta = {"series": series, "slice": centre, "slices": len(volume.hu), "crop": box}
        meta["spacing"] = [None if np.isnan(x) else float(x) for x in volume.spacing]
        name = f"{series}-{pseudonym.pseudonym(unit.salt, volume.uids[centre])}"
        examples.append(_example(name, image, b"", b"", meta))
    left = len(volume.hu) - 3 * len(examples)
    return shards.Made(tuple(examples), counters={"slices left over": left})


def prepare_table(csv_file, out, *, png_window=None, size=256, workers=1):
    """Your own labelled slices: a CSV of `path, labels, split[, slice, patient]`.

    Args:
      csv_file: the table; paths are relative to its folder (see `data.table`).
      out: the folder to write.
      png_window: (low, high) HU of 8-bit PNGs.
      size: the edge S of the images.
      workers: processes.

    Returns:
      The summary.

    Raises:
      InputError: the table breaks a rule, or `out` is taken.
    """
    _check(out, size)
    rows, vocabulary = table.read_table(csv_file)
    grouped = {}
    for row in rows:
        grouped.setdefault((row.split, row.path), []).append(row)
    splits = {split: [] for split in dict.fromkeys(row.split for row in rows)}
    for (split, path), members in grouped.items():
        vectors = tuple(vocabulary.vector(row.labels).tobytes() for row in members)
        splits[split].append(
            _TableVolume(path, tuple(members), vectors, png_window, size, len(members))
        )
    about = {"rows": len(rows), "png_window": png_window}
    return _write(
        out,
        splits,
        _make_table_volume,
        kind="table",
        size=size,
        vocabulary=vocabulary,
        about=about,
        workers=workers,
    )


def _make_table_volume(unit):
    try:
        volume, named = volumes.load_series_of(unit.path, png_window=unit.png_window)
    except (Rejected, InputError) as error:
        return shards.Made(failures=tuple((row.where, str(error)) for row in unit.rows))
    threshold = preprocess.body_threshold(volume.hu, unit.png_window)
    examples, failures = [], []
    for row, vector in zip(unit.rows, unit.labels, strict=True):
        try:
            centre = table.slice_index(row, volume, named)
        except InputError as error:
            failures.append((row.where, str(error)))
            continue
        slices = preprocess.neighbours(volume.hu, centre)
        image, box = preprocess.make_triplet(slices, unit.size, threshold=threshold)
        meta = {"line": row.line, "slice": centre, "slices": len(volume.hu), "crop": box}
        examples.append(_example(f"line-{row.line:06d}", image, vector, b"\1" * len(vector), meta))
    return shards.Made(tuple(examples), tuple(failures))


def _check(out, size, step=32):
    # Before anything is read: a tree of CT can take long to look through.
    if size % step:
        why = "networks halve five times" if step == 32 else "as LesaNet's 120"
        raise InputError(f"--size {size} should be a multiple of {step}: {why}")
    shards.check_unfinished(out)


def _write(out, splits, make, *, failures=(), missing=(), **plan):
    out = pathlib.Path(out)
    units = sum(map(len, splits.values()))
    with console.progress(f"prepare {plan['kind']}", units) as advance:
        info, new = shards.write_shards(out, splits, make, advance=advance, **plan)
    failures = [*failures, *new]
    if plan["kind"] == "lesions":
        info["crop"] = lesions.RULE
    names = plan["vocabulary"].names
    examples = records.Dataset(out, info).sample(_SHOWN)
    contact_sheet.write_contact_sheet(out / "contact_sheet.png", examples, names)
    console.write_failures(out / "failures.csv", failures)
    console.write_failures(out / "missing.csv", missing)
    summary = {
        "out": str(out),
        "records": {name: split["count"] for name, split in info["splits"].items()},
        "labels": len(names),
        "failures": len(failures),
        "counters": info["counters"],
        "about": plan["about"],
    }
    files.write_json(out / "summary.json", summary)
    with console.Log(out / "log.jsonl") as log:
        log.event(event="prepared", **summary)
    shards.finish(out, info)
    return summary


def describe(summary):
    """A few lines for a person: what was made, beside the paper's counts where there are any."""
    lines = []
    about = summary["about"]
    if "numbering" in about:
        lines.append(f"lesions are {about['numbering']}")
        header = ["split", "labelled", "no row", "noisy", "no image", "records", "paper"]
        rows = []
        for split, counts in about["label_counts"].items():
            made = summary["records"].get(split, 0)
            first = [counts[name] for name in ("labelled", "without_row", "noisy")]
            absent = counts["kept"] - made
            rows.append([split, *first, absent, made, about["paper_counts"][split]])
        lines.append(console.format_table(header, rows))
    else:
        lines += [f"{split}: {count} records" for split, count in summary["records"].items()]
    for name in ("series_too_small", "series_unreadable", "images_missing"):
        if about.get(name):
            lines.append(f"{name.replace('_', ' ')}: {about[name]}")
    lines += [f"{name}: {count}" for name, count in summary["counters"].items()]
    if summary["failures"]:
        lines.append(f"rejected: {summary['failures']}, see {summary['out']}/failures.csv")
    lines.append(f"look at {summary['out']}/contact_sheet.png")
    return "\n".join(lines)
