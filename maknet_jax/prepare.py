"""`maknet prepare`: CT and labels -> records (paper, sections 2 and 4.1)."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maknet_jax import console, files
from maknet_jax.ct import pseudonym, reading, search
from maknet_jax.data import (
    deeplesion,
    key_slices,
    labels,
    lesions,
    openkbp,
    records,
    segmentation_plan,
    segmentations,
    shards,
    table,
    triplets,
)
from maknet_jax.data.segmentation_plan import SplitOptions
from maknet_jax.data.segmentations import Rules
from maknet_jax.errors import InputError, NothingUsable
from maknet_jax.figures import contact_sheet

SIZE, PATCH_SIZE = 256, 120  # pixels (section 4.1); mm, LesaNet's
_RULES, _SPLITS = Rules(), SplitOptions()
_SHOWN = 24  # records on the contact sheet
# Entries of `about` that count skipped inputs.
_COUNTED = (
    "series_too_small",
    "series_unreadable",
    "images_missing",
    "cases_without_split",
    "cases_not_found",
    "series_without_segmentation",
)


def prepare_deeplesion(
    images: str | os.PathLike[str],
    info: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    label_file: str | os.PathLike[str] | None = None,
    hand_labels: str | os.PathLike[str] | None = None,
    ontology: str | os.PathLike[str] | None = None,
    patches: bool = False,
    size: int | None = None,
    workers: int = 1,
    **overrides: bool,
) -> dict[str, Any]:
    """Prepares DeepLesion's key slices with LesaNet's body-part labels, one record per lesion.

    Without `label_file` each key slice (or lesion) is one record of the split `unlabelled`.

    Args:
      images: the folder of 16-bit PNGs, nested (`000001_01_01/109.png`) or flat.
      info: the path of `DL_info.csv`.
      out: the folder to write.
      label_file: LesaNet's text-mined labels and split (JSON).
      hand_labels: LesaNet's hand-labelled test set (JSON).
      ontology: LesaNet's ontology (xlsx).
      patches: write patches around the lesions with all 171 labels, for LesaNet; see
        `data.lesions`.
      size: the edge S in pixels, of patches in mm; None takes `SIZE` or `PATCH_SIZE`.
      workers: processes.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary: counts, the paper's counts, and the paths of the files.

    Raises:
      InputError: an input is missing, `out` is in use, or see `deeplesion.number_lesions`.
    """
    size = size or (PATCH_SIZE if patches else SIZE)
    images = pathlib.Path(images)
    read_as = reading.Overrides(**overrides)
    _check(out, size, step=8 if patches else 32)
    if not images.is_dir():
        raise InputError(
            f"--images {images} is not a folder: data/README.md says how to get DeepLesion"
        )
    if (label_file is None) != (ontology is None) or (hand_labels and not label_file):
        raise InputError("--labels and --ontology belong together, and --hand-labels needs both")
    rows = deeplesion.read_info(info)
    vocabulary = labels.Vocabulary(())
    about: dict[str, Any] = {}
    if label_file is None or ontology is None:
        plans = key_slices.plan_unlabelled(rows, patches=patches)
    else:
        vocabulary, labelled, about = key_slices.read_labels(
            rows, label_file, hand_labels, ontology, patches=patches
        )
        plans = key_slices.plan_labelled(labelled, vocabulary)
    splits, missing = key_slices.plan_units(plans, images, size, read_as)
    if not any(splits.values()):
        raise InputError(f"none of the {len(plans)} images is under {images}: check --images")
    about["images_missing"] = len(missing)
    if (pathlib.Path(info).absolute().parents[1] / "phantom.json").is_file():
        about["phantom"] = True  # generated: results are not comparable with the paper's
    return _write(
        out,
        splits,
        key_slices.make_lesion if patches else key_slices.make_key_slice,
        kind="lesions" if patches else "deeplesion",
        size=size,
        vocabulary=vocabulary,
        about=about | read_as.used(),
        workers=workers,
        missing=missing,
    )


def prepare_dicom(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    salt_file: str | os.PathLike[str] | None = None,
    min_slices: int = 51,
    size: int = SIZE,
    workers: int = 1,
    **overrides: bool,
) -> dict[str, Any]:
    """Prepares folders of DICOM or NIfTI as unlabelled triplets without overlap (section 4.1).

    Args:
      folder: a file or a folder tree of CT, an archive, or a DICOMDIR.
      out: the folder to write.
      salt_file: the secret key of the ids, created if absent; None means
        `~/.config/maknet/salt`. It is never written into the records.
      min_slices: smaller volumes are dropped, counted and listed in `failures.csv`. The paper
        uses volumes of more than 50 slices. It is our choice that one unreadable slice rejects its
        whole series.
      size: the edge S of the images in pixels.
      workers: processes.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary.

    Raises:
      InputError: `folder` contains no usable series, or `out` is in use.
    """
    read_as = reading.Overrides(**overrides)
    _check(out, size)
    series, failures = search.find_series(folder, workers=workers, overrides=read_as)
    small = [ref for ref in series if ref.count < min_slices]
    usable = [ref for ref in series if ref.count >= min_slices]
    about = {
        "series": len(usable),
        "min_slices": min_slices,
        "series_too_small": len(small),
        "series_unreadable": len(failures),
    }
    failures += [
        (ref.paths[0], f"{ref.count} slices, fewer than --min-slices {min_slices}") for ref in small
    ]
    if not usable:
        why = (
            f"{len(series)} series found, {len(small)} of fewer than {min_slices} slices "
            f"(--min-slices), {len(failures) - len(small)} unreadable"
        )
        with console.list_failures(pathlib.Path(out) / "failures.csv"):
            raise NothingUsable(f"no usable series in {folder}: {why}", failures)
    salt = pseudonym.read_salt(salt_file, log=console.Log())
    return _write(
        out,
        {"unlabelled": triplets.plan_series(usable, salt, size, read_as)},
        triplets.make_series,
        kind="dicom",
        size=size,
        vocabulary=labels.Vocabulary(()),
        about=about | read_as.used(),
        workers=workers,
        failures=failures,
    )


def prepare_table(
    csv_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    png_window: tuple[float, float] | None = None,
    size: int = SIZE,
    workers: int = 1,
    **overrides: bool,
) -> dict[str, Any]:
    """Prepares your own labelled slices from a CSV of `path, labels, split[, slice, patient]`.

    Args:
      csv_file: the table; paths are relative to its folder (see `data.table`).
      out: the folder to write.
      png_window: (low, high) in HU of 8-bit PNGs.
      size: the edge S of the images in pixels.
      workers: processes.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary.

    Raises:
      InputError: the table is invalid, or `out` is in use.
    """
    read_as = reading.Overrides(**overrides)
    _check(out, size)
    rows, vocabulary = table.read_table(csv_file)
    return _write(
        out,
        triplets.plan_table(rows, vocabulary, png_window, size, read_as),
        triplets.make_table_volume,
        kind="table",
        size=size,
        vocabulary=vocabulary,
        about={"rows": len(rows), "png_window": png_window} | read_as.used(),
        workers=workers,
    )


def prepare_segmentations(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    label_table: str | os.PathLike[str] | None = None,
    rules: Rules = _RULES,
    splits: SplitOptions = _SPLITS,
    origin: Mapping[str, str] | None = None,
    salt_file: str | os.PathLike[str] | None = None,
    size: int = SIZE,
    workers: int = 1,
    **overrides: bool,
) -> dict[str, Any]:
    """Prepares CT with organ masks as labelled slices, see `data.segmentations`.

    Args:
      folders: the cases, see `data.segmentation_cases`; `SPLIT=PATH` puts a folder into one split.
      out: the folder to write.
      label_table: a CSV of mask,label, or `totalsegmentator`; None makes every mask a label.
      rules: how masks become labels.
      splits: how cases are split.
      origin: `source`, `citation` and `licence` of the data; runs that train on them record these.
      salt_file: the secret key of the ids of DICOM cases, as in `prepare_dicom`.
      size: the edge S of the images in pixels.
      workers: processes.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary; `label_counts` are rows of label, split, records, known, present, unknown.

    Raises:
      InputError: no case can be used, a table or rule is invalid, a patient is in two splits, or
        `out` is in use.
    """
    read_as = reading.Overrides(**overrides)
    _check(out, size)
    with console.list_failures(pathlib.Path(out) / "failures.csv"):
        plan = segmentation_plan.plan(
            folders, label_table, rules=rules, splits=splits, workers=workers, overrides=read_as
        )
    dicom = any(case.ref.kind == "dicom" for case, _ in plan.members)
    salt = pseudonym.read_salt(salt_file, log=console.Log()) if dicom else ""
    return _write(
        out,
        segmentations.plan_cases(
            plan.members, plan.labels, rules=rules, size=size, salt=salt, overrides=read_as
        ),
        segmentations.make_case,
        kind="segmentations",
        size=size,
        vocabulary=labels.Vocabulary.from_names(plan.labels),
        about={**(origin or {}), **plan.about, **read_as.used()},
        workers=workers,
        failures=plan.failures,
        missing=plan.missing,
        cases=[(case.name, case.patient, split) for case, split in plan.members],
    )


def prepare_openkbp(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Converts patients of the OpenKBP release to NIfTI for `prepare_segmentations`.

    Args:
      folder: a folder of `pt_N/*.csv`, such as `provided-data/train-pats`.
      out: the folder to write, in TotalSegmentator's layout; finished patients are skipped.

    Returns:
      The summary: patients, patients converted by an earlier call, and failures.

    Raises:
      InputError: `folder` has no such patients.
    """
    out = pathlib.Path(out)
    patients = openkbp.find_patients(folder)
    with console.progress("prepare openkbp", len(patients)) as advance:
        present, failures = openkbp.convert_all(patients, out, advance)
    console.write_failures(out / "failures.csv", failures)
    counts = {"patients": len(patients) - len(failures), "present_before": present}
    return {"out": str(out), **counts, "failures": len(failures)}


