"""`maknet prepare`: CT and labels -> records (paper, sections 2 and 4.1)."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, Generic

from maknet_jax import console, files
from maknet_jax.ct import pseudonym, reading
from maknet_jax.data import (
    cluster,
    deeplesion,
    key_slices,
    labels,
    lesions,
    overview,
    records,
    segmentation_plan,
    segmentations,
    series_search,
    shards,
    table,
    triplets,
    unit_results,
    worker_pool,
)
from maknet_jax.data.openkbp import prepare_openkbp as prepare_openkbp
from maknet_jax.data.overview import describe as describe
from maknet_jax.data.segmentation_plan import SplitOptions
from maknet_jax.data.segmentations import Rules
from maknet_jax.errors import InputError
from maknet_jax.figures import contact_sheet, dataset_page
from maknet_jax.runs import ownership

SIZE, PATCH_SIZE = 256, 120  # pixels (section 4.1); mm, LesaNet's
_RULES, _SPLITS = Rules(), SplitOptions()
_SHOWN = 24  # records on the contact sheet


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
    scheduler: str | None = None,
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
      scheduler: the address of a Dask scheduler, whose workers replace them.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary: counts, the paper's counts, and the paths of the files.

    Raises:
      InputError: an input is missing, `out` is in use, or see `deeplesion.number_lesions`.
    """
    size = size or (PATCH_SIZE if patches else SIZE)
    images = pathlib.Path(images)
    read_as = reading.Overrides(**overrides)
    _check(out, size, scheduler, step=8 if patches else 32)
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
    make = key_slices.make_lesion if patches else key_slices.make_key_slice
    kind = "lesions" if patches else "deeplesion"
    about |= read_as.used()
    content = _DataSet(kind, splits, make, size, vocabulary, about, missing=missing)
    return _write(out, content, workers=workers, scheduler=scheduler)


def prepare_dicom(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    salt_file: str | os.PathLike[str] | None = None,
    pseudonyms: bool = False,
    min_slices: int = 51,
    size: int = SIZE,
    workers: int = 1,
    scheduler: str | None = None,
    **overrides: bool,
) -> dict[str, Any]:
    """Prepares folders of DICOM or NIfTI as unlabelled triplets without overlap (section 4.1).

    Args:
      folder: a file or a folder tree of CT, an archive, or a DICOMDIR.
      out: the folder to write.
      salt_file: the secret key of the ids, created if absent; None means
        `~/.config/maknet/salt`. It is never written into the records.
      pseudonyms: write them instead of names in `failures.csv`, too.
      min_slices: smaller volumes are dropped, counted and listed in `failures.csv`. The paper
        uses volumes of more than 50 slices. It is our choice that one unreadable slice rejects its
        whole series.
      size: the edge S of the images in pixels.
      workers: processes.
      scheduler: the address of a Dask scheduler, whose workers replace them.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary.

    Raises:
      InputError: `folder` contains no usable series, or `out` is in use.
    """
    read_as = reading.Overrides(**overrides)
    _check(out, size, scheduler)
    hidden = pseudonym.read_pseudonyms(pseudonyms, salt_file)
    with cluster.start_local(workers, scheduler, module=triplets.__name__) as pool:
        series, failures = series_search.find_series(
            folder, pool, workers=workers, overrides=read_as
        )
        with console.list_failures(pathlib.Path(out) / "failures.csv", hidden):
            usable, about = series_search.choose(folder, series, failures, min_slices)
        if pool and not pool.is_ready() and series_search.is_small(usable):
            pool, workers = None, 1
        salt = pseudonym.read_salt(salt_file, log=console.Log())
        splits = {"unlabelled": triplets.plan_series(usable, salt, size, read_as)}
        about |= read_as.used()
        make, division, none = triplets.make_series, triplets.DIVISION, labels.Vocabulary(())
        content = _DataSet("dicom", splits, make, size, none, about, failures, division=division)
        return _write(out, content, workers=workers, scheduler=scheduler, pool=pool, hidden=hidden)


