"""Selects the images to explain: images of a prepared split, or slices of CT files."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from maknet_jax import console
from maknet_jax.ct import preprocess, search, volumes
from maknet_jax.ct.pseudonym import Pseudonyms, read_pseudonyms
from maknet_jax.data import records
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain import source_slices
from maknet_jax.explain.label_names import label_columns
from maknet_jax.explain.options import SelectionOptions
from maknet_jax.explain.ranking import best_slices, group_of, label_scores
from maknet_jax.explain.truth import Annotation, Truth, labels_are_complete
from maknet_jax.runs import workdir

NO_LABELS = Truth("unknown", "no labels")


@dataclasses.dataclass(frozen=True)
class SelectedImage:
    """One image to explain.

    Attributes:
      id: id of the record, or SERIES:NUMBER of a slice.
      image: int16 HU `[S, S, 3]`.
      annotation: its labels; None without labels, or with labels of another vocabulary.
      meta: the source of the image, see `records.Example`.
      regions: name -> bool `[S, S]`, see `masks.find_regions`.
      private: the fields of `meta` that are not written.
      slice_hu: int16 HU `[H, W]`, the part of the CT slice that the image shows, at the resolution
        of the CT; None if the CT is not available.
      flags: what is doubtful about it, as `maknet predict` flags its series and slice.
    """

    id: str
    image: np.ndarray
    annotation: Annotation | None
    meta: dict[str, Any]
    regions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    private: tuple[str, ...] = ()
    slice_hu: np.ndarray | None = None
    flags: tuple[str, ...] = ()

    @property
    def public_meta(self) -> dict[str, Any]:
        """The fields of `meta` that are written."""
        return {name: value for name, value in self.meta.items() if name not in self.private}

    def truth(self, column: int) -> Truth:
        """What is known about the label of a column."""
        return self.annotation.truth(column) if self.annotation else NO_LABELS

    @property
    def labelled(self) -> np.ndarray:
        """The columns of the labels that are annotated and known."""
        if self.annotation is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero((self.annotation.labels > 0) & (self.annotation.label_mask > 0))

    def metadata(self, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The metadata of its result, see `results.save`; `models` has one entry per network."""
        fields = {"id": self.id, "group": self.group, "meta": self.public_meta}
        return fields | {"flags": list(self.flags), "models": list(models)}

    @property
    def group(self) -> str:
        """The patient, else the series: images of one group are not independent."""
        return group_of(self.id, self.meta)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The selected images and where they came from.

    Attributes:
      readers: one function per image that reads it; raises Rejected(input, reason).
      failures: (input, reason) of inputs that could not even be listed.
      identity: JSON, equal for equal selections.
      rule: the number of images, and the rule that selected them.
    """

    readers: list[Callable[[], SelectedImage]]
    failures: list[tuple[str, str]]
    identity: dict[str, Any]
    rule: str = ""


class Scored(Protocol):
    """The predictions of the slices of a volume, `evaluation.series.SeriesResult`."""

    @property
    def confidences(self) -> np.ndarray:
        """`[Z, K]`."""

    def flags_of(self, number: int) -> tuple[str, ...]:
        """The flags of the series and those of a slice."""


Score: TypeAlias = Callable[[volumes.Volume], Scored]


def select(
    run: workdir.Run,
    options: SelectionOptions,
    score: Score | None = None,
    flags: tuple[str, ...] = (),
) -> Selection:
    """Selects images of a prepared split, or slices of CT files.

    Args:
      run: the opened network.
      options: which images.
      score: volume -> predictions, from which images of CT files have their flags. With `limit`
        but without `ids`, their slices are then those of `ranking.best_slices`; without it the
        first ones.
      flags: those of images of a split, and of CT files without `score`.

    Raises:
      InputError: no image is selected, or an id or a label is unknown.
    """
    path, split, labels = options.path, options.split, options.labels
    columns = label_columns(run, labels)
    ids = set(options.ids) if options.ids else None
    failures: list[tuple[str, str]] = []
    unlabelled: list[str] = []
    identity: dict[str, Any]
    if path is not None and split is None:
        hidden = read_pseudonyms(options.pseudonyms, options.salt_file)
        by_score = bool(score and options.limit and not ids)
        best = functools.partial(_best, run, columns) if by_score else None
        judge: Callable[[volumes.Volume], Scored | None] = score or (lambda volume: None)
        readers, known, series, failures = _slices(
            run, path, ids, options, hidden, judge, flags, best
        )
        names = [path] if isinstance(path, (str, pathlib.Path)) else path
        shown = [hidden.name(str(name)) if hidden else str(name) for name in names]
        identity = {
            "path": shown[0] if len(shown) == 1 else shown,
            "series": sorted({ref.key for ref in series}),
        }
        total = sum(ref.count for ref in series)
        # Earlier versions ranked slices only for labels.
        ranked = by_score and bool(columns or len(readers) < total)
        identity |= {"order": "confidence"} if ranked else {}
        identity["digest"] = digest([[ref.key, ref.count, *sizes(ref.paths)] for ref in series])
    elif split is not None and path is None:
        readers, known, unlabelled, dataset = _records(run, options, split, ids, columns, flags)
        by_score, total = False, len(dataset.source(split))
        identity = {"fingerprint": dataset.fingerprint, "split": split}
        identity |= {"ct": str(options.ct)} if options.ct else {}
    else:
        given = "nothing" if path is None else "both"
        raise InputError(f"{given} to explain was given: pass either --split or CT files")
    named = split if path is None else ", ".join(search.as_list(path))
    unknown = sorted((ids or set()) - set(known))
    if unknown:
        raise InputError(f"--ids {unknown[0]!r} is not among the images of {named}")
    if unlabelled:
        raise InputError(
            f"--ids {unlabelled[0]!r} has none of --labels {','.join(labels or ())}, which also "
            "select images: omit one of the two options"
        )
    if not readers:
        why = f": {failures[0][0]}: {failures[0][1]}" if failures else ": check --ids and --labels"
        raise InputError(f"no image of {named} is selected{why}")
    identity |= {"ids": sorted(ids or ()), "labels": list(labels or ()), "limit": options.limit}
    rule = _rule(len(readers), total, options, by_score=by_score)
    return Selection(readers[: options.limit], failures, identity, rule)


def _rule(matching: int, total: int, options: SelectionOptions, *, by_score: bool) -> str:
    """The rule of a selection, for people.

    Args:
      matching: the number of images that were selected before `options.limit`.
      total: the number of images of the split or of slices of the CT files.
      options: which images.
      by_score: slices with high confidences were preferred.
    """
    count = min(matching, options.limit or matching)
    unit = "slices" if options.split is None else f"images of split {options.split}"
    labels = ", ".join(options.labels or ())
    if options.ids:
        return f"{count} of {total} {unit}, by --ids"
    if by_score and count < total:
        return (
            f"the {count} of {total} slices with the highest confidence in {labels or 'any label'}:"
            " confidences that reach their threshold first, different series first"
        )
    if options.split is not None and labels and matching < total:
        total, unit = matching, f"{unit} with {' or '.join(options.labels or ())}"
    if count < total:
        return f"the first {count} of {total} {unit}"
    return f"all {total} {unit}"


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def sizes(paths: Iterable[str | pathlib.Path]) -> list[list[str | int]]:
    """(name, bytes) of files, to detect replaced files."""
    return [[path.name, path.stat().st_size] for path in map(pathlib.Path, paths)]


def _records(
    run: workdir.Run,
    options: SelectionOptions,
    split: str,
    ids: set[str] | None,
    columns: list[int],
    flags: tuple[str, ...],
) -> tuple[list[Callable[[], SelectedImage]], list[str], list[str], records.Dataset]:
    """(readers, ids that were read, ids without any of the labels, data set)."""
    dataset = records.open_dataset(options.data or run.data_path)
    records.check_size(dataset, run.size)
    dataset.split(split)
    source, vocabulary = dataset.source(split), dataset.vocabulary
    complete = labels_are_complete(dataset.info, split)
    folder = None if options.ct is None else pathlib.Path(options.ct)
    if folder is not None:
        source_slices.check_folder(folder)

    def read(number: int, folder: pathlib.Path | None = folder) -> SelectedImage:
        example = source[number]
        annotation = None
        if vocabulary.names == run.vocabulary.names:  # other labels cannot be compared
            annotation = Annotation(example.labels, example.label_mask, complete, vocabulary)
        drawn = None if folder is None else source_slices.read_slice(example, folder)
        meta = example.meta | {"split": split}
        return SelectedImage(
            example.id, example.image, annotation, meta, slice_hu=drawn, flags=flags
        )

    numbers: Sequence[int] = range(len(source))
    read_ids, unlabelled = [], []
    if ids or columns:  # otherwise nothing needs to be read yet
        chosen = []
        for number in numbers:
            image = read(number, folder=None)
            if ids and image.id not in ids:
                continue
            read_ids.append(image.id)
            if not columns or not image.annotation or np.isin(columns, image.labelled).any():
                chosen.append(number)
            elif ids:
                unlabelled.append(image.id)
        numbers = chosen
    if folder is not None:
        source_slices.check_matches(source.__getitem__, numbers[: options.limit], folder)
    return [functools.partial(read, number) for number in numbers], read_ids, unlabelled, dataset


def _slices(
    run: workdir.Run,
    path: search.Paths,
    ids: set[str] | None,
    options: SelectionOptions,
    hidden: Pseudonyms | None,
    judge: Callable[[volumes.Volume], Scored | None],
    flags: tuple[str, ...],
    best: Callable[..., tuple[list[str], list[tuple[str, str]]]] | None,
) -> tuple[
    list[Callable[[], SelectedImage]],
    list[str],
    list[search.SeriesRef],
    list[tuple[str, str]],
]:
    """(readers, their ids, series, failures); with pseudonyms if `hidden`.

    `judge` is `score` of `select`, and `best` is `_best` with its first arguments; None selects all
    slices.
    """
    series, failures = search.find_series(path, overrides=options.overrides)
    if hidden:
        series, failures = list(map(hidden.series, series)), hidden.failures(failures)
    size = run.size

    @functools.lru_cache(maxsize=1)
    def load(ref: search.SeriesRef) -> tuple[volumes.Volume, float]:
        window = options.png_window
        volume = volumes.load_series(ref, png_window=window, overrides=options.overrides)
        return volume, preprocess.body_threshold(volume.hu, window)

    def load_or_reject(ref: search.SeriesRef) -> tuple[volumes.Volume, float]:
        try:
            return load(ref)
        except Rejected as error:
            failure = ref.paths[0], str(error)
            raise Rejected(*(hidden.failures([failure])[0] if hidden else failure)) from error

    known_flags: dict[str, list[tuple[str, ...]]] = {}

    def predictions(ref: search.SeriesRef) -> Scored | None:
        volume = load_or_reject(ref)[0]
        scored = judge(volume)
        known_flags[ref.key] = [
            scored.flags_of(number) if scored else flags for number in range(len(volume.hu))
        ]
        return scored

    def read(ref: search.SeriesRef, number: int) -> SelectedImage:
        volume, threshold = load_or_reject(ref)
        if ref.key not in known_flags:
            predictions(ref)
        triplet = volume.neighbours(number)
        image, crop = preprocess.make_triplet(triplet, size, threshold=threshold)
        file = ref.paths[0] if ref.kind == "nifti" else volume.slices[number]
        meta = {"file": file, "slice": number, "crop": crop, "kind": ref.kind}
        meta |= {"series": ref.key, "shape": volume.hu.shape, "size": size}
        meta |= {"slices": len(volume.hu), "spacing": volume.json_spacing}
        if volume.affine is not None:
            meta["affine"] = volume.affine.tolist()
        part = source_slices.part(volume.hu[number], crop)
        private = ("file",) if hidden else ()
        return SelectedImage(
            f"{ref.key}:{number}",
            image,
            None,
            meta,
            private=private,
            slice_hu=part,
            flags=known_flags[ref.key][number],
        )

    places = {f"{ref.key}:{number}": (ref, number) for ref in series for number in range(ref.count)}
    selected = [key for key in places if not ids or key in ids]
    if best is not None and options.limit and options.limit < len(selected):
        selected, rejected = best(options.limit, series, predictions)
        failures = [*failures, *rejected]
    return [functools.partial(read, *places[key]) for key in selected], selected, series, failures


def _best(
    run: workdir.Run,
    columns: list[int],
    limit: int,
    series: Sequence[search.SeriesRef],
    predictions: Callable[[search.SeriesRef], Scored],
) -> tuple[list[str], list[tuple[str, str]]]:
    """(ids of the slices that show some labels best, failures of series that were rejected).

    Without columns, any label counts.
    """
    ids, groups, scores = [], [], []
    failures: list[tuple[str, str]] = []
    with console.progress("score slices", sum(ref.count for ref in series)) as advance:
        for ref in series:
            try:
                confidences = predictions(ref).confidences
            except Rejected as error:
                failures.append(error.args)
            else:
                scores.append(label_scores(confidences, run.thresholds, columns))
                names = [f"{ref.key}:{number}" for number in range(len(confidences))]
                ids += names
                groups += [group_of(name, {"series": ref.key}) for name in names]
            advance(ref.count)
    if not ids:
        return [], failures
    stacked, reached = map(np.concatenate, zip(*scores, strict=True))
    return [ids[number] for number in best_slices(stacked, reached, groups, limit)], failures