def _check(out: str | os.PathLike[str], size: int, step: int = 32) -> None:
    # Called before anything is read, because searching a tree of CT can take a long time.
    if size % step:
        why = "networks halve it five times" if step == 32 else "as LesaNet's 120 is"
        raise InputError(f"--size {size} should be a multiple of {step}: {why}")
    shards.check_unfinished(out)


def _write(
    out: str | os.PathLike[str],
    splits: Mapping[str, Sequence[shards.AnyUnit]],
    make: Callable[[shards.AnyUnit], shards.UnitResult],
    *,
    kind: str,
    size: int,
    vocabulary: labels.Vocabulary,
    about: dict[str, Any],
    workers: int,
    failures: Sequence[tuple[str, str]] = (),
    missing: Sequence[tuple[str, str]] = (),
    cases: Sequence[tuple[str, str, str]] = (),
) -> dict[str, Any]:
    """Writes the shards, the contact sheet and the reports; returns the summary."""
    out = pathlib.Path(out)
    with (
        console.list_failures(out / "failures.csv"),
        console.progress(f"prepare {kind}", sum(map(len, splits.values()))) as advance,
    ):
        info, failures = shards.write_shards(
            out,
            splits,
            make,
            kind=kind,
            size=size,
            vocabulary=vocabulary,
            about=about,
            workers=workers,
            advance=advance,
            failures=failures,
        )
    if kind == "lesions":
        info["crop"] = lesions.RULE
    examples = records.Dataset(out, info).sample(_SHOWN)
    contact_sheet.write_contact_sheet(out / "contact_sheet.png", examples, vocabulary.names)
    console.write_failures(out / "failures.csv", failures)
    console.write_failures(out / "missing.csv", missing)
    summary = {
        "out": str(out),
        "records": {name: split["count"] for name, split in info["splits"].items()},
        "labels": len(vocabulary),
        "failures": len(failures),
        "counters": info["counters"],
        "about": about,
    }
    if cases:
        console.write_table(out / "cases.csv", ("case", "patient", "split"), cases)
        rows = segmentations.label_rows(vocabulary, info["splits"])
        console.write_table(out / "label_counts.csv", segmentations.LABEL_COLUMNS, rows)
        summary["label_counts"] = rows
    files.write_json(out / "summary.json", summary)
    with console.Log(out / "log.jsonl") as log:
        log.event(event="prepared", **summary)
    shards.finish(out, info)
    return summary