def prepare_table(
    csv_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    png_window: tuple[float, float] | None = None,
    pseudonyms: bool = False,
    salt_file: str | os.PathLike[str] | None = None,
    size: int = SIZE,
    workers: int = 1,
    scheduler: str | None = None,
    **overrides: bool,
) -> dict[str, Any]:
    """Prepares your own labelled slices from a CSV of path, labels, split and optional columns.

    `slice`, `patient` and `unknown` are optional.

    Args:
      csv_file: the table; paths are relative to its folder (see `data.table`).
      out: the folder to write.
      png_window: (low, high) in HU of 8-bit PNGs.
      pseudonyms: write them instead of names in `failures.csv`.
      salt_file: the secret key of the pseudonyms, as in `prepare_dicom`.
      size: the edge S of the images in pixels.
      workers: processes.
      scheduler: the address of a Dask scheduler, whose workers replace them.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary.

    Raises:
      InputError: the table is invalid, or `out` is in use.
    """
    read_as = reading.Overrides(**overrides)
    _check(out, size, scheduler)
    warnings: list[str] = []
    rows, vocabulary = table.read_table(csv_file, warnings.append)
    for text in warnings:
        console.Log().say(f"warning: {csv_file}: {text}")
    splits = triplets.plan_table(rows, vocabulary, png_window, size, read_as)
    about = {"rows": len(rows), "png_window": png_window, "warnings": warnings} | read_as.used()
    content = _DataSet("table", splits, triplets.make_table_volume, size, vocabulary, about)
    hidden = pseudonym.read_pseudonyms(pseudonyms, salt_file)
    return _write(out, content, workers=workers, scheduler=scheduler, hidden=hidden)


