"""`maknet verify`: reads a data set, a workdir or a bundle whole and compares all digests."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

import jax

from maknet_jax import console, files
from maknet_jax.data import object_store, verification
from maknet_jax.data.labels import Vocabulary
from maknet_jax.data.verification import Check
from maknet_jax.errors import InputError
from maknet_jax.runs import build, bundle, domain_file, workdir
from maknet_jax.runs import config as configs
from maknet_jax.training import checkpoint, sharding
from maknet_jax.training.state import TrainState


def verify(path: str | os.PathLike[str]) -> list[Check]:
    """Reads everything and compares it with what was recorded when it was written.

    Args:
      path: a prepared data set, the output of `maknet pseudo-label`, a workdir of `maknet train` or
        its s3:// or gs:// URL, a bundle (folder or .zip), or the name of a released one.

    Returns:
      One check per file or checkpoint.

    Raises:
      InputError: it is none of these.
    """
    folder = workdir.find(path) if object_store.is_url(path) else pathlib.Path(path)
    if (folder / "config.json").is_file():
        checks = _check_workdir(folder)
    elif (folder / "pseudo.json").is_file():
        checks = verification.check_pseudo_labels(folder)
    elif (folder / "dataset.json").is_file():
        checks = verification.check_dataset(folder)
    else:
        checks = _check_bundle(path)
    results = []
    with console.progress("verify", None) as advance:
        for check in checks:
            results.append(check)
            advance()
    return results


def table(checks: list[Check]) -> str:
    """The checks as text: a table, and a line that counts them."""
    rows = [[check.item, check.content or "-", _state(check)] for check in checks]
    lines = [console.format_table(["item", "content", "state"], rows)]
    damaged = sum(bool(check.problem) for check in checks)
    remarks = sum(bool(check.remark) for check in checks)
    summary = f"{len(checks)} items read, {damaged} damaged"
    if remarks:
        summary += f"; {remarks} of an earlier version have no digest, and were only read"
    return "\n".join([*lines, summary])


def _state(check: Check) -> str:
    return f"damaged: {check.problem}" if check.problem else check.remark or "ok"


def _check_bundle(path: str | os.PathLike[str]) -> Iterator[Check]:
    source = workdir.find(path, "a prepared data set, ")
    if not bundle.is_bundle(source):
        raise InputError(
            f"{path} is not a data set, pseudo-labels, a workdir or a bundle: pass a folder with "
            "dataset.json, pseudo.json, config.json or bundle.json, or a .zip"
        )
    return _read_bundle(source)


def _read_bundle(source: pathlib.Path) -> Iterator[Check]:
    try:
        content = bundle.read(source)
    except InputError as error:
        yield Check(source.name, problem=str(error))
        return
    yield Check(bundle.INFO, f"{len(content.vocabulary)} labels")
    for name in bundle.contained(content.info):
        yield Check(name, f"{content.info['files'][name]['size']:,} bytes")


def _check_workdir(folder: pathlib.Path) -> Iterator[Check]:
    try:
        config = configs.read_stored(folder)
        yield Check("config.json", f"config of {config.model.name}")
        vocabulary = Vocabulary.from_json(files.read_json(folder / "dataset.json")["labels"])
        yield Check("dataset.json", f"{len(vocabulary)} labels")
        shapes = build.assemble(config, len(vocabulary), sharding.data_mesh()).shapes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Check("config.json, dataset.json", problem=f"{type(error).__name__}: {error}")
        return
    steps = []
    for name in workdir.FOLDERS.values():
        if not (folder / name).is_dir():
            continue
        with contextlib.closing(checkpoint.Checkpoints(folder / name, writable=False)) as saved:
            for step in saved.steps():
                steps.append(step)
                yield from _check_checkpoint(saved, shapes, step, f"{name}/{step}")
    if not steps:
        yield Check("checkpoints", problem="there is no checkpoint yet")
    for name in ("metrics.jsonl", "summary.json"):
        if (folder / name).is_file():
            yield _check_json(folder / name)
    if (folder / domain_file.FILE).is_file():
        try:
            domain_file.read(folder, 0)
            yield Check(domain_file.FILE, "out-of-domain statistics")
        except InputError as error:
            yield Check(domain_file.FILE, problem=str(error))


def _check_checkpoint(
    saved: checkpoint.Checkpoints, shapes: TrainState, step: int, item: str
) -> Iterator[Check]:
    try:
        remark = saved.check(shapes, step)
    except Exception as error:  # Orbax raises many types of errors on a damaged file
        if (saved.folder / str(step)).is_dir():  # else a training that runs has deleted it
            text = " ".join(str(error).split())[:200]
            yield Check(item, problem=f"{type(error).__name__}: {text}")
        return
    yield Check(item, f"{len(jax.tree.leaves(shapes))} arrays", remark=remark)


def _check_json(path: pathlib.Path) -> Check:
    """Parses a JSON or JSON Lines file of a workdir."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    texts = lines if path.suffix == ".jsonl" else ["\n".join(lines)]
    for number, text in enumerate(texts, start=1):
        try:
            json.loads(text)
        except ValueError as error:
            return Check(path.name, f"{len(lines):,} lines", f"line {number}: {error}")
    return Check(path.name, f"{len(lines):,} lines")