def describe(summary: dict[str, Any]) -> str:
    """Formats the summary as a few lines of text, with the paper's counts if there are any."""
    lines = []
    about = summary["about"]
    if "numbering" in about:
        lines.append(f"lesions are {about['numbering']}")
        header = ["split", "labelled", "no row", "noisy", "no image", "records", "paper"]
        rows = []
        for split, counts in about["label_counts"].items():
            written = summary["records"].get(split, 0)
            first = [counts[name] for name in ("labelled", "without_row", "noisy")]
            absent = counts["kept"] - written
            rows.append([split, *first, absent, written, about["paper_counts"][split]])
        lines.append(console.format_table(header, rows))
    else:
        lines += [f"{split}: {count} records" for split, count in summary["records"].items()]
    if "label_counts" in summary:
        lines.append(console.format_table(segmentations.LABEL_COLUMNS, summary["label_counts"]))
    for name in _COUNTED:
        if about.get(name):
            lines.append(f"{name.replace('_', ' ')}: {about[name]}")
    lines += [f"{name}: {count}" for name, count in summary["counters"].items()]
    if summary["failures"]:
        lines.append(f"rejected: {summary['failures']}, see {summary['out']}/failures.csv")
    lines.append(f"look at {summary['out']}/contact_sheet.png")
    return "\n".join(lines)