def prepare_segmentations(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    label_table: str | os.PathLike[str] | None = None,
    rules: Rules = _RULES,
    splits: SplitOptions = _SPLITS,
    origin: Mapping[str, str] | None = None,
    salt_file: str | os.PathLike[str] | None = None,
    pseudonyms: bool = False,
    size: int = SIZE,
    workers: int = 1,
    scheduler: str | None = None,
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
      pseudonyms: write them instead of all names: in the records, and in all tables.
      size: the edge S of the images in pixels.
      workers: processes.
      scheduler: the address of a Dask scheduler, whose workers replace them.
      **overrides: `assume_hu` and `allow_lossy`, see `ct.reading.Overrides`.

    Returns:
      The summary; `label_counts` are rows of label, split, records, known, present, unknown.

    Raises:
      InputError: no case can be used, a table or rule is invalid, a patient is in two splits, or
        `out` is in use.
    """
    read_as = reading.Overrides(**overrides)
    _check(out, size, scheduler)
    hidden = pseudonym.read_pseudonyms(pseudonyms, salt_file)
    with console.list_failures(pathlib.Path(out) / "failures.csv", hidden):
        plan = segmentation_plan.plan(
            folders, label_table, rules=rules, splits=splits, workers=workers, overrides=read_as
        )
    secret = pseudonyms or any(case.ref.kind == "dicom" for case, _ in plan.members)
    salt = pseudonym.read_salt(salt_file, log=console.Log()) if secret else ""
    how: dict[str, Any] = {"salt": salt, "pseudonyms": pseudonyms, "overrides": read_as}
    content = _DataSet(
        splits=segmentations.plan_cases(plan.members, plan.labels, rules=rules, size=size, **how),
        make=segmentations.make_case,
        kind="segmentations",
        size=size,
        vocabulary=labels.Vocabulary.from_names(plan.labels),
        about={**(origin or {}), **plan.about, **read_as.used()},
        failures=plan.failures,
        missing=plan.missing,
        cases=[(case.name, case.patient, split) for case, split in plan.members],
    )
    return _write(out, content, workers=workers, scheduler=scheduler, hidden=hidden)


def _check(out: str | os.PathLike[str], size: int, scheduler: str | None, step: int = 32) -> None:
    # Called before anything is read, because searching a tree of CT can take a long time.
    if size % step:
        why = "networks halve it five times" if step == 32 else "as LesaNet's 120 is"
        raise InputError(f"--size {size} should be a multiple of {step}: {why}")
    shards.check_start(out, scheduler)


@dataclasses.dataclass(frozen=True)
class _DataSet(Generic[unit_results.AnyUnit]):
    """The content of a data set before it is written.

    Attributes:
      kind: deeplesion, lesions, dicom, table or segmentations.
      splits: split -> units of work.
      make: unit -> its records.
      size: the edge S in pixels.
      vocabulary: the labels.
      about: how the units were chosen, recorded in `dataset.json`.
      failures: (input, reason) of what was rejected while planning.
      missing: (input, reason) of inputs that were not found.
      cases: (case, patient, split) for `cases.csv`.
      division: how long units are divided among the workers; None leaves them whole.
    """

    kind: str
    splits: Mapping[str, Sequence[unit_results.AnyUnit]]
    make: Callable[[unit_results.AnyUnit], unit_results.UnitResult]
    size: int
    vocabulary: labels.Vocabulary
    about: dict[str, Any]
    failures: Sequence[tuple[str, str]] = ()
    missing: Sequence[tuple[str, str]] = ()
    cases: Sequence[tuple[str, str, str]] = ()
    division: unit_results.Division | None = None


def _write(
    out: str | os.PathLike[str],
    content: _DataSet[unit_results.AnyUnit],
    *,
    workers: int,
    scheduler: str | None,
    pool: worker_pool.Pool | None = None,
    hidden: pseudonym.Pseudonyms | None = None,
) -> dict[str, Any]:
    """Writes the shards and the reports; returns the summary."""
    out = pathlib.Path(out)
    units = sum(map(len, content.splits.values()))
    with (
        ownership.owned(out, "maknet prepare", "--out"),
        console.list_failures(out / "failures.csv", hidden),
        console.progress(f"prepare {content.kind}", units) as advance,
    ):
        info, failures = shards.write_shards(
            out,
            content.splits,
            content.make,
            kind=content.kind,
            size=content.size,
            vocabulary=content.vocabulary,
            about=content.about,
            workers=workers,
            scheduler=scheduler,
            pool=pool,
            advance=advance,
            failures=content.failures,
            division=content.division,
        )
        info["counters"], info["volumes"] = overview.separate(info["counters"])
        info["rejected"], info["missing"] = map(overview.by_reason, (failures, content.missing))
        if content.kind == "lesions":
            info["crop"] = lesions.RULE
        summary = _write_reports(out, content, info, failures, hidden)
        shards.finish(out, info)
    return summary


def _write_reports(
    out: pathlib.Path,
    content: _DataSet[unit_results.AnyUnit],
    info: dict[str, Any],
    failures: Sequence[tuple[str, str]],
    hidden: pseudonym.Pseudonyms | None,
) -> dict[str, Any]:
    """Writes the contact sheet, the page and the tables; returns the summary."""
    missing, cases = content.missing, content.cases
    if hidden:
        failures, missing = hidden.failures(failures), hidden.failures(missing)
        cases = [(hidden.name(name), hidden.name(patient), split) for name, patient, split in cases]
    examples = (dataset := records.Dataset(out, info)).sample(_SHOWN)
    names = content.vocabulary.names
    console.write_failures(out / "failures.csv", failures)
    console.write_failures(out / "missing.csv", missing)
    summary = {
        "out": str(out),
        "records": {name: split["count"] for name, split in info["splits"].items()},
        "labels": len(names),
        "failures": len(failures),
        "counters": info["counters"],
        "about": content.about,
    }
    if cases:
        console.write_table(out / "cases.csv", ("case", "patient", "split"), cases)
    if content.kind in ("segmentations", "table"):
        rows = segmentations.label_rows(content.vocabulary, info["splits"])
        console.write_table(out / "label_counts.csv", overview.LABEL_COLUMNS, rows)
        summary["label_counts"] = rows
    with futures.ThreadPoolExecutor(1) as thread, files.write_whole(out / "index.html") as page:
        sheet = out / "contact_sheet.png", examples, names
        written = thread.submit(contact_sheet.write_contact_sheet, *sheet)
        title = f"Data set: {dataset.origin['source'] or content.kind}"
        beside = overview.beside_the_paper(summary)
        page.write(dataset_page.render(title, info, examples, names, beside))
        written.result()
    files.write_json(out / "summary.json", summary)
    with console.Log(out / "log.jsonl") as log:
        log.event(event="prepared", **summary)
    return summary
