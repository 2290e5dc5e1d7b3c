"""Explains a selection in batches, resuming if interrupted, and stores the results."""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from maknet_jax import console, files
from maknet_jax.ct.read_ahead import read_ahead
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain import truth
from maknet_jax.explain.network import Network
from maknet_jax.explain.options import DisplayOptions, PathOptions, SelectionOptions
from maknet_jax.explain.selection import SelectedImage, Selection
from maknet_jax.figures import picture
from maknet_jax.runs.claim import claim
from maknet_jax.training import sharding

# One image's result: metadata (JSON) and arrays.
Result = tuple[dict[str, Any], dict[str, np.ndarray]]
Images = dict[int, SelectedImage]  # by their number in the selection
Failures = list[tuple[str, str]]  # (input, reason)


def shared_settings(
    networks: Sequence[Network],
    selection: SelectionOptions,
    path: PathOptions,
    display: DisplayOptions,
) -> dict[str, Any]:
    """The settings on which the results of both `attribute` and `perturb` depend, as JSON."""
    return {
        "truth": truth.RULE,
        "steps": path.steps,
        "method": path.method,
        "baseline": path.baseline,
        "top": min(selection.top, len(networks[0].run.vocabulary)),
        "networks": [network.identity for network in networks],
        "display": list(display.window or picture.SOFT_TISSUE),
        "png_window": selection.png_window and list(selection.png_window),
        **selection.overrides.used(),
    }


def explain(
    title: str,
    out: str | pathlib.Path,
    selection: Selection,
    settings: dict[str, Any],
    explain_batch: Callable[[Images], list[Result]],
    *,
    batch_size: int,
    option: str = "--out",
) -> tuple[dict[int, pathlib.Path], Failures]:
    """Calls `explain_batch` on the images of a selection that have no result yet.

    OUT/cases/00012.npz is the result of one image and is written atomically: an interrupted run
    neither repeats nor loses results. Several processes share the images.

    Args:
      title: the command, for the progress bar and messages: "maknet attribute".
      out: the output folder.
      selection: the images.
      settings: everything on which the results depend, as JSON; stored in OUT/settings.json.
      explain_batch: number -> image -> one result per image, in the same order.
      batch_size: images per step.
      option: the option that names the output folder, for messages.

    Returns:
      (number -> file of the result, failures).

    Raises:
      InputError: `out` has other contents, or no image could be read.
    """
    out = pathlib.Path(out)
    settings = settings | {"selection": selection.identity}
    with claim(
        out,
        {"settings.json": settings},
        command=title,
        option=option,
        upgrade=lambda _, stored: _without_names(stored),
    ):
        paths = {n: out / "cases" / f"{n:05d}.npz" for n in range(len(selection.readers))}
        mine = range(jax.process_index(), len(paths), jax.process_count())
        todo = [number for number in mine if not paths[number].exists()]
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        if todo:
            console.say_off_terminal(
                f"{title}: {console.plural(len(todo), 'image')}; the network is compiled first, "
                "which can take minutes if it is not in the compile cache"
            )
        with console.progress(title, len(mine), done=len(mine) - len(todo)) as advance:
            advance(0, note="compiling" if todo else "")
            for numbers, content in read_ahead(functools.partial(_read, selection), batches):
                images, _ = content.result()
                results = explain_batch(images) if images else []
                for number, result in zip(images, results, strict=True):
                    save(paths[number], *result)
                advance(len(numbers), note="")
        sharding.wait_for_all("explained")
        done = {number: path for number, path in paths.items() if path.exists()}
        # Images without a result are read again for the reason: another process may have rejected
        # them.
        _, failures = _read(selection, [number for number in paths if number not in done])
        failures = sorted({*selection.failures, *failures})
        if not done:
            if jax.process_index() == 0:
                # Without results, a later run may use other settings.
                (out / "settings.json").unlink(missing_ok=True)
            raise InputError(f"no image could be read: {failures[0][0]}: {failures[0][1]}")
        return done, failures


def _without_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in this version's format; those of earlier versions start networks with a name."""
    networks = [identity[-3:] for identity in settings.get("networks", ())]
    return settings | {"networks": networks} if networks else settings


@dataclasses.dataclass(frozen=True)
class Explained:
    """The results of a selection, from which a verb writes its tables and its page.

    Attributes:
      out: the output folder.
      files: number -> file of an image's result.
      failures: (input, reason) of images without a result.
      summary: the settings and counts so far.
      names: the names of the networks.
      most_shown: images on the page at most.
    """

    out: pathlib.Path
    files: dict[int, pathlib.Path]
    failures: Failures
    summary: dict[str, Any]
    names: list[str]
    most_shown: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A selection to explain.

    Attributes:
      verb: "attribute" or "perturb".
      out: the output folder.
      folder: the workdir or bundle of the first network.
      networks: the networks that are explained.
      selection: the images.
      settings: see `explain`.
    """

    verb: str
    out: pathlib.Path
    folder: str | pathlib.Path
    networks: Sequence[Network]
    selection: Selection
    settings: dict[str, Any]

    def run(
        self,
        explain_batch: Callable[[Images], list[Result]],
        write: Callable[[Explained], dict[str, Any]],
        *,
        batch_size: int,
        most_shown: int,
    ) -> dict[str, Any]:
        """Calls `explain`, then `write` in one process; returns the summary.

        Args:
          explain_batch: see `explain`.
          write: writes tables and a page; returns what it adds to the summary.
          batch_size: images per step.
          most_shown: images on the page at most.
        """
        paths, failures = explain(
            f"maknet {self.verb}",
            self.out,
            self.selection,
            self.settings,
            explain_batch,
            batch_size=batch_size,
        )
        run = self.networks[0].run
        counts: dict[str, Any] = {"images": len(paths), "failures": len(failures)}
        counts |= {"trained_on": run.trained_on, "selected": self.selection.rule}
        counts["labels"] = len(run.vocabulary)
        each = (load_metadata(path).get("flags", ()) for path in paths.values())
        counts["flags"] = dict(collections.Counter(name for names in each for name in names))
        if ct := self.selection.identity.get("ct"):
            counts["without_ct"] = without = _count_without_ct(paths.values())
            if without:
                console.Log().say(
                    f"{without} of {len(paths)} pictures have the resolution of the network: their "
                    f"CT is not in {ct}, or it has changed"
                )
        summary = self.settings | {"workdir": str(self.folder)} | counts
        if jax.process_index() == 0:
            names = [network.name for network in self.networks]
            summary |= write(Explained(self.out, paths, failures, summary, names, most_shown))
        return summary


def _count_without_ct(paths: Iterable[pathlib.Path]) -> int:
    """The number of results whose picture is not that of a CT slice."""
    pictures = (load_metadata(path).get("picture", {}) for path in paths)
    return sum(not fields.get("native", False) for fields in pictures)


def _read(selection: Selection, numbers: Iterable[int]) -> tuple[Images, Failures]:
    images: Images = {}
    failures: Failures = []
    for number in numbers:
        try:
            images[number] = selection.readers[number]()
        except Rejected as error:
            failures.append(error.args if len(error.args) == 2 else (f"image {number}", str(error)))
    return images, failures


def padded(images: Iterable[SelectedImage], batch_size: int) -> np.ndarray:
    """int16 HU `[batch_size, S, S, 3]`, padded by repeating the last image."""
    hu = [image.image for image in images]
    return np.stack(hu + hu[-1:] * (batch_size - len(hu)))


def save(path: pathlib.Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes one image's result atomically: compressed arrays, and the metadata as JSON."""
    with files.write_whole(path, "wb") as file:
        content: dict[str, Any] = {"about": json.dumps(metadata), **arrays}
        np.savez_compressed(file, **content)


def load_metadata(path: str | pathlib.Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """The metadata alone, without decompressing the arrays.

    Args:
      path: the file.
      names: the current names of the networks, in the order of the results; the stored ones are
        outdated if workdirs have moved.
    """
    with np.load(path) as stored:
        metadata = json.loads(str(stored["about"]))
    for model, name in zip(metadata.get("models", ()), names, strict=False):
        model["name"] = name
    return metadata


def load(path: str | pathlib.Path, names: Sequence[str] = ()) -> Result:
    """(metadata, arrays) as `save` wrote them; for `names` see `load_metadata`."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "about"}
    return load_metadata(path, names), arrays
